"""Train one individual for one generation, then score it: Sec. 3.2, step 3 and Sec. 3.5.

Everything that changes between individuals (weights, momentum buffers, learning rate, theta, alpha, batch indices,
augmentation draws) is a tensor that is filled, never replaced, so that one training step serves them all.
"""

from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import taylorglo_ext
from data import Data, draw_augmentation, make_batch, normalize
from evolution import first_step, random_stream
from models import make_model
from records import Individual, finite_or_none, load_individual, save_individual
from taylorglo_ext import taylorglo_loss

EVALUATION_BATCH = 500
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
    normalize_loss: bool  # see scaled_theta
    add_cross_entropy: bool  # to Eq. 2: not in the paper
    loss_backend: str
    precision: str  # of the networks' activations; weights, BatchNorm statistics and the loss stay in float32
    threads: int
    device: str


@dataclass
class Task:
    """One evaluation: who, from whose weights, under which teacher, and where the result goes."""

    individual: Individual
    path: Path
    parent: Path | None
    teacher: Path | None
    alpha: float


class Network:
    """A model whose weights, momentum and buffers lie in one flat vector, `state`: uint8 (bytes,).

    Loading an individual is one copy, an SGD step is three operations however many layers there are, and what a
    child inherits is whole: weights, momentum buffers and BatchNorm statistics.
    """

    def __init__(self, model, device):
        self.model = model.to(device, memory_format=torch.channels_last)
        parameters, buffers = list(model.parameters()), dict(model.named_buffers())
        n = sum(p.numel() for p in parameters)
        sizes = [-(-b.numel() * b.element_size() // 8) * 8 for b in buffers.values()]  # each starts at 8 bytes
        self.state = torch.zeros(8 * n + sum(sizes), dtype=torch.uint8, device=device)
        learned, *rest = self.state.split([8 * n, *sizes])
        self.weights, self.momentum = learned.view(torch.float32).chunk(2)
        self.gradient = torch.zeros_like(self.weights)
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
        """A view of flat that is laid out as p is."""
        return flat.as_strided(p.shape, p.stride(), flat.storage_offset() + offset)

    @torch.no_grad()
    def start_afresh(self, model):
        """Take the weights and buffers of a new model; the momentum is zero."""
        for own, new in zip(chain(self.model.parameters(), self.model.buffers()),
                            chain(model.parameters(), model.buffers()), strict=True):
            own.copy_(new)
        self.momentum.zero_()

    @torch.no_grad()
    def sgd_step(self, learning_rate, momentum, weight_decay):
        """v = momentum * v + (gradient + weight_decay * w); w = w - learning_rate * v, as torch.optim.SGD has it.

        The three are 0-d tensors on the device. torch.optim.SGD itself takes momentum as a Python number, which a
        captured CUDA graph would freeze."""
        self.gradient.addcmul_(self.weights, weight_decay)
        self.momentum.mul_(momentum).add_(self.gradient)
        self.weights.addcmul_(self.momentum, learning_rate, value=-1)


class Trainer:
    """One worker's network, data and training step. A function of the task alone: nothing carries over."""

    def __init__(self, job):
        self.job, self.device = job, torch.device(job.device)
        taylorglo_ext.load(job.loss_backend, self.device.type)
        self.data = job.data.to(self.device)
        self.network, self.teacher = (Network(self._new_model(seed=0), self.device) for _ in range(2))
        self.teacher.model.eval()
        self.teacher_path = None
        self.scalars = {name: torch.zeros((), device=self.device)
                        for name in ("learning_rate", "momentum", "weight_decay", "alpha", "loss")}
        self.theta = torch.zeros(8, device=self.device)

    def _new_model(self, seed):
        return make_model(self.job.model, self.data.num_classes, self.data.channels, seed)

    def evaluate(self, task):
        """Alg. 1, step 3a: train the individual, score it, write it to its file. Returns it, its results filled in."""
        individual = task.individual
        rng = random_stream("training", self.job.seed, individual.generation, individual.id)
        # Models with dropout draw from PyTorch's generators: seeded here, restored afterwards.
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(int(rng.integers(2**63)))
            self._load(task)
            individual.loss = finite_or_none(self._train(individual, rng))
            self._score(individual)
        save_individual(task.path, individual, self.network.state.cpu().numpy())
        return individual

    def _load(self, task):
        if task.parent is None:
            seed = int(random_stream("weights", self.job.seed, task.individual.id).integers(2**63))
            self.network.start_afresh(self._new_model(seed))
        else:
            self.network.state.copy_(torch.from_numpy(load_individual(task.parent)[1]))
        if task.teacher is not None and task.teacher != self.teacher_path:
            self.teacher.state.copy_(torch.from_numpy(load_individual(task.teacher)[1]))
        self.teacher_path = task.teacher
        self.scalars["alpha"].fill_(task.alpha)

    def _train(self, individual, rng):
        """SGD for one generation; returns the mean loss of the last epoch, as soon as it is not finite."""
        h = {**self.job.fixed, **individual.hyperparameters}
        self.loss_is_taylorglo = "theta0" in h
        if self.loss_is_taylorglo:
            self.theta.copy_(torch.from_numpy(scaled_theta(h, self.job)))
        self.scalars["momentum"].fill_(h["momentum"])
        self.scalars["weight_decay"].fill_(h["weight_decay"])
        self.augmentation = replace(self.data.augmentation, cutout=round(h["cutout"]))
        self.network.model.train()
        loss = float("nan")
        for epoch in range(self.job.epochs):
            # paper: unspecified: the clock is the generation's, also for the child of an old elite.
            rate = learning_rate(h, individual.generation * self.job.epochs + epoch, self.job)
            # Copied, since fill_ raises for a rate beyond float32; this one diverges like any that is too high.
            self.scalars["learning_rate"].copy_(torch.tensor(rate, dtype=torch.float64))
            loss = self._epoch(rng)
            if finite_or_none(loss) is None:
                break
        return loss

    def _epoch(self, rng):
        """One pass over the training images, in an order and under augmentations drawn anew. Returns the mean loss."""
        n = len(self.data.train.labels)
        batch = min(self.job.batch_size, n)
        steps = n // batch  # paper: unspecified: images left over wait for the next epoch's order
        order = torch.from_numpy(rng.permutation(n)[: steps * batch]).to(self.device)
        draws = draw_augmentation(self.augmentation, steps * batch, self.data.height, self.data.width, rng)
        draws = torch.from_numpy(draws).to(self.device)
        self.scalars["loss"].zero_()
        for index, draw in zip(order.split(batch), draws.split(batch), strict=True):
            self._step(index, draw)
        return self.scalars["loss"].item() / steps

    def _step(self, index, draws):
        data, scalars = self.data, self.scalars
        images = make_batch(data.train.images, index, draws, self.augmentation, data.mean, data.std)
        teacher_logits = None
        if self.teacher_path is not None:
            with torch.no_grad():
                teacher_logits = self._logits(self.teacher, images)
        loss = self._loss(self._logits(self.network, images), data.train.labels[index], teacher_logits)
        self.network.gradient.zero_()
        loss.backward()
        self.network.sgd_step(scalars["learning_rate"], scalars["momentum"], scalars["weight_decay"])
        scalars["loss"].add_(loss.detach())

    def _logits(self, network, images):
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.job.precision == "bfloat16"):
            return network.model(images).float()

    def _loss(self, logits, labels, teacher_logits):
        """Eq. 2 with Eq. 3 inside, or cross-entropy where theta is not among the hyperparameters, or their sum."""
        alpha = None if teacher_logits is None else self.scalars["alpha"]
        loss = 0
        if self.loss_is_taylorglo:
            loss = taylorglo_loss(logits, labels, self.theta, teacher_logits, alpha)
            if not self.job.add_cross_entropy:
                return loss
        if teacher_logits is None:
            return loss + F.cross_entropy(logits, labels)
        one_hot = F.one_hot(labels, logits.shape[1])
        return loss + F.cross_entropy(logits, alpha * teacher_logits.softmax(dim=1) + (1 - alpha) * one_hot)  # Eq. 3

    def _score(self, individual):
        """Fitness and behaviour on the validation images; the test accuracy is recorded for comparison only."""
        self.network.model.eval()
        validation, finite = self._correct(self.data.validation)
        state = [self.network.momentum, *self.network.model.state_dict().values()]
        finite = finite and individual.loss is not None and all(tensor.isfinite().all() for tensor in state)
        individual.diverged = not finite
        individual.correct = validation & (not individual.diverged)
        individual.fitness = float(individual.correct.mean())
        individual.test_accuracy = float(self._correct(self.data.test)[0].mean())

    @torch.no_grad()
    def _correct(self, image_set):
        """Which images are classified correctly, NumPy booleans (N,), and whether all logits were finite."""
        correct, finite = [], torch.ones((), dtype=torch.bool, device=self.device)
        for images, labels in zip(image_set.images.split(EVALUATION_BATCH), image_set.labels.split(EVALUATION_BATCH),
                                  strict=True):
            logits = self._logits(self.network, normalize(images, self.data.mean, self.data.std))
            correct.append(logits.argmax(dim=1) == labels)
            finite &= logits.isfinite().all()
        return torch.cat(correct).cpu().numpy(), bool(finite)


def learning_rate(h, epoch, job):
    """The rate in an epoch of the whole run: learning_rate * scale / decay^(milestones passed), Sec. 4.1."""
    passed = sum(epoch >= round(fraction * job.generations * job.epochs) for fraction in job.milestones)
    return job.learning_rate * h["lr_scale"] / h["lr_decay"] ** passed


def scaled_theta(h, job):
    """theta as the loss takes it. With job.normalize_loss (not in the paper), Eq. 2 is multiplied by the factor that
    makes its first step as large as that of cross-entropy.

    At the uniform prediction y = 1/n, dL/dz of the true class is -(1/n) y (1 - y) first_step(theta), and that of
    cross-entropy is -(1 - y). The sign stays, and the floor keeps a loss that hardly moves from exploding."""
    theta = np.array([h[f"theta{i}"] for i in range(8)])
    if job.normalize_loss:
        classes = job.data.num_classes
        theta[2:] *= classes**2 / max(abs(first_step(theta, classes)), 1e-2)
    return theta


def load_state(job, state):
    """The model whose flat state this is, in plain contiguous tensors, on the CPU and in evaluation mode."""
    network = Network(make_model(job.model, job.data.num_classes, job.data.channels, seed=0), "cpu")
    network.state.copy_(torch.from_numpy(state))
    model = make_model(job.model, job.data.num_classes, job.data.channels, seed=0)
    model.load_state_dict(network.model.state_dict())
    return model.eval()
