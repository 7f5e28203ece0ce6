"""Train one individual for one generation, then score it: Sec. 3.2, step 3 and Sec. 3.5.

Everything that changes between individuals (weights, momentum buffers, learning rate, theta, alpha, batch indices,
augmentation draws) is a tensor that is filled, never replaced, so that one training step serves them all: on a GPU it
is captured once as a CUDA graph, and then replayed.
"""

import os
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np
import torch

import taylorglo_ext
from data import Data, draw_augmentation, make_batch, normalize
from evolution import first_step, random_stream
from models import make_model, random_states, random_states_kept, seed_numpy_and_python, set_random_states
from options import message
from records import Individual, RunError, finite_or_none, load_individual, save_individual
from taylorglo_ext import PLAIN_LOSSES, TaylorGLOLoss

EVALUATION_BATCH = 500  # at most
STEPS_A_TURN = 8  # that a slot takes before the next slot of the same device has its turn
WARM_UP = 3  # steps before a CUDA graph is captured, as PyTorch asks: libraries allocate and choose in the first ones
# The hyperparameters that training applies: what may be evolved, and what Job.fixed gives where it is not.
HYPERPARAMETERS = (*(f"theta{i}" for i in range(8)), "lr_scale", "lr_decay", "momentum", "weight_decay", "cutout")


@dataclass
class Job:
    """What all evaluations of a run have in common: sent to each worker once."""

    data: Data
    model: str
    seed: int
    generations: int
    epochs: int  # per generation
    batch_size: int
    learning_rate: float  # at scale 1, before any decay
    milestones: tuple[float, ...]  # fractions of the run after which the learning rate decays
    fixed: dict[str, float]  # hyperparameters that are not evolved
    plain_loss: str  # of taylorglo_ext.PLAIN_LOSSES, for networks without theta
    normalize_loss: bool  # see scaled_theta
    add_cross_entropy: bool  # to Eq. 2: not in the paper
    average_weights: bool  # see Trainer.scored_network; not in the paper
    average_epochs: int  # over about how many: a generation's, also in the replay of a run
    loss_backend: str
    precision: str  # of the networks' activations; weights, BatchNorm statistics and the loss stay in float32
    threads: int
    device: str
    no_graphs: bool = False  # on a GPU: every operation is launched by itself
    deterministic: bool = False  # on a GPU: only operations that give the same bits each time

    def new_model(self, seed):
        return make_model(self.model, self.data.num_classes, self.data.channels, seed)


@dataclass
class Task:
    """One evaluation: who, from whose weights, under which teacher, and where the result goes."""

    individual: Individual
    path: Path
    parent: Path | None
    teacher: Path | None
    alpha: float
    epochs: int | None = None  # None: a whole generation


class Network:
    """A model whose weights, momentum and buffers lie in one flat vector, `state`: uint8 (bytes,).

    Loading an individual is one copy, an SGD step is three operations however many layers there are, and what a
    child inherits is whole: weights, momentum buffers and BatchNorm statistics.
    """

    def __init__(self, model, device):
        self.model = model.to(device, memory_format=torch.channels_last)
        parameters = sorted(model.parameters(), key=lambda p: not p.requires_grad)  # frozen ones last
        buffers = dict(model.named_buffers())
        n = sum(p.numel() for p in parameters)
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        sizes = [-(-b.numel() * b.element_size() // 8) * 8 for b in buffers.values()]  # each starts at 8 bytes
        self.state = torch.zeros(8 * n + sum(sizes), dtype=torch.uint8, device=device)
        learned, *rest = self.state.split([8 * n, *sizes])
        self.weights, self.momentum = learned.view(torch.float32).chunk(2)
        self.gradient = torch.zeros_like(self.weights)
        self.trained = self.weights[:trained], self.momentum[:trained], self.gradient[:trained]
        offset = 0
        for p in parameters:
            p.data = self._place(p, self.weights, offset).copy_(p.detach())
            p.grad = self._place(p, self.gradient, offset)
            offset += p.numel()
        for (name, buffer), part in zip(buffers.items(), rest, strict=True):
            flat = part[: buffer.numel() * buffer.element_size()].view(buffer.dtype)
            owner, _, leaf = name.rpartition(".")
            # .data: with a version counter of its own, as autograd watches saved BatchNorm statistics for changes.
            setattr(model.get_submodule(owner), leaf, flat.view(buffer.shape).copy_(buffer).data)

    @staticmethod
    def _place(p, flat, offset):
        """A view of flat that is laid out as p is, or without its gaps where p has any."""
        return flat.as_strided(p.shape, torch.empty_like(p, device="meta").stride(), flat.storage_offset() + offset)

    def start_afresh(self, model):
        """Take the weights and buffers of a new model; the momentum is zero."""
        copy_tensors(model, self.model)
        self.momentum.zero_()

    def load(self, state):
        """Take a whole state. Raises RunError for one of another model."""
        if len(state) != len(self.state):
            raise RunError(f"the weights in the run's folder have {len(state):,} bytes, and the model has "
                           f"{len(self.state):,}: it has been changed since")
        self.state.copy_(state)

    @torch.no_grad()
    def sgd_step(self, learning_rate, momentum, weight_decay):
        """v = momentum * v + (gradient + weight_decay * w); w = w - learning_rate * v, as torch.optim.SGD has it.

        The three are 0-d tensors on the device. torch.optim.SGD itself takes momentum as a Python number, which a
        captured CUDA graph would freeze."""
        weights, velocity, gradient = self.trained
        gradient.addcmul_(weights, weight_decay)
        velocity.mul_(momentum).add_(gradient)
        weights.addcmul_(velocity, learning_rate, value=-1)

    @torch.no_grad()
    def approach(self, other, weight):
        """Go a fraction `weight` of the way to another network's weights and BatchNorm statistics."""
        self.weights.lerp_(other.weights, weight)
        for own, new in zip(self.model.buffers(), other.model.buffers(), strict=True):
            if own.is_floating_point():
                own.lerp_(new, weight)
            else:
                own.copy_(new)


@torch.no_grad()
def copy_tensors(source, target):
    """The parameters and buffers of a model into another one of its kind."""
    for new, old in zip(tensors(source), tensors(target), strict=True):
        old.copy_(new)


def tensors(model):
    return chain(model.parameters(), model.buffers())


class Trainer:
    """One slot: a network, its teacher and the training step. A function of the task alone: nothing carries over.

    A GPU has several, each with its own stream. They take turns within one thread: see `evaluating`."""

    def __init__(self, job):
        """job: its data is copied to the device unless it is there already."""
        self.job, self.device = job, torch.device(job.device)
        taylorglo_ext.load(job.loss_backend, self.device.type)
        self.data = job.data.to(self.device)
        self.network, self.teacher = (Network(job.new_model(seed=0), self.device) for _ in range(2))
        # What is scored, teaches and ends in best.pt: the network itself, or an exponential running mean of its weights
        # over about a generation, in which the noise of a high learning rate averages out.
        self.scored_network = Network(job.new_model(seed=0), self.device) if job.average_weights else self.network
        self.networks = list(dict.fromkeys((self.network, self.scored_network)))
        self.teacher.model.eval()  # paper: unspecified (its mode); it sees the same augmented batch
        self.teacher_path = None
        self.scalars = {name: torch.zeros((), device=self.device)
                        for name in ("learning_rate", "momentum", "weight_decay", "alpha", "loss")}
        self.taylorglo = TaylorGLOLoss(torch.zeros(8), job.add_cross_entropy).to(self.device)
        self._make_buffers(len(self.data.train))
        self.graphs = {}
        self.stream = self.pool = self.random_states = None
        if self.device.type == "cuda":
            self.stream, self.pool = torch.cuda.Stream(self.device), torch.cuda.graph_pool_handle()
            self.generator = torch.Generator(self.device)
            torch.cuda.synchronize(self.device)  # what was made on the default stream is about to be used on another

    def _make_buffers(self, n):
        """On the device for a whole epoch: what its steps read, in order, and how far they have come; and what scoring
        writes."""
        self.batch = min(self.job.batch_size, n)
        self.steps = n // self.batch  # paper: unspecified: images left over wait for the next epoch's order
        integers = dict(dtype=torch.int64, device=self.device)
        self.order = torch.zeros(self.steps * self.batch, **integers)
        self.draws = torch.zeros(self.steps * self.batch, 5, **integers)
        self.position, self.cutout = torch.zeros((), **integers), torch.zeros((), **integers)
        self.correct = torch.zeros(max(len(self.data.validation), len(self.data.test)), dtype=torch.bool,
                                   device=self.device)
        self.finite = torch.ones((), dtype=torch.bool, device=self.device)

    def _set(self, name, value):
        # fill_ would raise for a number beyond float32; copied, it makes a network diverge like any that is too high.
        self.scalars[name].copy_(torch.tensor(value, dtype=torch.float64))

    def evaluate(self, task):
        """Alg. 1, step 3a: train the individual, score it, write it to its file. Returns it, its results filled in."""
        with self.turn():
            return next(filter(None, self.evaluating(task)))

    def evaluating(self, task):
        """The same as a generator: it yields None when another slot may have its turn, and in the end the individual.
        To be advanced within `turn`."""
        individual = task.individual
        rng = random_stream("training", self.job.seed, individual.generation, individual.id)
        seed = int(rng.integers(2**63))
        h = {**self.job.fixed, **individual.hyperparameters}
        step = self._training_step(h, task.teacher is not None)
        # For models with dropout, which draw from the global generators; so does the warm-up before a capture.
        torch.manual_seed(seed)
        seed_numpy_and_python(seed)
        self._set("alpha", task.alpha)
        self._load(task)
        individual.loss = finite_or_none((yield from self._train(step, task, h, rng)))
        yield from self._score(individual)
        save_individual(task.path, individual, torch.cat([n.state for n in self.networks]).cpu().numpy())
        yield individual

    @contextmanager
    def turn(self):
        """Within it, this slot's stream and its states of the global random generators are the current ones."""
        with random_states_kept(), self._on_the_gpu() if self.stream else nullcontext():
            if self.random_states is not None:
                set_random_states(self.random_states)
            yield
            self.random_states = random_states()

    @contextmanager
    def _on_the_gpu(self):
        # A graph reads its random state on the device when it runs: with one state for all slots, one slot would
        # overwrite what another's graph is about to read.
        current = torch.cuda.default_generators[self.stream.device_index]
        before = current.graphsafe_get_state()
        current.graphsafe_set_state(self.generator)
        try:
            with torch.cuda.stream(self.stream):
                yield
        finally:
            current.graphsafe_set_state(before)

    def rehearse(self, count):
        """So many training steps from wherever the weights are, for a measurement. A generator like
        `evaluating`."""
        step = self._training_step(self.job.fixed, distilled=True)
        while count > 0:
            yield from self._steps(step, min(count, self.steps))
            count -= self.steps
        yield True

    def _training_step(self, h, distilled):
        """The training step for the hyperparameters h, which are put in place. To be called before the weights are
        loaded, as a few steps warm up before a graph is captured."""
        self.augmentation = replace(self.data.augmentation, cutout=round(h["cutout"]))
        # What decides in Python which operations a step consists of: each kind is a graph of its own.
        self.distilled, self.loss_is_taylorglo = distilled, "theta0" in h
        kind = distilled, self.loss_is_taylorglo, self.augmentation.cutout > 0
        self.network.model.train()
        step = self._recorded(self._step, kind)
        if self.loss_is_taylorglo:
            theta = scaled_theta(h, self.job.normalize_loss, self.data.num_classes)
            self.taylorglo.theta.copy_(torch.from_numpy(theta))
        for name in ("momentum", "weight_decay"):
            self._set(name, h[name])
        self.cutout.fill_(self.augmentation.cutout)
        return step

    def _recorded(self, step, kind):
        """A step that reads and writes fixed tensors only: as it is, or on a GPU as a CUDA graph of it."""
        if self.stream is None or self.job.no_graphs:
            return step
        if (step.__name__, kind) not in self.graphs:
            for _ in range(WARM_UP):
                self.position.zero_()
                step()
            graph = torch.cuda.CUDAGraph()
            # One pool of memory for all graphs of a slot, since only one of them runs at a time.
            try:
                with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                    step()
            except torch.AcceleratorError as error:  # the end of a capture in which something else was raised
                if out_of_memory(error):
                    raise
                raise RunError(f"model {self.job.model}: its training step cannot be captured as a CUDA graph; use "
                               f"--no-graphs ({message(error.__context__ or error)})") from error
            self.graphs[step.__name__, kind] = graph
        return self.graphs[step.__name__, kind].replay

    def _load(self, task):
        if task.parent is None:
            model = self.job.new_model(int(random_stream("weights", self.job.seed, task.individual.id).integers(2**63)))
            for network in self.networks:
                network.start_afresh(model)
        else:
            states = torch.from_numpy(load_individual(task.parent)[1]).chunk(len(self.networks))
            for network, state in zip(self.networks, states, strict=True):
                network.load(state)
        if task.teacher is not None and task.teacher != self.teacher_path:
            self.teacher.load(scored(load_individual(task.teacher)[1], self.job))
        self.teacher_path = task.teacher

    def _train(self, step, task, h, rng):
        """SGD for one generation, ended by the first epoch whose mean loss is not finite. Returns the mean loss of the last
        epoch trained."""
        loss, first = float("nan"), task.individual.generation * self.job.epochs
        for epoch in range(task.epochs or self.job.epochs):
            # paper: unspecified: the clock is the generation's, also for the child of an old elite.
            self._set("learning_rate", learning_rate(h, first + epoch, self.job))
            loss = yield from self.train_epoch(step, rng)
            if finite_or_none(loss) is None:
                break
        return loss

    def train_epoch(self, step, rng):
        """One pass over the training images, in an order and under augmentations drawn anew. Returns the mean loss."""
        n = len(self.order)
        self.order.copy_(torch.from_numpy(rng.permutation(len(self.data.train))[:n]))
        draws = draw_augmentation(self.augmentation, n, self.data.height, self.data.width, rng)
        self.draws.copy_(torch.from_numpy(draws))
        self.scalars["loss"].zero_()
        yield from self._steps(step, self.steps)
        return self.scalars["loss"].item() / self.steps

    def _steps(self, step, count):
        """So many steps, one after the other; yields between them, and until the device has done them."""
        self.position.zero_()
        for i in range(count):
            if i % STEPS_A_TURN == 0:
                yield
            step()
        if self.stream is not None:
            done = self.stream.record_event()
            while not done.query():
                yield

    def _step(self):
        data, scalars = self.data, self.scalars
        rows = self.position + torch.arange(self.batch, device=self.device)
        self.position += self.batch
        index, draws = self.order[rows], self.draws[rows]
        images = make_batch(data.train.images, index, draws, self.augmentation, data.mean, data.std, self.cutout)
        teacher_logits = None
        if self.distilled:
            with torch.no_grad():
                teacher_logits = self._logits(self.teacher, images)
        loss = self._loss(self._logits(self.network, images), data.train.labels[index], teacher_logits)
        self.network.gradient.zero_()
        loss.backward()
        self.network.sgd_step(scalars["learning_rate"], scalars["momentum"], scalars["weight_decay"])
        scalars["loss"].add_(loss.detach())
        if self.job.average_weights:
            self.scored_network.approach(self.network, 1 / (self.steps * self.job.average_epochs))

    def _logits(self, network, images):
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.job.precision == "bfloat16"):
            return network.model(images).float()

    def _loss(self, logits, labels, teacher_logits):
        """Eq. 2 with Eq. 3 inside; a plain loss where theta is not among the hyperparameters."""
        alpha = None if teacher_logits is None else self.scalars["alpha"]
        if not self.loss_is_taylorglo:
            return PLAIN_LOSSES[self.job.plain_loss](logits, labels, teacher_logits, alpha)
        return self.taylorglo(logits, labels, teacher_logits, alpha)

    def _score(self, individual):
        """Fitness and behaviour on the validation images; the test accuracy is recorded for comparison only."""
        self.scored_network.model.eval()
        validation = yield from self._classified(self.data.validation, "validation")
        state = [x for n in self.networks for x in (n.weights, n.momentum, *n.model.buffers())]
        finite = bool(self.finite) and individual.loss is not None and all(x.isfinite().all() for x in state)
        individual.diverged = not finite
        individual.correct = validation & finite
        individual.fitness = float(individual.correct.mean())
        test = yield from self._classified(self.data.test, "test")
        individual.test_accuracy = float(test.mean())

    def _classified(self, image_set, kind):
        """Which images are classified correctly, NumPy booleans (N,); self.finite: whether all logits were finite."""
        n = len(image_set)
        batches = -(-n // EVALUATION_BATCH)
        batch = -(-n // batches)

        @torch.no_grad()
        def classify():
            rows = (self.position + torch.arange(batch, device=self.device)).clamp(max=n - 1)
            self.position += batch
            images = normalize(image_set.images[rows], self.data.mean, self.data.std)
            logits = self._logits(self.scored_network, images)
            self.correct[rows] = logits.argmax(dim=1) == image_set.labels[rows]
            self.finite &= logits.isfinite().all()

        step = self._recorded(classify, kind)
        self.finite.fill_(True)
        yield from self._steps(step, batches)
        return self.correct[:n].cpu().numpy()


def prepare(job):
    """What a process does once before its first Trainer; returns the job with its data on the device."""
    torch.set_num_threads(job.threads)
    device = torch.device(job.device)
    if device.index is not None:
        torch.cuda.set_device(device)  # or the end of each turn would go back to GPU 0, and take memory there
    if device.type == "cuda" and job.precision == "bfloat16" and torch.cuda.get_device_capability()[0] < 8:
        raise RunError("--precision bfloat16 needs a GPU of compute capability 8.0 or more, not "
                       f"{torch.cuda.get_device_name()}")
    if job.deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # read by a process's first call of cuBLAS
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not job.deterministic
    return replace(job, data=job.data.to(job.device))


def out_of_memory(error):
    """Whether a GPU's memory was too small: cuDNN and CUDA have errors of their own for it."""
    return isinstance(error, RuntimeError) and (isinstance(error, torch.OutOfMemoryError) or any(
        words in str(error) for words in ("out of memory", "unable to find an engine", "ALLOC_FAILED")))


def learning_rate(h, epoch, job):
    """The rate in an epoch of the whole run: learning_rate * scale / decay^(milestones passed), Sec. 4.1."""
    passed = sum(epoch >= round(fraction * job.generations * job.epochs) for fraction in job.milestones)
    return job.learning_rate * h["lr_scale"] / h["lr_decay"] ** passed


def scaled_theta(h, normalize_loss, num_classes):
    """theta as the loss takes it. With normalize_loss (not in the paper), Eq. 2 is multiplied by the factor that
    makes its first step as large as that of cross-entropy.

    At the uniform prediction y = 1/n, dL/dz of the true class is -(1/n) y (1 - y) first_step(theta), and that of
    cross-entropy is -(1 - y). The sign stays, and the floor keeps a loss that hardly moves from exploding."""
    theta = np.array([h[f"theta{i}"] for i in range(8)])
    if normalize_loss:
        theta[2:] *= num_classes**2 / max(abs(first_step(theta, num_classes)), 1e-2)
    return theta


def scored(state, job):
    """The part of an individual's state that was scored: the last of its networks'."""
    return torch.from_numpy(state).chunk(1 + job.average_weights)[-1]


def load_state(job, state):
    """The model whose flat state this is, in plain contiguous tensors, on the CPU and in evaluation mode."""
    network, model = Network(job.new_model(seed=0), "cpu"), job.new_model(seed=0)
    network.load(scored(state, job))
    copy_tensors(network.model, model)
    return model.eval()


def mismatch(name, num_classes, shape, batch_size):
    """One line that says why a model cannot be trained on batches of images of `shape` (channels, height, width), or None:
    up to two images are sent forward in both of its modes, and backward in training mode."""
    try:
        model, other = (make_model(name, num_classes, shape[0], seed) for seed in (0, 1))
        if error := unfit(model, other):
            return f"model {name}: {error}"
        Network(model, "cpu").start_afresh(other)
        for module in model.modules():
            if isinstance(module, torch.nn.GroupNorm):
                module.register_forward_pre_hook(refuse_constant_input)
        buffers, n = dict(model.named_buffers()), min(2, batch_size)
        for training in (False, True):
            with random_states_kept():
                logits = model.train(training)(torch.zeros(n, *shape).to(memory_format=torch.channels_last))
            found = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
            if found != (n, num_classes):
                return (f"model {name}: for {n} images of {num_classes} classes it must return a tensor {n, num_classes}, "
                        f"not {found}")
        logits.sum().backward()
        if replaced := [key for key, buffer in model.named_buffers() if buffers.get(key) is not buffer]:
            return (f"model {name}: its forward() replaces the buffer {replaced[0]}, so that no child would inherit it; it "
                    "must fill it, as with copy_()")
    except Exception as error:  # whatever the user's model raises
        return (f"model {name}: it cannot be trained on batches of {batch_size} images of {' x '.join(map(str, shape))} "
                f"(channels, height, width): {type(error).__name__}: {message(error)}")
    return None


def refuse_constant_input(norm, inputs):
    """PyTorch 2.11 dies without a word in the gradient of a GroupNorm whose input is channels last and needs none."""
    if norm.affine and norm.weight.requires_grad and not inputs[0].requires_grad:
        raise ValueError("PyTorch crashes on a GroupNorm whose input needs no gradient; freeze it too, or train a layer "
                         "before it")


def unfit(model, other):
    """What speaks against a model before it has seen an image, or None. other: the same from another seed."""
    for p in model.parameters():
        if isinstance(p, torch.nn.parameter.UninitializedParameter):
            return "it has lazy layers, whose sizes must be given"
        if p.dtype != torch.float32:
            return f"its parameters must be float32, not {p.dtype}"
    if {id(t) for t in tensors(model)} & {id(t) for t in tensors(other)}:
        return "its factory must make every parameter and buffer anew in each call, and two of its models share some"
    kept, others = model.state_dict(), dict(other.named_buffers())
    for name, buffer in model.named_buffers():
        if name not in kept and not torch.equal(buffer, others[name]):
            return f"its buffer {name} is drawn at random, so it must be in the state_dict (persistent=True)"
    return None
