"""Times how fast a population trains, against the same training without this project.

``python -m benchmarks.throughput`` prints a table, and writes it after each row, by default to
``benchmarks/results/throughput-cpu.csv`` and ``.png``. A generation trains and scores `CHILDREN`
networks; images/s counts training images. With a GPU: see gpu.py.

On a CPU, Fashion-MNIST (a subset) and ResNet-8, each network distilled from a teacher under the
TaylorGLO loss. Contenders take turns, a generation each, so that whatever else the machine does
falls on all alike:

- bare processes: one process a core with one thread, plain PyTorch and torch.optim.SGD; no
  evolution, nothing saved; and with tensors that are not channels last; one process: the same, one
  network after the other, with all threads
- epbt: a generation of `epbt()` with a worker a core, its selection and records included; with one
  worker; in bfloat16
- stacked: networks stacked into one by torch.func, in one process with all threads; a step without
  augmentation or scoring

then how the time of a generation grows with the number of networks and with the model, and what a
training step of each of the paper's networks takes a worker.
"""

import copy
import itertools
import multiprocessing
import tempfile
import time
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

from augmentation import draw_augmentation, make_batch, normalize
from benchmarks.rows import CORES, command_line, print_and_write, record
from config import Config
from data import ImageSet, make_data
from epbt import METHODS, make_pool, read_data, settled
from models import make_model
from records import RunFolder
from settings import settings
from slots import Slot
from taylorglo_ext import load, taylorglo_loss
from training import EVALUATION_BATCH, Trainer
from workers import Workers, keep_freed_memory

CHILDREN = 4
SMALL = dict(dataset="fashion", preset="paper", model="resnet8", limit=2000, validation=500,
             epochs=1, generations=1000)
PAPER_MODELS = "resnet32", "wrn-10-12", "wrn-16-8", "wrn-22-6", "wrn-28-5"


# On a CPU: contenders, each a context manager that gives a function of one generation.


def plain_epoch(model, optimizer, config, data, rng, loss):
    """An epoch of training in plain PyTorch. loss: called as loss(images, logits, labels)."""
    order = torch.from_numpy(rng.permutation(len(data.train)))
    draws = draw_augmentation(data.augmentation, len(order), data.height, data.width, rng)
    draws = torch.from_numpy(draws)
    for i in range(0, len(order) - config.batch_size + 1, config.batch_size):
        index, some = order[i : i + config.batch_size], draws[i : i + config.batch_size]
        images = make_batch(data.train.images, index, some, data.augmentation, data.mean, data.std)
        optimizer.zero_grad()
        loss(images, model(images), data.train.labels[index]).backward()
        optimizer.step()


@torch.no_grad()
def plain_accuracy(model, data, image_set):
    correct = 0
    parts = (tensor.split(EVALUATION_BATCH) for tensor in (image_set.images, image_set.labels))
    for images, labels in zip(*parts, strict=True):
        correct += (model(normalize(images, data.mean, data.std)).argmax(1) == labels).sum().item()
    return correct / len(image_set)


def bare_generation(config, data, networks, layout):
    """Train and score so many networks in plain PyTorch. layout: a memory format, of weights and
    activations."""
    theta, alpha = torch.tensor([0.0, 0.5, 0, 0, 0, 20, -40, 0]), torch.tensor(0.4)
    rng = np.random.default_rng(0)
    for _ in range(networks):
        model, teacher = (make_model(config.model, data.num_classes, data.channels, seed)
                          .to(memory_format=layout) for seed in (0, 1))
        if layout is not torch.channels_last:
            # make_batch()'s images are; contiguous() would leave those of one channel.
            for network in (model, teacher):
                network.register_forward_pre_hook(
                    lambda network, images: images[0].clone(memory_format=layout))
        teacher.eval()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

        def distilled(images, logits, labels, teacher=teacher):
            with torch.no_grad():
                lesson = teacher(images)
            return taylorglo_loss(logits, labels, theta, lesson, alpha)

        for _ in range(config.epochs):
            plain_epoch(model, optimizer, config, data, rng, distilled)
        model.eval()
        for image_set in (data.validation, data.test):
            plain_accuracy(model, data, image_set)


def bare_worker(config, data, networks, layout, pipe):
    torch.set_num_threads(config.threads)
    load("fused", "cpu")
    while pipe.recv():
        bare_generation(config, data, networks, layout)
        pipe.send(True)


@contextmanager
def bare(config, data, processes, layout=torch.channels_last):
    """Each process does its share of the networks, with its share of the cores as threads."""
    config = replace(config, threads=max(1, CORES // processes))
    context, pipes, started = multiprocessing.get_context("spawn"), [], []
    for i in range(processes):
        ours, theirs = context.Pipe()
        share = CHILDREN // processes + (i < CHILDREN % processes)
        arguments = config, data, share, layout, theirs
        started.append(context.Process(target=bare_worker, args=arguments, daemon=True))
        started[-1].start()
        pipes.append(ours)

    def generation():
        for pipe in pipes:
            pipe.send(True)
        for pipe in pipes:
            pipe.recv()

    yield generation
    for process in started:
        process.kill()


@contextmanager
def ours(config, data, workers, networks=CHILDREN):
    """A generation of Algorithm 1 after its first ones: `networks` children, as many elites."""
    config = replace(config, population=2 * networks, elites=networks, workers=workers)
    with (tempfile.TemporaryDirectory() as folder,
          closing(RunFolder(folder, config.identity())) as run):
        run.begin()
        progress = SimpleNamespace(update=lambda n: None)
        with closing(make_pool(config, data)) as pool:
            workers = Workers(pool, run, progress)
            generations = METHODS["epbt"](config, config.search_space(), data, workers, run)
            for _ in range(2):  # the initial population, and the first one that has a teacher
                next(generations)
            yield lambda: next(generations)


def take_turns(contenders, rounds):
    """{name: seconds of its generations}. contenders: {name: context manager}."""
    times = {name: [] for name in contenders}
    with ExitStack() as stack:
        generations = {name: stack.enter_context(contender)
                       for name, contender in contenders.items()}
        for generation in generations.values():
            generation()
        for _, (name, generation) in itertools.product(range(rounds), generations.items()):
            start = time.perf_counter()
            generation()
            times[name].append(time.perf_counter() - start)
    return times


def whole(**fields):
    """A Config with nothing left at "auto"."""
    config = settled(Config(**fields))
    return replace(config, layout="channels-last", loss_backend=load("fused", config.device))


def on_cpu(options):
    """Yields the records of every CPU contender."""
    rounds = options.rounds
    small = dict(dataset="digits", limit=300, validation=100, batch_size=64) if options.tiny else {}
    config = whole(**SMALL | small, device="cpu", threads=1)
    data = read_data(config, None, None)
    data = replace(data, test=ImageSet(data.test.images[:1000], data.test.labels[:1000]))
    rough, n, few = replace(config, precision="bfloat16"), CORES, max(1, rounds // 2)
    contenders = {
        "bare processes": (bare(config, data, n), config.model, CHILDREN, n),
        "bare, not channels last": (bare(config, data, n, torch.contiguous_format), config.model,
                                    CHILDREN, n),
        "one process": (bare(config, data, 1), config.model, CHILDREN, 1),
        "epbt": (ours(config, data, n), config.model, CHILDREN, n),
        "epbt, one worker": (ours(config, data, 1), config.model, CHILDREN, 1),
        "epbt, bfloat16": (ours(rough, data, n), config.model, CHILDREN, n),
    }
    yield from records_of(contenders, config, data, rounds)
    times = stacked(config, data, CHILDREN, few)
    yield record("stacked", times, CHILDREN * 128, config.model, CHILDREN, 1)
    for networks in (2, 8):
        contender = ours(config, data, n, networks), config.model, networks, n
        yield from records_of({f"P = {2 * networks}": contender}, config, data, few)
    for model in () if options.tiny else ("resnet20", "wrn-10-1"):
        contender = ours(replace(config, model=model), data, n), model, CHILDREN, n
        yield from records_of({model: contender}, config, data, few)
    keep_freed_memory()
    config, data = whole(dataset="cifar10", device="cpu", threads=1), random_cifar10(1500)
    for model in PAPER_MODELS[:1] if options.tiny else PAPER_MODELS:
        times = steps(replace(config, model=model), data, few)
        yield record("a step", times, config.batch_size, model, 1, 1)


def steps(config, data, rounds):
    """Seconds of training steps of one worker."""
    times = []
    with settings(config):
        trainer = Trainer(config, data)
        trainer.network = None
        Slot.rehearse(trainer, 1)  # makes the networks; the first step is slower
        for _ in range(rounds):
            start = time.perf_counter()
            trainer.repeat(trainer.step, 1)
            times.append(time.perf_counter() - start)
    return times


def stacked(config, data, networks, rounds, batch=128):
    """Seconds of a training step of so many networks as one, by torch.func: each on a batch of its
    own, distilled from one teacher. Less work than a worker's, as the images are not augmented."""
    *models, teacher = (make_model(config.model, data.num_classes, data.channels, seed)
                        for seed in range(networks + 1))
    teacher.eval()
    parameters, buffers = torch.func.stack_module_state(models)
    # Detached, or each step would be recorded for a backward outside of torch.func, and kept.
    parameters = {name: p.detach() for name, p in parameters.items()}
    skeleton = copy.deepcopy(models[0]).to("meta")
    momentum = {name: torch.zeros_like(p) for name, p in parameters.items()}
    shape = (networks, batch, data.channels, data.height, data.width)
    images, labels = torch.randn(shape), torch.randint(data.num_classes, shape[:2])

    def loss(parameters, buffers, images, targets):
        logits = torch.func.functional_call(skeleton, (parameters, buffers), (images,))
        return F.cross_entropy(logits, targets)

    def step():
        with torch.no_grad():
            lesson = teacher(images.flatten(0, 1)).softmax(1).unflatten(0, shape[:2])
        targets = 0.4 * lesson + 0.6 * F.one_hot(labels, data.num_classes)  # Eq. 3
        gradients = torch.func.vmap(torch.func.grad(loss))(parameters, buffers, images, targets)
        for name, p in parameters.items():
            momentum[name].mul_(0.9).add_(gradients[name])
            p.add_(momentum[name], alpha=-0.1)

    times = []
    for _ in range(rounds + 2):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return times[2:]


def random_cifar10(n):
    """Random images of CIFAR-10's shape, with its augmentation; 1,250 are for validation."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (n, 3, 32, 32), dtype=np.uint8), rng.integers(0, 10, n)
    test = tuple(part[:10_000] for part in images)
    return make_data(images, test, validation=1250, augmentation="flip shift=4 cutout=16")


def records_of(contenders, config, data, rounds):
    times = take_turns({name: contender for name, (contender, *_) in contenders.items()}, rounds)
    for name, (_, model, networks, workers) in contenders.items():
        images = networks * (len(data.train) // config.batch_size * config.batch_size)
        yield record(name, times[name], images, model, networks, workers)


def main():
    parser = command_line(__doc__)
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--tiny", action="store_true", help="small sizes, to try the code")
    options = parser.parse_args()
    if options.device == "cpu" and (options.deterministic or options.compile):
        parser.error("--deterministic and --compile are for a GPU")
    name = f"throughput-{options.device}"
    name += "-deterministic" * options.deterministic + "-compile" * options.compile
    if options.device == "cuda":
        from benchmarks.gpu import on_gpu as rows
    else:
        rows = on_cpu
    print_and_write(rows(options), options.device, name, options.out)


if __name__ == "__main__":
    main()
