"""Train one individual for one generation, then score it: Sec. 3.2, step 3, and Sec. 3.5.

Read from the top: `Trainer.evaluate` is one evaluation, `train` its epochs, `step` one SGD step,
`score` the fitness. The result depends only on the task, not on earlier tasks.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from augmentation import draw_augmentation, make_batch, normalize
from data import ImageSet
from evolution import random_stream
from metrics import METRICS, measured
from models import make_model, random_states_kept, seed_numpy_and_python
from network import Network, all_finite, load_tensors
from records import Individual, finite_or_none, load_individual, save_individual
from settings import settings
from taylorglo_ext import PLAIN_LOSSES, TaylorGLOLoss, loss_and_gradient

EVALUATION_BATCH = 500  # images, at most
# What training applies; Config.fixed has the values that are not evolved.
HYPERPARAMETERS = (*(f"theta{i}" for i in range(8)), "lr_scale", "lr_decay", "momentum",
                   "weight_decay", "cutout")


@dataclass
class Task:
    """One evaluation. The paths are those of individuals' files."""

    individual: Individual
    path: Path  # for the result
    parent: Path | None = None  # whose weights it starts from; None: new ones
    teacher: Path | None = None
    alpha: float = 0.0  # of Eq. 3


class Trainer:
    """Trains and scores individuals one after the other, each with a new model."""

    def __init__(self, config, data):
        """config: with nothing left at "auto". data: on config.device."""
        self.config, self.data, self.device = config, data, torch.device(config.device)
        n = len(data.train)
        self.batch = min(config.batch_size, n)
        self.steps = n // self.batch  # paper: unspecified: the images left over wait
        # A CUDA graph (slots.py) keeps the addresses of these tensors: steps change them in place.
        integers = dict(dtype=torch.int64, device=self.device)
        self.position = torch.zeros((), **integers)  # where in `order` the next batch begins
        self.order = torch.zeros(self.steps * self.batch, **integers)  # of the epoch's images
        self.draws = torch.zeros(self.steps * self.batch, 5, **integers)  # see draw_augmentation
        self.cutout = torch.zeros((), **integers)
        self.alpha, self.total_loss = (torch.zeros((), device=self.device) for _ in range(2))
        self.sgd_settings = torch.zeros(3, device=self.device)  # rate, momentum, weight decay
        self.taylorglo = TaylorGLOLoss(torch.zeros(8), config.add_cross_entropy).to(self.device)
        self.validation, self.test = (Classifier(self, s) for s in (data.validation, data.test))
        self.mislabelled = None
        labels, clean = data.train.labels, data.clean_labels
        if clean is not None and (wrong := labels != clean).any():
            inner = slice(data.augmentation.shift, -data.augmentation.shift or None)
            images = data.train.images[wrong][:, :, inner, inner]  # without the border of zeros
            self.mislabelled = Classifier(self, ImageSet(images, labels[wrong]))

    def evaluate(self, task):
        """Alg. 1, step 3a: train the individual, score it, write its file, return it."""
        individual, config = task.individual, self.config
        rng = random_stream("training", config.seed, individual.generation, individual.id)
        with random_states_kept():
            h = config.fixed(self.data.augmentation.cutout) | individual.hyperparameters
            self.set_hyperparameters(h, task)
            self.load(task)
            seed = int(rng.integers(2**63))  # of the global generators, which dropout draws from
            torch.manual_seed(seed)
            seed_numpy_and_python(seed)
            self.train(individual, rng)
            state = {name: t.to("cpu", copy=True).contiguous()
                     for name, t in self.network.tensors().items()}
            self.score(individual, state)
        save_individual(task.path, individual, state)
        return individual

    def set_hyperparameters(self, h, task):
        """Set what the steps of a task apply. h: {name: value}; theta only if it is evolved."""
        self.h, self.distilled, self.has_theta = h, task.teacher is not None, "theta0" in h
        self.augmentation = replace(self.data.augmentation, cutout=round(h["cutout"]))
        self.cutout.fill_(self.augmentation.cutout)
        self.alpha.fill_(task.alpha)
        theta = [float(h[f"theta{i}"]) for i in range(8)] if self.has_theta else None
        if self.has_theta:
            self.taylorglo.theta.copy_(torch.tensor(theta, dtype=torch.float64))
        task.individual.applied = dict(
            learning_rate=[], theta=theta, momentum=h["momentum"], weight_decay=h["weight_decay"],
            cutout=self.augmentation.cutout, alpha=task.alpha)

    def load(self, task):
        """Make the individual's network, with its parent's state, and its teacher."""
        seed = int(random_stream("weights", self.config.seed, task.individual.id).integers(2**63))
        self.make_networks(seed)
        if task.parent is not None:
            load_tensors(self.network.tensors(), load_individual(task.parent)[1])
        if task.teacher is not None:
            self.teacher.load_model(load_individual(task.teacher)[1])

    def make_networks(self, seed):
        """Make a new model for each role: a used one may keep more than its tensors."""
        self.network, self.scored = self.new_network(seed), self.new_network(seed)
        self.network.model.train()
        self.scored.model.eval()
        self.teacher = self.new_network(seed) if self.distilled else None
        if self.teacher:
            self.teacher.model.eval()  # paper: unspecified: its mode

    def new_network(self, seed):
        model = make_model(self.config.model, self.data.num_classes, self.data.channels, seed)
        averaged = self.config.average_weights > 0
        return Network(model, self.device, self.config.layout, averaged)

    def train(self, individual, rng):
        """SGD for one generation. It ends after the first epoch whose mean loss is not finite."""
        for epoch in range(self.config.epochs):
            # paper: unspecified: the clock is the generation's, also for the child of an old elite.
            clock = individual.generation * self.config.epochs + epoch
            rate = learning_rate(self.h, clock, self.config)
            individual.applied["learning_rate"].append(rate)
            # A rate beyond float32 becomes infinite, and the network diverges.
            now = rate, self.h["momentum"], self.h["weight_decay"]
            self.sgd_settings.copy_(torch.tensor(now, dtype=torch.float64))
            individual.loss = finite_or_none(self.train_epoch(rng))
            if individual.loss is None:
                break

    def train_epoch(self, rng):
        """Train on the images in a new order, newly augmented. Returns the mean loss."""
        n = len(self.order)
        self.order.copy_(torch.from_numpy(rng.permutation(len(self.data.train))[:n]))
        draws = draw_augmentation(self.augmentation, n, self.data.height, self.data.width, rng)
        self.draws.copy_(torch.from_numpy(draws))
        self.total_loss.zero_()
        self.repeat(self.step, self.steps)
        return self.total_loss.item() / self.steps

    def repeat(self, step, count):
        """Call `step` so many times, from the first batch on."""
        self.position.zero_()
        for _ in range(count):
            step()

    def next_rows(self, batch):
        """The positions of the next batch, (batch,) int64."""
        rows = self.position + torch.arange(batch, device=self.device)
        self.position += batch
        return rows

    def step(self):
        """One step of SGD on the next batch."""
        data, rows = self.data, self.next_rows(self.batch)
        index, draws = self.order[rows], self.draws[rows]
        images = self.laid_out(make_batch(data.train.images, index, draws, self.augmentation,
                                          data.mean, data.std, self.cutout))
        teacher_logits = None
        if self.distilled:
            with torch.no_grad():  # on a copy: a model may change its input in place
                teacher_logits = self.logits(self.teacher.model, images.clone())
        logits = self.logits(self.network.model, images)
        for p in self.network.model.parameters():
            p.grad = None
        loss = self.backward(logits, data.train.labels[index], teacher_logits)
        self.sgd()
        self.total_loss.add_(loss.detach())
        if span := self.config.average_weights:  # in generations
            self.network.move_average(min(1, 1 / (self.steps * self.config.epochs * span)))

    def laid_out(self, images):
        """The images in the memory layout of config.layout, from channels last."""
        if self.config.layout == "channels-last":
            return images
        # contiguous() would leave images of one channel with the strides of channels last.
        return images.clone(memory_format=torch.contiguous_format)

    def logits(self, model, images):
        """A model's logits for a batch: (B, classes), float32."""
        bfloat16 = self.config.precision == "bfloat16"
        # PyTorch would keep the cache of cast weights until the autocast in settings.py ends.
        with torch.autocast(self.device.type, torch.bfloat16, bfloat16, cache_enabled=False):
            logits = model(images)
        wanted = len(images), self.data.num_classes
        found = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        if found != wanted:
            raise ValueError(f"for {wanted[0]} images of {wanted[1]} classes the model must return "
                             f"a tensor {wanted}, not {found}")
        return logits.float()

    def backward(self, logits, labels, teacher_logits):
        """Compute the gradients of the loss, and return it: Eq. 2 with the labels of Eq. 3, or a
        plain loss if there is no theta."""
        alpha = None if teacher_logits is None else self.alpha
        if self.has_theta and not self.config.add_cross_entropy:
            loss, gradient = loss_and_gradient(logits, labels, self.taylorglo.theta, teacher_logits,
                                               alpha)
            KnownGradient.apply(logits, loss, gradient).backward()
        else:
            loss = self.taylorglo if self.has_theta else PLAIN_LOSSES[self.config.plain_loss]
            loss = loss(logits, labels, teacher_logits, alpha)
            loss.backward()
        return loss

    @torch.no_grad()
    def sgd(self):
        """v = momentum v + gradient + decay w; w = w - rate v.

        As torch.optim.SGD, which takes the momentum as a Python number: a CUDA graph would freeze
        it."""
        buffers = self.network.momentum
        trained = [(p, p.grad, buffers[name])
                   for name, p in self.network.model.named_parameters() if p.grad is not None]
        weights, gradients, velocities = map(list, zip(*trained, strict=True))
        rate, momentum, decay = self.sgd_settings.unbind()
        if self.h["weight_decay"] > 0:
            gradients = torch._foreach_add(gradients, torch._foreach_mul(weights, decay))
        torch._foreach_mul_(velocities, momentum)
        torch._foreach_add_(velocities, gradients)
        torch._foreach_sub_(weights, torch._foreach_mul(velocities, rate))

    def score(self, individual, state):
        """Set fitness and behaviour from the validation images. The test accuracy is only for
        comparison. The scored model gets its tensors from the state, as the delivered one will."""
        self.scored.load_model(state)
        logits, metric = self.validation.logits(), self.config.fitness
        finite = individual.loss is not None and np.isfinite(logits).all() and all_finite(state)
        individual.diverged = not finite
        individual.correct = (logits.argmax(1) == self.validation.labels) & finite
        individual.fitness = self.validation.measured(logits, metric) if finite else 0.0
        test = self.test.logits()
        individual.test_accuracy = self.test.measured(test, "accuracy")
        if metric != "accuracy":
            individual.scores.update(validation_accuracy=float(individual.correct.mean()),
                                     test_fitness=self.test.measured(test, metric))
        if self.mislabelled:  # the share of the wrong labels that the network has learned
            learned = self.mislabelled.measured(self.mislabelled.logits(), "accuracy")
            individual.scores["memorised"] = learned


class KnownGradient(torch.autograd.Function):
    """A loss whose gradient is known. logits.backward(gradient) would import sympy: a second."""

    @staticmethod
    def forward(ctx, logits, loss, gradient):
        ctx.gradient = gradient
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx, one):
        return ctx.gradient, None, None


class Classifier:
    """Classifies a set of images by a trainer's scored model, in batches of equal size."""

    def __init__(self, trainer, image_set):
        self.trainer, self.image_set, n = trainer, image_set, len(image_set)
        self.labels = image_set.labels.numpy(force=True)
        self.batches = -(-n // EVALUATION_BATCH)
        self.batch = -(-n // self.batches)
        self.filled = torch.zeros(n, trainer.data.num_classes, device=trainer.device)

    @torch.no_grad()
    def step(self):
        trainer, images = self.trainer, self.image_set.images
        rows = trainer.next_rows(self.batch).clamp(max=len(images) - 1)
        batch = trainer.laid_out(normalize(images[rows], trainer.data.mean, trainer.data.std))
        self.filled[rows] = trainer.logits(trainer.scored.model, batch)

    def logits(self):
        """The logits of all images: a NumPy array (N, classes), float32."""
        self.trainer.repeat(self.step, self.batches)
        return self.filled.numpy(force=True)

    def measured(self, logits, name):
        """A metric of these logits. A user's metric is 0 if a logit is not finite."""
        if name not in METRICS and not np.isfinite(logits).all():
            return 0.0
        return measured(name, *map(torch.from_numpy, (logits, self.labels)))


def all_metrics(config, data, model):
    """{name: value} of every metric, and of the config's, for a model on the test images."""
    with settings(config):
        trainer = Trainer(config, data.to(config.device))
        model.eval()
        trainer.scored = Network(model, trainer.device, config.layout)
        logits = trainer.test.logits()
        model.cpu()
        return {name: trainer.test.measured(logits, name)
                for name in dict.fromkeys([*METRICS, config.fitness])}


def learning_rate(h, epoch, config):
    """Sec. 4.1: learning_rate * scale / decay^(milestones passed) in an epoch of the run."""
    epochs = config.generations * config.epochs
    passed = sum(epoch >= round(share * epochs) for share in config.milestones)
    return config.learning_rate * h["lr_scale"] / h["lr_decay"] ** passed
