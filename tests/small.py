"""A small network, tiny tasks for it, and a plain training loop, for the tests of training, of
slots and of people's own models."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from augmentation import Augmentation, draw_augmentation, make_batch
from config import Config
from data import make_data
from evolution import random_stream, search_space
from models import make_model
from network import model_tensors
from records import Individual, load_individual
from taylorglo_ext.reference import reference_loss
from training import Task, Trainer, learning_rate

SEARCH_SPACE = search_space()  # the paper's
CROSS_ENTROPY = {}  # nothing is evolved
# f = 10 x y: the loss is minus the likelihood.
TAYLORGLO = {f"theta{i}": 10.0 if i == 5 else 0.0 for i in range(8)}
EVOLVED = TAYLORGLO | {"lr_scale": 2.0, "lr_decay": 3.0, "momentum": 0.5, "weight_decay": 0.1,
                       "cutout": 3.4}


class Small(nn.Module):
    """A convolution, BatchNorm with its integer counter, and a linear layer. `seen` are (training,
    images, dtype of the logits) of each forward pass of all its kind."""

    seen = []

    def __init__(self, num_classes, in_channels):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8 * 16, num_classes)

    def features(self, x):
        return F.avg_pool2d(F.relu(self.bn(self.conv(x))), 2).flatten(1)

    def forward(self, x):
        logits = self.fc(self.features(x))
        Small.seen.append((self.training, x.clone(), logits.dtype))
        return logits


def small(**buffers):
    """Make of a function of (model, images) a Small with these buffers that calls it before each
    pass; what the function returns multiplies the features."""
    def make(act):
        class Made(Small):
            def __init__(self, num_classes, in_channels):
                super().__init__(num_classes, in_channels)
                for name, value in buffers.items():
                    self.register_buffer(name, value.clone())

            def features(self, x):
                factor = act(self, x)
                return super().features(x) * (1 if factor is None else factor)

        Made.__module__, Made.__name__, Made.__qualname__ = act.__module__, *2 * [act.__name__]
        return Made
    return make


# Tiny tasks.


def stripes(n, seed):
    """Grey noise with a bright stripe whose place is the class, one of three: (n, 1, 8, 8) uint8
    and labels."""
    r = np.random.default_rng(seed)
    images, labels = r.integers(0, 100, (n, 1, 8, 8)), r.permutation(n) % 3
    for image, label in zip(images, labels, strict=True):
        image[0, 2 * label + 1] += 100
    return images.astype(np.uint8), labels


def data(test=None, **given):
    augmentation = Augmentation(flip=True, shift=1, cutout=2)
    given = {"validation": 24, "augmentation": augmentation, **given}
    return make_data(stripes(96, 0), test or stripes(30, 1), **given)  # 72 train, 24 validate


def configured(model="Small", **given):
    tiny = dict(preset="known", seed=1, generations=4, epochs=2, batch_size=36, milestones=(3 / 8,),
                device="cpu", loss_backend="reference", layout="channels-last", threads=1)
    model = f"test_training:{model}" if model[0].isupper() else model  # else it has its module
    return Config(model=model, **tiny | given)


def trainer_of(model="Small", images=None, **given):
    return Trainer(configured(model, **given), images or data())


def task(folder, id=0, h=CROSS_ENTROPY, generation=0, parent=None, teacher=None, alpha=0.0):
    """parent, teacher: ids of individuals in the same folder."""
    path = [None if i is None else folder / f"{i}.safetensors" for i in (id, parent, teacher)]
    return Task(Individual(id, generation, dict(h)), *path, alpha)


def outcome(trainer, task):
    """All that an evaluation results in: the individual's record, its behaviour, and its file."""
    individual = trainer.evaluate(copy.deepcopy(task))
    stored, _ = load_individual(task.path)
    assert stored.record() == individual.record() and (stored.correct == individual.correct).all()
    return individual.record(), individual.correct.tolist(), task.path.read_bytes()


def state_of(task):
    return load_individual(task.path)[1]


def named(model):
    return dict(model.named_parameters()) | dict(model.named_buffers())


def model_with(trainer, state):
    """A new model in evaluation mode with the tensors of a state that are scored."""
    model = make_model(trainer.config.model, trainer.data.num_classes, trainer.data.channels, 9)
    tensors = model_tensors(state)
    assert {f"model/{name}" for name in named(model)} == tensors.keys()
    for name, t in named(model).items():
        t.data.copy_(tensors[f"model/{name}"])
    model.eval()
    return model


def by_hand(trainer, task):
    """The state that an evaluation should end with, from a plain loop of torch.optim.SGD."""
    c, d, who = trainer.config, trainer.data, task.individual
    h = c.fixed(d.augmentation.cutout) | who.hyperparameters
    seed = int(random_stream("weights", c.seed, who.id).integers(2**63))
    model = make_model(c.model, d.num_classes, d.channels, seed)
    momentum = h["momentum"] or 1e-30  # of 0, torch would keep no velocity
    sgd = torch.optim.SGD(model.parameters(), 1.0, momentum, weight_decay=h["weight_decay"])
    parent = {} if task.parent is None else load_individual(task.parent)[1]
    for name, t in named(model).items():
        t.data.copy_(parent.get(f"model/{name}", t))
    mean = {name: parent.get(f"average/{name}", t.detach().clone())
            for name, t in named(model).items()}
    momenta = {name: parent.get(f"momentum/{name}", torch.zeros_like(p))
               for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        sgd.state[p]["momentum_buffer"] = momenta[name]
    teacher = task.teacher and model_with(trainer, load_individual(task.teacher)[1])
    rng = random_stream("training", c.seed, who.generation, who.id)
    torch.manual_seed(int(rng.integers(2**63)))
    augmentation = replace(d.augmentation, cutout=round(h["cutout"]))
    size = min(c.batch_size, len(d.train))
    steps = len(d.train) // size
    for epoch in range(c.epochs):
        sgd.param_groups[0]["lr"] = learning_rate(h, who.generation * c.epochs + epoch, c)
        order = rng.permutation(len(d.train))[:steps * size].reshape(steps, size)
        draws = draw_augmentation(augmentation, steps * size, 8, 8, rng).reshape(steps, size, 5)
        for rows, drawn in zip(torch.from_numpy(order), torch.from_numpy(draws), strict=True):
            x = make_batch(d.train.images, rows, drawn, augmentation, d.mean, d.std)
            with torch.autocast("cpu", torch.bfloat16, enabled=c.precision == "bfloat16"):
                lesson = teacher and teacher(x).detach().float()
                logits = model(x).float()
            sgd.zero_grad()
            loss_of(logits, d.train.labels[rows], lesson, task.alpha, h, c).backward()
            sgd.step()
            for name, t in named(model).items() if c.average_weights else ():
                weight = min(1, 1 / (steps * c.epochs * c.average_weights))
                mean[name] = mean[name].lerp(t.detach(), weight) if t.is_floating_point() else +t
    averaged = mean if c.average_weights else {}
    parts = {"model": named(model), "momentum": momenta, "average": averaged}
    return {f"{kind}/{name}": t for kind, some in parts.items() for name, t in some.items()}


def loss_of(logits, labels, lesson, alpha, h, config):
    x = F.one_hot(labels, 3).float()
    if lesson is not None:
        x = alpha * lesson.softmax(1) + (1 - alpha) * x  # Eq. 3
    cross_entropy = -(x * logits.log_softmax(1)).sum(1).mean()
    if "theta0" not in h:
        return cross_entropy
    theta = torch.tensor([h[f"theta{i}"] for i in range(8)])
    taught = (None, None) if lesson is None else (lesson, torch.tensor(alpha))
    return config.add_cross_entropy * cross_entropy + reference_loss(logits, labels, theta, *taught)


# For a test that takes the fixture gpu and needs what the emulated one has not: graphs, cuDNN.
only_on_a_gpu = pytest.mark.parametrize(
    "gpu", [pytest.param("cuda", marks=pytest.mark.cuda)], indirect=True)


def captured(step):
    """A CUDA graph of a step, and what the step returned while it was captured."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        return graph, step()


def assert_close(state, expected, **tolerance):
    assert state.keys() == expected.keys()
    for name, t in state.items():
        torch.testing.assert_close(t, expected[name], msg=lambda text, n=name: f"{n}: {text}",
                                   **tolerance)
