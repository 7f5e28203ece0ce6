"""Training and scoring one individual, against torch.optim.SGD, hand computation and slow recounts."""

import copy
import math
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import training
from config import PROTOCOLS, Config
from data import Augmentation, make_data
from epbt import make_job
from models import make_model
from records import Individual, load_individual
from taylorglo_ext import PLAIN_LOSSES
from taylorglo_ext.reference import reference_loss
from training import Network, Task, Trainer, learning_rate, load_state, prepare, scaled_theta
from workers import finished

CROSS_ENTROPY = {}  # nothing is evolved
TAYLORGLO = {f"theta{i}": 10.0 if i == 5 else 0.0 for i in range(8)}  # f = 10 x y: the loss is minus the likelihood


pytestmark = pytest.mark.usefixtures("one_thread")


# Models, found by the name test_training:NAME.


class Small(nn.Module):
    """A convolution, BatchNorm with its integer counter, and a linear layer."""

    def __init__(self, num_classes, in_channels):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8 * 16, num_classes)

    def features(self, x):
        return F.avg_pool2d(F.relu(self.bn(self.conv(x))), 2).flatten(1)

    def forward(self, x):
        return self.fc(self.features(x))


class Whimsical(Small):
    """With dropout, and a buffer outside its state_dict that steers it."""

    def __init__(self, num_classes, in_channels):
        super().__init__(num_classes, in_channels)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int32), persistent=False)

    def forward(self, x):
        if self.training:
            self.steps += 1
        return self.fc(F.dropout(self.features(x), 0.3, self.training)) * (1 + self.steps)


class Sliced(nn.Sequential):
    """A weight with gaps in its memory, before another one."""

    def __init__(self, num_classes, in_channels):
        super().__init__(nn.Flatten(), nn.Linear(64 * in_channels, 6), nn.Linear(6, num_classes))
        self[1].weight = nn.Parameter(torch.randn(6, 128 * in_channels)[:, ::2])


class Tied(nn.Module):
    """One weight in two layers, and one layer used twice."""

    def __init__(self, num_classes, in_channels):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, 8, 3, padding=1)
        self.twice, self.once = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.once.weight = self.twice.weight
        self.fc = nn.Linear(8, num_classes)

    def forward(self, x):
        x = F.relu(self.twice(F.relu(self.twice(F.relu(self.conv(x))))))
        return self.fc(self.once(x).mean((2, 3)))


class NanInTheLight(Small):
    """Its logits are NaN for an image that is brighter than any image to train on."""

    def forward(self, x):
        return super().forward(x) + torch.where(x.flatten(1).amin(1) > 3, float("nan"), 0.0)[:, None]


# Tiny tasks.


def stripes(n, seed):
    """Grey noise with a bright stripe whose place is the class, one of three: (n, 1, 8, 8) uint8 and labels."""
    r = np.random.default_rng(seed)
    images, labels = r.integers(0, 100, (n, 1, 8, 8)), r.permutation(n) % 3
    for image, label in zip(images, labels, strict=True):
        image[0, 2 * label + 1] += 100
    return images.astype(np.uint8), labels


def Frozen(num_classes, in_channels):
    """Its first parameter is not trained, so weight decay must leave it alone."""
    model = Small(num_classes, in_channels)
    next(model.parameters()).requires_grad_(False)
    return model


def data(test=None, **settings):
    settings = {"validation": 24, "augmentation": Augmentation(flip=True, shift=1, cutout=2), **settings}
    return make_data(stripes(96, 0), test or stripes(30, 1), **settings)  # 72 train, 24 validate


def job(model="Small", fixed=(), **settings):
    images = settings.pop("data", None) or data()
    tiny = dict(seed=1, generations=4, epochs=2, batch_size=36, milestones=(0.5,), loss_backend="reference")
    model = f"test_training:{model}" if model in globals() else model
    config = Config(model=model, device="cpu", **{**tiny, **settings}).resolved()
    made = make_job(config, images)
    return replace(made, fixed={**made.fixed, **dict(fixed)})


def task(folder, id=0, h=CROSS_ENTROPY, generation=0, parent=None, teacher=None, alpha=0.0):
    """parent, teacher: ids of individuals in the same folder."""
    parent, teacher = (None if i is None else folder / f"{i}.ckpt" for i in (parent, teacher))
    return Task(Individual(id, generation, dict(h)), folder / f"{id}.ckpt", parent, teacher, alpha)


def outcome(trainer, task):
    """All that an evaluation results in: the individual's record, its behaviour and every byte of its state."""
    individual = trainer.evaluate(copy.deepcopy(task))
    stored, state = load_individual(task.path)
    assert stored.record() == individual.record() and (stored.correct == individual.correct).all()
    return individual.record(), individual.correct.tolist(), state.tobytes()


# SGD.


def test_two_sgd_steps_by_hand():
    network = Network(nn.Linear(1, 1, bias=False), "cpu")
    network.weights.fill_(1.0)
    rate, momentum, decay = torch.tensor(0.1), torch.tensor(0.9), torch.tensor(0.2)
    network.gradient.fill_(0.5)
    network.sgd_step(rate, momentum, decay)  # v = 0.5 + 0.2 * 1 = 0.7, w = 1 - 0.07
    assert (network.momentum.item(), network.weights.item()) == pytest.approx((0.7, 0.93))
    network.gradient.fill_(0.5)
    network.sgd_step(rate, momentum, decay)  # v = 0.9 * 0.7 + 0.5 + 0.2 * 0.93 = 1.316, w = 0.93 - 0.1316
    assert (network.momentum.item(), network.weights.item()) == pytest.approx((1.316, 0.7984))


@pytest.mark.parametrize("momentum, weight_decay", [(0.0, 0.0), (0.9, 0.0), (0.9, 1e-2)])
@pytest.mark.parametrize("name", ["resnet8", "test_training:Small", "test_training:Tied", "test_training:Frozen"])
def test_a_network_trains_as_the_plain_model_does_under_torch_optim_sgd(name, momentum, weight_decay):
    plain = make_model(name, 3, 1, seed=5).to(memory_format=torch.channels_last)
    network = Network(make_model(name, 3, 1, seed=5), "cpu")
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=momentum, weight_decay=weight_decay)
    images, labels = torch.randn(5, 16, 1, 8, 8, generator=torch.manual_seed(0)), torch.arange(16) % 3
    for step, batch in enumerate(images):
        optimizer.param_groups[0]["lr"] = rate = 0.05 / (1 + step)
        optimizer.zero_grad()
        F.cross_entropy(plain(batch), labels).backward()
        optimizer.step()
        network.gradient.zero_()
        F.cross_entropy(network.model(batch), labels).backward()
        network.sgd_step(*map(torch.tensor, (rate, momentum, weight_decay)))
    states = plain.state_dict(), network.model.state_dict()
    assert states[0].keys() == states[1].keys()
    for expected, own in zip(*(state.values() for state in states), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-6)


# The flat state.


@pytest.mark.parametrize("name", ["resnet8", "test_training:Whimsical", "test_training:Tied", "test_training:Sliced"])
def test_a_model_works_as_before_once_it_is_a_network(name):
    plain, network = make_model(name, 3, 2, seed=5).eval(), Network(make_model(name, 3, 2, seed=5), "cpu")
    images = torch.rand(4, 2, 8, 8, generator=torch.manual_seed(0))
    torch.testing.assert_close(network.model.eval()(images), plain(images))


def test_parameters_gradients_and_buffers_are_views_of_the_flat_state_and_convolutions_stay_channels_last():
    network = Network(make_model("resnet8", 10, 3, seed=0), "cpu")
    network.state.zero_()
    network.gradient.fill_(2)
    for p in network.model.parameters():
        assert (p == 0).all() and (p.grad == 2).all() and p.grad.stride() == p.stride()
        assert p.ndim < 4 or p.is_contiguous(memory_format=torch.channels_last)
    assert all((b == 0).all() for b in network.model.buffers())
    assert len(network.weights) == sum(p.numel() for p in network.model.parameters())
    for i, p in enumerate(network.model.parameters()):
        p.data.fill_(i)  # each has a place of its own
    assert [p.unique().tolist() for p in network.model.parameters()] == [[i] for i in range(i + 1)]


def test_a_shared_weight_stays_shared():
    model = Network(Tied(3, 1), "cpu").model
    assert model.once.weight is model.twice.weight


def test_the_state_carries_weights_momentum_statistics_and_counters_exactly(tmp_path):
    trainer = Trainer(job("Whimsical"))
    trainer.evaluate(task(tmp_path))
    other = Network(make_model("test_training:Whimsical", 3, 1, seed=9), "cpu")
    other.state.copy_(torch.from_numpy(load_individual(tmp_path / "0.ckpt")[1]))
    own, loaded = trainer.network, other
    assert own.momentum.abs().max() > 0 and torch.equal(own.momentum, loaded.momentum)
    for kind in ("named_parameters", "named_buffers"):
        for (name, a), (_, b) in zip(*(getattr(n.model, kind)() for n in (own, loaded)), strict=True):
            assert torch.equal(a, b), name
    assert loaded.model.bn.num_batches_tracked == loaded.model.steps == 4  # 2 epochs of 72 / 36 steps
    assert loaded.model.bn.num_batches_tracked.dtype == torch.int64 and loaded.model.steps.dtype == torch.int32


@pytest.mark.parametrize("model", ["resnet8", "Whimsical"])
def test_load_state_gives_a_plain_model_that_computes_the_same(model, tmp_path):
    trainer = Trainer(job(model))
    trainer.evaluate(task(tmp_path))
    plain = load_state(trainer.job, load_individual(tmp_path / "0.ckpt")[1])
    assert not plain.training and all(t.is_contiguous() for t in plain.state_dict().values())
    images = torch.rand(4, 1, 8, 8, generator=torch.manual_seed(0))
    torch.testing.assert_close(plain(images), trainer.network.model(images))


def test_a_child_starts_from_its_parents_whole_state_and_a_fresh_one_from_rest(tmp_path):
    trainer = Trainer(job("Whimsical"))
    trainer.evaluate(task(tmp_path))
    parent = load_individual(tmp_path / "0.ckpt")[1]
    trainer.evaluate(task(tmp_path, id=1))
    trainer._load(task(tmp_path, id=2, parent=0, generation=1))
    assert trainer.network.state.numpy().tobytes() == parent.tobytes()
    trainer._load(task(tmp_path, id=3))
    assert trainer.network.momentum.abs().max() == 0 and trainer.network.model.bn.num_batches_tracked == 0
    fresh = trainer.network.weights.clone()
    trainer._load(task(tmp_path, id=4))
    assert not torch.equal(trainer.network.weights, fresh)  # each has initial weights of its own


# The learning rate.


@pytest.mark.parametrize("dataset, rates", [
    ("cifar10", {0: 0.1, 59: 0.1, 60: 0.02, 119: 0.02, 120: 0.004, 159: 0.004, 160: 0.0008, 199: 0.0008}),
    ("svhn", {0: 0.1, 19: 0.1, 20: 0.01, 29: 0.01, 30: 0.001, 39: 0.001}),
])
def test_the_fixed_schedules_of_sec_4_1_and_4_2(dataset, rates):
    protocol = PROTOCOLS[dataset]
    paper = job(**{name: protocol[name] for name in ("generations", "epochs", "milestones")})
    h = {"lr_scale": 1.0, "lr_decay": protocol["lr_decay"]}
    assert {epoch: learning_rate(h, epoch, paper) for epoch in rates} == pytest.approx(rates)


def test_evolved_scale_and_decay_change_the_schedule():
    h = {"lr_scale": 3.0, "lr_decay": 2.0}
    rates = [learning_rate(h, epoch, job(milestones=(0.25, 0.5))) for epoch in range(8)]
    assert rates == pytest.approx([0.3] * 2 + [0.15] * 2 + [0.075] * 4)


def watch(model, see):
    """Call see(inputs) at each forward pass of a model in training, whoever trains."""
    model.register_forward_pre_hook(lambda module, inputs: see(inputs[0].clone()))


def test_the_clock_of_the_schedule_is_the_generations_also_for_the_child_of_an_old_elite(tmp_path):
    trainer, seen = Trainer(job(milestones=(3 / 8,))), []
    watch(trainer.network.model, lambda x: seen.append(trainer.scalars["learning_rate"].item()))
    trainer.evaluate(task(tmp_path))
    seen.clear()
    trainer.evaluate(task(tmp_path, id=9, parent=0, generation=1))  # epochs 2 and 3 of 8, two steps each
    assert seen[:4] == pytest.approx([0.1, 0.1, 0.02, 0.02])


# Epochs.


def test_an_epoch_sees_every_image_once_in_an_order_of_its_own(tmp_path):
    trainer, seen = Trainer(job(data=data(augmentation=Augmentation()))), []
    watch(trainer.network.model, lambda x: seen.extend(x.sum((1, 2, 3)).tolist()) if len(x) == 36 else None)
    trainer.evaluate(task(tmp_path))
    first, second = seen[:72], seen[72:144]
    assert len(set(first)) == 72 and sorted(first) == sorted(second) and first != second


def test_images_left_over_wait_for_the_next_epoch(tmp_path):
    trainer = Trainer(job(batch_size=32))  # 72 = 2 * 32 + 8
    trainer.evaluate(task(tmp_path))
    assert trainer.network.model.bn.num_batches_tracked == 2 * 2


def test_a_batch_larger_than_the_data_is_all_of_it(tmp_path):
    larger, equal = (outcome(Trainer(job(batch_size=size)), task(tmp_path)) for size in (1000, 72))
    assert larger == equal


@pytest.mark.parametrize("name, by_hand", [
    ("cross-entropy", lambda p, x: -(x * p.log()).sum(1)),
    ("generalized-cross-entropy", lambda p, x: (x * (1 - p**0.7) / 0.7).sum(1)),
    ("label-smoothing", lambda p, x: -((0.9 * x + 0.1 / p.shape[1]) * p.log()).sum(1)),
])
@pytest.mark.parametrize("alpha", [None, 0.3])
def test_plain_losses_are_their_formulas_with_the_labels_of_eq_3(name, by_hand, alpha):
    generator = torch.Generator().manual_seed(0)
    logits, teacher = torch.randn(2, 7, 5, generator=generator, dtype=torch.float64)
    labels, own, expected = torch.arange(7) % 5, logits.clone().requires_grad_(), logits.clone().requires_grad_()
    x = F.one_hot(labels, 5).double()
    x = x if alpha is None else alpha * teacher.softmax(1) + (1 - alpha) * x
    loss = PLAIN_LOSSES[name](own, labels, None if alpha is None else teacher, alpha)
    by_formula = by_hand(expected.softmax(1), x).mean()
    torch.testing.assert_close(loss, by_formula)
    upstream = torch.randn((), generator=generator, dtype=torch.float64)
    gradients = [torch.autograd.grad(f, z, upstream)[0] for f, z in ((loss, own), (by_formula, expected))]
    torch.testing.assert_close(*gradients)


def test_generalized_cross_entropy_by_hand():
    logits = torch.tensor([[2.0, 1.0, 1.0]]).log()  # the probabilities are 1/2, 1/4, 1/4
    teacher = torch.tensor([[1.0, 1.0, 2.0]]).log()
    half, quarter = (1 - 0.5**0.7) / 0.7, (1 - 0.25**0.7) / 0.7
    gce, labels = PLAIN_LOSSES["generalized-cross-entropy"], torch.tensor([0])
    assert gce(logits, labels).item() == pytest.approx(half)
    assert gce(logits, labels, teacher, 0.5).item() == pytest.approx(0.625 * half + 0.375 * quarter)
    hopeless = torch.tensor([[-2e4, 0.0]], requires_grad=True)
    gce(hopeless, labels).backward()
    assert (hopeless.grad == 0).all()


def test_what_has_no_theta_trains_under_the_plain_loss_of_the_run(tmp_path):
    found = {loss: outcome(Trainer(job(loss=loss)), task(tmp_path))[2] for loss in ("taylorglo", *PLAIN_LOSSES)}
    assert found["taylorglo"] == found["cross-entropy"] and len(set(found.values())) == 3


@pytest.mark.parametrize("h", [CROSS_ENTROPY, TAYLORGLO], ids=["cross-entropy", "taylorglo"])
def test_training_learns(h, tmp_path):
    individual = Trainer(job(epochs=15, learning_rate=0.3)).evaluate(task(tmp_path, h=h))
    assert individual.fitness > 0.9 and individual.test_accuracy > 0.9


@pytest.mark.parametrize("name, value", [("momentum", 0.5), ("lr_scale", 2.0), ("weight_decay", 0.1), ("cutout", 4.0),
                                         ("cutout", 0.0)])
def test_an_evolved_hyperparameter_takes_the_place_of_the_fixed_one(name, value, tmp_path):
    h = {name: value}
    evolved, fixed = outcome(Trainer(job()), task(tmp_path, h=h)), outcome(Trainer(job(fixed=h)), task(tmp_path))
    assert evolved[2] == fixed[2] != outcome(Trainer(job()), task(tmp_path))[2]


def test_bfloat16_is_for_the_activations_alone(tmp_path):
    trainer, seen = Trainer(job(precision="bfloat16", epochs=15, learning_rate=0.3)), set()
    trainer.network.model.fc.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    individual = trainer.evaluate(task(tmp_path, h=TAYLORGLO))
    assert seen == {torch.bfloat16} and individual.fitness > 0.9
    assert {p.dtype for p in trainer.network.model.parameters()} == {torch.float32}
    assert trainer.network.model.bn.running_mean.dtype == torch.float32


@pytest.mark.parametrize("sign", [1, -1])
def test_a_normalized_loss_starts_as_steeply_as_cross_entropy_in_its_own_direction(sign, tmp_path):
    h = {f"theta{i}": t for i, t in enumerate([0.3, -2.0, 4.0, 1.0, -3.0, sign * 9.0, 0.5, -1.0])}
    assert scaled_theta(h, False, 3).tolist() == list(h.values())
    theta = torch.from_numpy(scaled_theta(h, True, 3))
    logits, label = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True), torch.tensor([2])
    own, = torch.autograd.grad(reference_loss(logits, label, theta), logits)
    expected, = torch.autograd.grad(F.cross_entropy(logits, label), logits)
    torch.testing.assert_close(own, sign * expected)
    trainer = Trainer(job(normalize_loss=True))  # of three classes
    trainer.evaluate(task(tmp_path, h={**TAYLORGLO, **h}))
    assert torch.equal(trainer.taylorglo.theta, theta.float())


# Averaged weights.


def test_the_running_mean_of_the_weights_is_what_is_scored_inherited_and_taught(tmp_path):
    trainer, mean = Trainer(job(average_weights=True)), None  # two epochs of two steps
    steps = []
    whole = trainer.network.sgd_step
    trainer.network.sgd_step = lambda *rates: (whole(*rates), steps.append(trainer.network.weights.clone()))
    for t in (task(tmp_path), task(tmp_path, id=1, parent=0, generation=1)):
        individual = trainer.evaluate(t)
        if mean is None:
            mean = make_flat(trainer, t)
        for weights in steps:
            mean = (3 * mean + weights) / 4
        steps.clear()
        torch.testing.assert_close(trainer.scored_network.weights, mean)
        model = load_state(trainer.job, load_individual(t.path)[1])
        d = trainer.data
        images = (d.validation.images - d.mean[:, None, None]) / d.std[:, None, None]
        assert (model(images).argmax(1) == d.validation.labels).tolist() == individual.correct.tolist()
    trainer.evaluate(task(tmp_path, id=2, teacher=1, alpha=0.5))
    torch.testing.assert_close(trainer.teacher.weights, mean)


def make_flat(trainer, task):
    """The weights that a fresh individual starts from."""
    other = Trainer(trainer.job)
    other._load(task)
    return other.network.weights.clone()


# Distillation.


def distilled(h, alpha, **settings):
    """The loss of one image whose label is 0 and whose teacher is certain of 3, at y = (0.1, 0.2, 0.3, 0.4)."""
    trainer = Trainer(job(data=data(class_names="abcd"), **settings))
    trainer.loss_is_taylorglo = "theta0" in h
    trainer.taylorglo.theta.copy_(torch.tensor([h.get(f"theta{i}", 0.0) for i in range(8)]))
    trainer.scalars["alpha"].fill_(alpha)
    logits, teacher = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log(), torch.tensor([[0.0, 0.0, 0.0, 1e4]])
    return trainer._loss(logits, torch.tensor([0]), teacher).item()


@pytest.mark.parametrize("alpha, cross_entropy, taylorglo", [
    (0.0, -math.log(0.1), -10 / 4 * 0.1),
    (1.0, -math.log(0.4), -10 / 4 * 0.4),
    (0.25, -0.75 * math.log(0.1) - 0.25 * math.log(0.4), -10 / 4 * (0.75 * 0.1 + 0.25 * 0.4)),
])
def test_eq_3_with_a_teacher_that_is_certain(alpha, cross_entropy, taylorglo):
    assert distilled(CROSS_ENTROPY, alpha) == pytest.approx(cross_entropy)
    assert distilled(TAYLORGLO, alpha) == pytest.approx(taylorglo)
    assert distilled(TAYLORGLO, alpha, add_cross_entropy=True) == pytest.approx(cross_entropy + taylorglo)


@pytest.mark.parametrize("h", [CROSS_ENTROPY, TAYLORGLO], ids=["cross-entropy", "taylorglo"])
def test_alpha_0_changes_nothing_and_alpha_above_0_does(h, tmp_path):
    trainer = Trainer(job("Whimsical"))
    trainer.evaluate(task(tmp_path, id=7, h=h))
    alone, with_0, with_half = (outcome(trainer, task(tmp_path, h=h, teacher=teacher, alpha=alpha))
                                for teacher, alpha in ((None, 0.0), (7, 0.0), (7, 0.5)))
    if h is TAYLORGLO:
        assert with_0 == alone
    else:  # F.cross_entropy sums soft labels in another order
        assert with_0[0]["loss"] == pytest.approx(alone[0]["loss"], rel=1e-5)
    assert with_half[2] != alone[2]


def test_the_teacher_sees_the_same_augmented_batch_in_eval_mode_and_stays_as_it_is(tmp_path):
    trainer, batches, lessons = Trainer(job("Whimsical")), [], []
    trainer.evaluate(task(tmp_path, id=7, h=TAYLORGLO))
    watch(trainer.teacher.model, lambda x: lessons.append((trainer.teacher.model.training, x)))
    watch(trainer.network.model, batches.append)
    trainer.evaluate(task(tmp_path, h=TAYLORGLO, teacher=7, alpha=0.5))
    assert len(lessons) == 4 and not any(training for training, _ in lessons)
    assert all(torch.equal(x, own) for (_, x), own in zip(lessons, batches, strict=False))
    assert trainer.teacher.state.numpy().tobytes() == load_individual(tmp_path / "7.ckpt")[1].tobytes()


# Fitness.


def test_fitness_behaviour_and_test_accuracy_equal_a_slow_recount(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "EVALUATION_BATCH", 7)  # divides neither 24 nor 30
    trainer = Trainer(job("resnet8"))
    individual = trainer.evaluate(task(tmp_path))
    model, d = load_state(trainer.job, load_individual(tmp_path / "0.ckpt")[1]), trainer.job.data
    right = [[model(((image - d.mean[:, None, None]) / d.std[:, None, None])[None]).argmax().item() == label
              for image, label in zip(images.images, images.labels.tolist(), strict=True)]
             for images in (d.validation, d.test)]
    assert individual.correct.tolist() == right[0] and individual.correct.dtype == bool
    assert individual.fitness == sum(right[0]) / 24
    assert individual.test_accuracy == sum(right[1]) / 30


def test_the_test_images_influence_nothing_but_the_test_accuracy(tmp_path):
    images, labels = stripes(30, 1)
    (record, *rest), (other, *other_rest) = (
        outcome(Trainer(job("NanInTheLight", data=data(test=test), epochs=5)), task(tmp_path))
        for test in ((images, labels), (np.full_like(images, 255), (labels + 1) % 3)))
    assert record.pop("test_accuracy") != other.pop("test_accuracy")
    assert record == other and rest == other_rest
    assert record["fitness"] > 0 and not record["diverged"]


def diverge(trainer, where):
    if where == "a loss":
        return None
    tensor = {"a weight": trainer.network.weights, "momentum": trainer.network.momentum,
              "a statistic": trainer.network.model.bn.running_var}.get(where)
    if where == "a logit":
        with torch.no_grad():
            trainer.network.model.fc.weight.fill_(3e38)  # finite, unlike its products
    elif tensor is not None:
        tensor[-1] = float("inf")
    return 0.5


@pytest.mark.parametrize("where", ["a weight", "a loss", "a logit", "momentum", "a statistic", "nowhere"])
def test_whoever_is_not_finite_has_diverged_and_is_right_nowhere(where, tmp_path):
    trainer = Trainer(job(epochs=5))
    individual = trainer.evaluate(task(tmp_path))
    assert individual.fitness > 0.3 and not individual.diverged
    individual.loss = diverge(trainer, where)
    list(trainer._score(individual))
    assert individual.diverged == (where != "nowhere")
    assert individual.fitness == individual.correct.mean() == (0 if individual.diverged else individual.fitness)


@pytest.mark.parametrize("too_high", [{"lr_scale": 1e30}, {"lr_scale": 1e300}, {"weight_decay": 1e300}])
def test_training_that_explodes_ends_at_once_and_the_next_individual_is_unharmed(too_high, tmp_path):
    trainer = Trainer(job("Whimsical", epochs=4))
    healthy = outcome(trainer, task(tmp_path, h=TAYLORGLO))
    individual = trainer.evaluate(task(tmp_path, id=1, h={**TAYLORGLO, **too_high}))
    assert individual.diverged and individual.loss is None and individual.fitness == 0 and not individual.correct.any()
    assert trainer.network.model.bn.num_batches_tracked == 2  # one epoch of four
    child = trainer.evaluate(task(tmp_path, id=2, parent=1, generation=1, h=TAYLORGLO))
    assert child.diverged
    assert outcome(trainer, task(tmp_path, h=TAYLORGLO)) == healthy


# Determinism.


def test_an_evaluation_is_a_function_of_its_task_alone(tmp_path):
    tasks = [task(tmp_path, id=0, h=TAYLORGLO), task(tmp_path, id=1, h=CROSS_ENTROPY),
             task(tmp_path, id=2, h=TAYLORGLO, generation=1, parent=0, teacher=1, alpha=0.4),
             task(tmp_path, id=3, h=TAYLORGLO, generation=1, parent=1, teacher=0, alpha=0.4),
             task(tmp_path, id=4, h=TAYLORGLO, generation=1, parent=0)]
    trainer = Trainer(job("Whimsical"))
    forwards = [outcome(trainer, t) for t in tasks]
    torch.rand(1)  # moves the global generator, which dropout draws from
    before = torch.random.get_rng_state(), np.random.get_state()[1].tolist()
    backwards = [outcome(trainer, t) for t in reversed(tasks)][::-1]
    elsewhere = [outcome(Trainer(job("Whimsical")), t) for t in tasks]
    assert forwards == backwards == elsewhere
    assert torch.equal(before[0], torch.random.get_rng_state()) and before[1] == np.random.get_state()[1].tolist()


def test_seed_generation_and_id_each_change_the_training(tmp_path):
    first = Trainer(job("Whimsical"))
    first.evaluate(task(tmp_path, id=7))
    states = [outcome(trainer, task(tmp_path, **who, parent=7))[2]
              for trainer, who in ((first, dict(id=1, generation=1)), (first, dict(id=2, generation=1)),
                                   (first, dict(id=1, generation=0)),  # the learning rate is the same
                                   (Trainer(job("Whimsical", seed=2)), dict(id=1, generation=1)))]
    assert len(set(states)) == 4


# On a GPU.


@pytest.fixture
def on_gpu():
    """A job for the GPU that gives the same bits each time."""
    def make(**settings):
        return prepare(replace(job(**settings), device="cuda:0", deterministic=True))
    yield make
    torch.use_deterministic_algorithms(False)


def kinds_of_tasks(folder):
    """Tasks whose steps differ in their operations, and two of the same kind: with and without teacher and cutout."""
    return [task(folder, id=0, h=TAYLORGLO), task(folder, id=1, h={**TAYLORGLO, "cutout": 0.0}), task(folder, id=2),
            task(folder, id=3, h={**TAYLORGLO, "cutout": 4.0}, generation=1, parent=0, teacher=1, alpha=0.4),
            task(folder, id=4, h={**TAYLORGLO, "momentum": 0.5}, generation=1, parent=1, teacher=0, alpha=0.8)]


@pytest.mark.cuda
@pytest.mark.parametrize("model, loss", [("Whimsical", "reference"), ("resnet8", "reference"), ("resnet8", "fused")])
def test_a_captured_graph_computes_what_the_eager_step_computes(model, loss, on_gpu, tmp_path):
    captured = Trainer(on_gpu(model=model, loss_backend=loss))
    eager = Trainer(replace(captured.job, no_graphs=True))
    for t in kinds_of_tasks(tmp_path):
        expected = outcome(eager, t)
        assert outcome(captured, t) == expected
        assert outcome(captured, t) == expected  # replayed
    assert len(captured.graphs) > 4 and not eager.graphs


class Peeking(Small):
    """Looks at a value on the host."""

    def forward(self, x):
        return super().forward(x) * (1 if x.sum().item() else 2)


@pytest.mark.cuda
def test_a_step_that_cannot_be_captured_is_told_in_one_line(tmp_path):
    script = ("import pathlib, records, test_training as t\n"  # in a process of its own: CUDA does not recover from it
              "trainer = t.Trainer(t.prepare(t.replace(t.job('Peeking'), device='cuda:0')))\n"
              "try: trainer.evaluate(t.task(pathlib.Path('.')))\n"
              "except records.RunError as error: print(error)\n")
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert "Peeking: its training step cannot be captured" in done.stdout and "--no-graphs" in done.stdout, done.stderr


@pytest.mark.cuda
def test_slots_that_take_turns_on_a_gpu_compute_what_one_computes(on_gpu, tmp_path):
    one = Trainer(on_gpu(model="Whimsical"))
    expected = [outcome(one, t) for t in kinds_of_tasks(tmp_path)]
    slots = [Trainer(one.job) for _ in range(2)]
    for pair in ((0, 1), (2, 3), (4,)):
        busy = {slots[i]: slots[i].evaluating(kinds_of_tasks(tmp_path)[k]) for i, k in enumerate(pair)}
        while busy:
            finished(busy)
    for t, (_, _, state) in zip(kinds_of_tasks(tmp_path), expected, strict=True):
        assert load_individual(t.path)[1].tobytes() == state


@pytest.mark.cuda
def test_a_gpu_trains_as_the_cpu_does(on_gpu, tmp_path):
    gpu, cpu = Trainer(on_gpu(epochs=1)), Trainer(job(epochs=1))
    for t in kinds_of_tasks(tmp_path)[:3]:
        here, there = (torch.from_numpy(np.frombuffer(outcome(trainer, t)[2], np.uint8).copy()) for trainer in (cpu, gpu))
        n = 4 * sum(p.numel() for p in cpu.network.model.parameters())
        torch.testing.assert_close(there[:n].view(torch.float32), here[:n].view(torch.float32), rtol=1e-2, atol=1e-3)
