"""Times how fast a population trains, against the same training without this project.

``python -m benchmarks.throughput`` prints a table, and writes ``benchmarks/results/throughput-cpu.csv`` and ``.png`` (with
a GPU, ``throughput-cuda``). Contenders take turns, a generation each, so that whatever else the machine does falls on all
of them alike. A generation trains and scores `CHILDREN` networks; images/s counts the training images.

On a CPU, Fashion-MNIST (a subset) and ResNet-8, each network distilled from a teacher under the TaylorGLO loss:

- bare processes: one process a core with one thread, plain PyTorch and torch.optim.SGD; no evolution, nothing saved; and
  with tensors that are not channels last
- one process: the same, one network after the other, with all threads
- epbt: a generation of `epbt()` with a worker a core, its selection, records and checkpoint included; and with one worker
- epbt, bfloat16: the same with --precision bfloat16
- stacked: networks stacked into one by torch.func, in one process with all threads; a step without augmentation or scoring

then how the time of a generation grows with the number of networks, of workers, with the model, and what a training step
of each of the paper's networks takes a worker. With ``--tune``, a whole run of Population-Based Training on the digits
instead, against Ray Tune's (requirements-ray.txt): with this project's training code, and with what one would write in
PyTorch; for generations of three epochs and of one.

On a GPU, ResNet-32 at batch 128 on random data of CIFAR-10's shape, training only: one eager slot; W slots eager; W slots
with CUDA graphs; W networks stacked into one by torch.func; and the limit, one eager network at the batch size that
saturates the device. gpu_busy is the share of the time of a profile in which the GPU runs something. The last rows are with
--deterministic.
"""

import argparse
import copy
import itertools
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.kernel import RESULTS, device_name, spread, write_csv
from data import DATASETS, ImageSet, draw_augmentation, load_data, make_batch, make_data, normalize
from epbt import METHODS, Config, make_job
from models import make_model
from records import RunFolder
from taylorglo_ext import load, taylorglo_loss
from training import EVALUATION_BATCH, Trainer, prepare
from workers import REHEARSAL, Workers, keep_freed_memory, make_pool, rehearse, throughput

CHILDREN = 4
CORES = len(os.sched_getaffinity(0))
SETTINGS = dict(dataset="fashion", model="resnet8", limit=2000, validation=500, epochs=1, generations=1000)
PAPER_MODELS = "resnet32", "wrn-10-12", "wrn-16-8", "wrn-22-6", "wrn-28-5"
TUNE = "--dataset digits --model resnet8 --population 8 --generations 10 --seed 1".split()


# On a CPU: contenders, each a context manager that gives a function of one generation.


def plain_epoch(model, optimizer, job, rng, loss):
    """An epoch of training in plain PyTorch. loss: called as loss(images, logits, labels)."""
    data, size = job.data, job.batch_size
    order = torch.from_numpy(rng.permutation(len(data.train)))
    draws = torch.from_numpy(draw_augmentation(data.augmentation, len(order), data.height, data.width, rng))
    for i in range(0, len(order) - size + 1, size):
        index = order[i:i + size]
        images = make_batch(data.train.images, index, draws[i:i + size], data.augmentation, data.mean, data.std)
        optimizer.zero_grad()
        loss(images, model(images), data.train.labels[index]).backward()
        optimizer.step()


@torch.no_grad()
def plain_accuracy(model, data, image_set):
    correct = 0
    for images, labels in zip(image_set.images.split(EVALUATION_BATCH), image_set.labels.split(EVALUATION_BATCH),
                              strict=True):
        correct += (model(normalize(images, data.mean, data.std)).argmax(1) == labels).sum().item()
    return correct / len(image_set)


def bare_generation(job, networks, layout):
    """Train and score so many networks in plain PyTorch. layout: the memory format of weights and activations."""
    data, theta, alpha = job.data, torch.tensor([0.0, 0.5, 0, 0, 0, 20, -40, 0]), torch.tensor(0.4)
    rng = np.random.default_rng(0)
    for _ in range(networks):
        model, teacher = (make_model(job.model, data.num_classes, data.channels, seed).to(memory_format=layout)
                          for seed in (0, 1))
        if layout is not torch.channels_last:  # make_batch()'s images are; contiguous() would leave those of one channel
            for network in (model, teacher):
                network.register_forward_pre_hook(lambda network, images: images[0].clone(memory_format=layout))
        teacher.eval()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

        def distilled(images, logits, labels, teacher=teacher):
            with torch.no_grad():
                lesson = teacher(images)
            return taylorglo_loss(logits, labels, theta, lesson, alpha)

        for _ in range(job.epochs):
            plain_epoch(model, optimizer, job, rng, distilled)
        model.eval()
        for image_set in (data.validation, data.test):
            plain_accuracy(model, data, image_set)


def bare_worker(job, networks, layout, pipe):
    torch.set_num_threads(job.threads)
    load("fused", "cpu")
    while pipe.recv():
        bare_generation(job, networks, layout)
        pipe.send(True)


@contextmanager
def bare(config, data, processes, layout=torch.channels_last):
    """Each of the processes does its share of the networks, with the cores shared out among them as threads."""
    job = replace(make_job(config, data), threads=max(1, CORES // processes))
    context = multiprocessing.get_context("spawn")
    pipes, started = [], []
    for i in range(processes):
        ours, theirs = context.Pipe()
        share = CHILDREN // processes + (i < CHILDREN % processes)
        started.append(context.Process(target=bare_worker, args=(job, share, layout, theirs), daemon=True))
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
    """A generation of Algorithm 1 after its first ones: `networks` children of a population of twice as many."""
    config = replace(config, population=2 * networks, elites=networks, novelty_candidates=networks * 3 // 2,
                     workers=workers)
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder(folder, config.identity())
        progress = SimpleNamespace(update=lambda n: None)
        with closing(make_pool(make_job(config, data), workers)) as pool:
            generations = METHODS["epbt"](config, config.search_space(), data, Workers(pool, run, progress), run)
            for _ in range(2):  # the initial population, and the first one that has a teacher
                next(generations)
            yield lambda: next(generations)


def take_turns(contenders, rounds):
    """Seconds of each contender's generations {name: [seconds]}. contenders: {name: context manager}."""
    times = {name: [] for name in contenders}
    with ExitStack() as stack:
        generations = {name: stack.enter_context(contender) for name, contender in contenders.items()}
        for generation in generations.values():
            generation()
        for _, (name, generation) in itertools.product(range(rounds), generations.items()):
            start = time.perf_counter()
            generation()
            times[name].append(time.perf_counter() - start)
    return times


def on_cpu(rounds):
    """Yields the records of every CPU contender."""
    config = Config(**SETTINGS, device="cpu", threads=1).resolved()
    data = load_data(config.dataset, validation=config.validation, limit=config.limit)
    data = replace(data, test=ImageSet(data.test.images[:1000], data.test.labels[:1000]))
    rough, n = replace(config, precision="bfloat16"), CORES
    contenders = {
        "bare processes": (bare(config, data, n), config.model, CHILDREN, n),
        "bare, not channels last": (bare(config, data, n, torch.contiguous_format), config.model, CHILDREN, n),
        "one process": (bare(config, data, 1), config.model, CHILDREN, 1),
        "epbt": (ours(config, data, n), config.model, CHILDREN, n),
        "epbt, one worker": (ours(config, data, 1), config.model, CHILDREN, 1),
        "epbt, bfloat16": (ours(rough, data, n), config.model, CHILDREN, n),
    }
    yield from records_of(contenders, data, rounds)
    yield record("stacked", stacked(make_job(config, data), CHILDREN, max(2, rounds // 2)), CHILDREN * 128,
                 model=config.model, networks=CHILDREN, workers=1)
    for networks in (2, 8):
        yield from records_of({f"P = {2 * networks}": (ours(config, data, n, networks), config.model, networks, n)},
                              data, max(2, rounds // 2))
    for model in ("resnet20", "wrn-10-1"):
        yield from records_of({model: (ours(replace(config, model=model), data, n), model, CHILDREN, n)}, data,
                              max(2, rounds // 2))
    keep_freed_memory()
    job = prepare(make_job(Config(dataset="cifar10", device="cpu", threads=1).resolved(), random_cifar10(1500)))
    for model in PAPER_MODELS:
        times = steps(replace(job, model=model), max(2, rounds // 2))
        yield record("a step", times, job.batch_size, model=model, networks=1, workers=1)


def steps(job, rounds):
    """Seconds of training steps of one worker."""
    trainer, times = Trainer(job), []
    for _ in range(1 + rounds):  # the first is slower
        start = time.perf_counter()
        rehearse([trainer], 1)
        times.append(time.perf_counter() - start)
    return times[1:]


def random_cifar10(n):
    """Random images of CIFAR-10's shape, with its augmentation; 1,250 of them are for validation."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (n, 3, 32, 32), dtype=np.uint8), rng.integers(0, 10, n)
    return make_data(images, tuple(part[:10_000] for part in images), validation=1250,
                     augmentation=DATASETS["cifar10"].augmentation)


def records_of(contenders, data, rounds):
    times = take_turns({name: contender for name, (contender, *_) in contenders.items()}, rounds)
    for name, (_, model, networks, workers) in contenders.items():
        images = networks * (len(data.train) // 128 * 128)
        yield record(name, times[name], images, model=model, networks=networks, workers=workers)


def record(contender, times, images, **facts):
    seconds = spread(times)
    return dict(contender=contender, **facts, **{f"{name}_s": float(f"{value:.4g}") for name, value in seconds.items()},
                samples=len(times), images_per_s=round(images / seconds["median"], 1))


def against_tune(repetitions):
    """Whole runs of PBT on the digits, started as a user does, in turn; with long generations and with short ones."""
    with tempfile.TemporaryDirectory() as folder:
        programs = {"epbt.py --method pbt": ["epbt.py", "--method", "pbt", "--out", f"{folder}/run", "--overwrite"],
                    "Ray Tune, our training": ["-m", "benchmarks.tune"],
                    "Ray Tune, plain PyTorch": ["-m", "benchmarks.tune", "--plain"]}
        for epochs in (3, 1):
            times = {name: [] for name in programs}
            for _, (name, program) in itertools.product(range(repetitions), programs.items()):
                start = time.perf_counter()
                subprocess.run([sys.executable, *program, *TUNE, "--epochs", str(epochs)], check=True,
                               stdout=subprocess.DEVNULL)
                times[name].append(time.perf_counter() - start)
            for name, values in times.items():
                yield record(f"{name}; {epochs} epochs", values, 8 * 10 * epochs * 1152, model="resnet8", networks=80,
                             workers=CORES)


# On a GPU.


def on_gpu(rounds):
    """Yields the records of every GPU contender."""
    config = Config(dataset="cifar10", device="cuda").resolved()
    job = prepare(replace(make_job(config, random_cifar10(51_250)), device="cuda:0"))
    for precision in ("float32", "bfloat16"):
        exact = replace(job, precision=precision)
        label = "" if precision == "float32" else ", bfloat16"
        for slots, graphs in ((1, False), (4, False), (1, True), (2, True), (4, True), (8, True), (16, True)):
            yield record_of_slots(("slots with graphs" if graphs else "eager slots") + label,
                                  replace(exact, no_graphs=not graphs), slots, rounds)
        for networks in (4, 8, 16) if precision == "float32" else ():  # torch.func has no mixed BatchNorm
            times = stacked(exact, networks, rounds)
            yield record("stacked", times, networks * 128, model=job.model, networks=networks, workers=1)
        for batch in (512, 2048, 8192):
            large = replace(exact, no_graphs=True, batch_size=batch)
            yield record_of_slots(f"limit: batch {batch}{label}", large, 1, rounds)
    exact = prepare(replace(job, deterministic=True))  # last, since it holds from now on
    for slots in (1, 8):
        yield record_of_slots("slots with graphs, deterministic", exact, slots, rounds)


def record_of_slots(contender, job, slots, rounds):
    """These slots together take so many training steps each, `rounds` times."""
    trainers = [Trainer(job) for _ in range(slots)]
    images = REHEARSAL * slots * job.batch_size
    times = [images / throughput(trainers) for _ in range(rounds)]
    row = record(contender, times, images, model=job.model, networks=slots, workers=slots)
    row["gpu_busy"] = round(busy_share(trainers), 3)
    del trainers
    torch.cuda.empty_cache()
    return row


def busy_share(trainers, steps=10):
    """In a profile of a few steps, the share of the time in which the GPU runs something: 1 where there is no gap."""
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as trace:
        rehearse(trainers, steps)
        torch.cuda.synchronize()
    return covered([(e.time_range.start, e.time_range.end) for e in trace.events() if e.device_type == DeviceType.CUDA])


def covered(spans):
    """The share of the time from the first start to the last end that lies within any of the spans (start, end)."""
    spans = sorted(spans)
    begun = end = spans[0][0]
    total = 0.0
    for start, stop in spans:
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total / (end - begun)


def stacked(job, networks, rounds, batch=128):
    """Seconds of a training step of so many networks as one, by torch.func: each on a batch of its own, distilled from
    one teacher. Less work than a slot's step, as the images are not augmented."""
    device = torch.device(job.device)
    *models, teacher = (make_model(job.model, job.data.num_classes, job.data.channels, seed).to(device)
                        for seed in range(networks + 1))
    teacher.eval()
    parameters, buffers = torch.func.stack_module_state(models)
    # Detached, or each step would be recorded for a backward outside of torch.func too, and its memory kept.
    parameters = {name: p.detach() for name, p in parameters.items()}
    skeleton = copy.deepcopy(models[0]).to("meta")
    momentum = {name: torch.zeros_like(p) for name, p in parameters.items()}
    shape = (networks, batch, job.data.channels, job.data.height, job.data.width)
    images, labels = torch.randn(shape, device=device), torch.randint(job.data.num_classes, shape[:2], device=device)

    def loss(parameters, buffers, images, targets):
        return F.cross_entropy(torch.func.functional_call(skeleton, (parameters, buffers), (images,)), targets)

    def step():
        with torch.no_grad():
            lesson = teacher(images.flatten(0, 1)).softmax(1).unflatten(0, shape[:2])
        targets = 0.4 * lesson + 0.6 * F.one_hot(labels, job.data.num_classes)  # Eq. 3
        gradients = torch.func.vmap(torch.func.grad(loss))(parameters, buffers, images, targets)
        for name, p in parameters.items():
            momentum[name].mul_(0.9).add_(gradients[name])
            p.add_(momentum[name], alpha=-0.1)

    times = []
    for _ in range(rounds + 2):
        start = time.perf_counter()
        for _ in range(10):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / 10)
    return times[2:]


# The table, the file, the picture.


def plot(records, path):
    """Images/s of each contender, a bar each with its 10th and 90th percentile."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 0.6 + 0.32 * len(records)), layout="constrained")
    names = [f"{r['contender']} ({r['networks']} × {r['model']})" for r in records][::-1]
    rates = [r["images_per_s"] for r in records][::-1]
    low = [rate * (1 - r["median_s"] / r["p90_s"]) for rate, r in zip(rates, records[::-1], strict=True)]
    high = [rate * (r["median_s"] / r["p10_s"] - 1) for rate, r in zip(rates, records[::-1], strict=True)]
    axes.barh(names, rates, xerr=[low, high], color="#4878a8", ecolor="#333333", capsize=2)
    axes.set(xlabel="training images/s", title=f"{records[0]['device']}, PyTorch {records[0]['torch']}")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=80)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tune", action="store_true", help="a whole run against Ray Tune's")
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args()
    machine = dict(device=device_name(options.device), torch=torch.__version__, cores=CORES)
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    print(f"{'contender':24}{'model':>10}{'networks':>10}{'workers':>9}{'median s':>10}{'p10':>9}{'p90':>9}"
          f"{'images/s':>11}{'GPU busy':>10}")
    contenders = against_tune if options.tune else {"cpu": on_cpu, "cuda": on_gpu}[options.device]
    records, path = [], RESULTS / ("tune-cpu.csv" if options.tune else f"throughput-{options.device}.csv")
    for row in contenders(options.rounds):
        records.append(machine | row)
        fields = tuple(dict.fromkeys(name for record in records for name in record))
        print(f"{row['contender']:24}{row['model']:>10}{row['networks']:>10}{row['workers']:>9}{row['median_s']:>10.3f}"
              f"{row['p10_s']:>9.3f}{row['p90_s']:>9.3f}{row['images_per_s']:>11,.0f}{row.get('gpu_busy', ''):>10}",
              flush=True)
        write_csv(path, fields, records)
    plot(records, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
