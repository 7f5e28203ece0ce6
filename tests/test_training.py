"""Training and scoring one individual, against a plain loop of torch.optim.SGD, hand computation
and slow recounts."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import training
from augmentation import Augmentation, draw_augmentation, make_batch, normalize
from config import Config
from data import make_data
from errors import RunError
from evolution import random_stream
from models import make_model
from records import Individual, load_individual
from settings import settings
from taylorglo_ext.reference import reference_loss
from training import Task, Trainer, accuracy, learning_rate, model_tensors

CROSS_ENTROPY = {}  # nothing is evolved
# f = 10 x y: the loss is minus the likelihood.
TAYLORGLO = {f"theta{i}": 10.0 if i == 5 else 0.0 for i in range(8)}
EVOLVED = TAYLORGLO | {"lr_scale": 2.0, "lr_decay": 3.0, "momentum": 0.5, "weight_decay": 0.1,
                       "cutout": 3.4}

pytestmark = pytest.mark.usefixtures("one_thread")


# Models, found by the name test_training:NAME.


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


class Whimsical(Small):
    """With dropout, and a buffer outside its state_dict that steers it."""

    def __init__(self, num_classes, in_channels):
        super().__init__(num_classes, in_channels)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int32), persistent=False)

    def features(self, x):
        if self.training:
            self.steps += 1
        return F.dropout(super().features(x), 0.3, self.training) * (1 + self.steps)


class Tied(nn.Module):
    """One weight in two layers, one layer used twice, a weight with gaps in its memory, one that is
    not trained, one tensor registered as two buffers, one of complex numbers, and an empty one."""

    def __init__(self, num_classes, in_channels):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, 8, 3, padding=1)
        self.twice, self.once = (nn.Conv2d(8, 8, 3, padding=1, bias=i == 0) for i in range(2))
        self.once.weight = self.twice.weight
        self.fc = nn.Linear(8, num_classes)
        self.fc.weight = nn.Parameter(torch.randn(num_classes, 16)[:, ::2])
        self.conv.bias.requires_grad_(False)
        self.register_buffer("one", torch.zeros(3))
        self.register_buffer("same", self.one)
        self.register_buffer("turn", torch.ones((), dtype=torch.complex128))
        self.register_buffer("none", torch.empty(0))

    def forward(self, x):
        if self.training:
            self.one += 1
            self.turn *= 1j
        x = F.relu(self.twice(F.relu(self.twice(F.relu(self.conv(x))))))
        return self.fc(self.once(x).mean((2, 3))) * (self.same[0] + 2 + self.turn.real).float()


class Replacing(Small):
    """Replaces the memory of a parameter, in another order, and of a buffer in every step."""

    def __init__(self, num_classes, in_channels):
        super().__init__(num_classes, in_channels)
        self.conv = nn.Conv2d(2 * in_channels, 8, 3, padding=1)

    def features(self, x):
        self.conv.weight.data = torch.renorm(self.conv.weight.data, 2, 0, 0.5).contiguous()
        self.bn.running_mean = self.bn.running_mean * 0.5
        return super().features(torch.cat([x, x.flip(3)], 1))


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
    tiny = dict(seed=1, generations=4, epochs=2, batch_size=36, milestones=(3 / 8,), device="cpu",
                loss_backend="reference", layout="channels-last", threads=1)
    model = f"test_training:{model}" if model in globals() else model
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
                weight = 1 / (steps * c.epochs * c.average_weights)
                mean[name] = mean[name].lerp(t.detach(), weight) if t.is_floating_point() else +t
    parts = {"model": named(model), "momentum": momenta, "average": mean if c.average_weights else {}}
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


def assert_close(state, expected, **tolerance):
    assert state.keys() == expected.keys()
    for name, t in state.items():
        torch.testing.assert_close(t, expected[name], msg=lambda text, n=name: f"{n}: {text}",
                                   **tolerance)


# SGD: what one evaluation does, and what a child inherits.


@pytest.mark.parametrize("model, h, given", [
    ("resnet8", EVOLVED, {}), ("Small", CROSS_ENTROPY, {}), ("Whimsical", EVOLVED, {}),
    ("Tied", CROSS_ENTROPY, dict(weight_decay=0.1)), ("Tied", EVOLVED, {}), ("Replacing", EVOLVED, {}),
    ("Small", TAYLORGLO, dict(batch_size=32)), ("Small", TAYLORGLO, dict(batch_size=1000)),
    ("Small", TAYLORGLO, dict(momentum=0.0)), ("Small", EVOLVED, dict(add_cross_entropy=True)),
    ("Small", EVOLVED, dict(layout="contiguous")),
    ("Small", TAYLORGLO, dict(precision="bfloat16")), ("Tied", EVOLVED, dict(average_weights=2.0)),
    ("Whimsical", EVOLVED, dict(average_weights=0.5)),
], ids=lambda value: str(value.get("lr_scale", value)) if isinstance(value, dict) else value)
def test_a_network_and_its_distilled_child_train_as_by_torch_optim_sgd(model, h, given, tmp_path):
    trainer = trainer_of(model, **given)
    for t in (task(tmp_path, 7, CROSS_ENTROPY), task(tmp_path, 0, h),
              task(tmp_path, 1, h, generation=1, parent=0, teacher=7, alpha=0.4)):
        trainer.evaluate(copy.deepcopy(t))
        assert_close(state_of(t), by_hand(trainer, t), rtol=1e-3, atol=1e-4)


def test_a_child_of_another_model_is_refused_with_the_tensors_name(tmp_path):
    trainer_of("Small").evaluate(task(tmp_path))
    with pytest.raises(RunError, match="another model.*twice.weight the model has torch.float32.*none"):
        trainer_of("Tied").evaluate(task(tmp_path, 1, parent=0, generation=1))


# Learning rates and other hyperparameters.


@pytest.mark.parametrize("config, h, rates", [
    (Config(dataset="cifar10"), {}, {0: 0.1, 59: 0.1, 60: 0.02, 119: 0.02, 120: 4e-3, 159: 4e-3,
                                     160: 8e-4, 199: 8e-4}),  # Sec. 4.1
    (Config(dataset="svhn"), {}, {0: 0.1, 19: 0.1, 20: 0.01, 29: 0.01, 30: 1e-3, 39: 1e-3}),  # Sec. 4.2
    (Config(generations=4, epochs=2, milestones=(0.25, 0.5)), {"lr_scale": 3.0, "lr_decay": 2.0},
     {0: 0.3, 1: 0.3, 2: 0.15, 3: 0.15, 4: 0.075, 7: 0.075}),
], ids=["Sec. 4.1", "Sec. 4.2", "evolved"])
def test_the_learning_rate_by_the_epoch_of_the_run(config, h, rates):
    found = {epoch: learning_rate(config.fixed() | h, epoch, config) for epoch in rates}
    assert found == pytest.approx(rates)


def test_what_was_applied_is_recorded_by_the_clock_of_the_generation(tmp_path):
    trainer = trainer_of()
    trainer.evaluate(task(tmp_path))
    old = task(tmp_path, 9, EVOLVED, generation=1, parent=0, teacher=0, alpha=0.3)  # epochs 2, 3
    applied = trainer.evaluate(old).applied
    assert applied.pop("learning_rate") == pytest.approx([0.2, 0.2 / 3])
    assert applied == dict(theta=[0, 0, 0, 0, 0, 10, 0, 0], momentum=0.5, weight_decay=0.1,
                           cutout=3, alpha=0.3)


def test_an_epoch_sees_every_image_once_in_an_order_of_its_own(tmp_path):
    Small.seen.clear()
    trainer_of(images=data(augmentation=Augmentation())).evaluate(task(tmp_path))
    sums = [x for train, images, _ in Small.seen if train for x in images.sum((1, 2, 3)).tolist()]
    first, second = sums[:72], sums[72:]
    assert len(set(first)) == 72 and sorted(first) == sorted(second) and first != second


@pytest.mark.parametrize("h", [CROSS_ENTROPY, TAYLORGLO], ids=["cross-entropy", "taylorglo"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_training_learns(h, precision, tmp_path):
    Small.seen.clear()
    trainer = trainer_of(epochs=15, learning_rate=0.3, precision=precision)
    individual = trainer.evaluate(task(tmp_path, h=h))
    assert individual.fitness > 0.9 and individual.test_accuracy > 0.9
    assert {dtype for *_, dtype in Small.seen} == {getattr(torch, precision)}
    assert {t.dtype for n, t in state_of(task(tmp_path)).items() if "fc" in n} == {torch.float32}


# Distillation.


@pytest.mark.parametrize("alpha, cross_entropy, taylorglo", [
    (0.0, -math.log(0.1), -10 / 4 * 0.1),
    (1.0, -math.log(0.4), -10 / 4 * 0.4),
    (0.25, -0.75 * math.log(0.1) - 0.25 * math.log(0.4), -10 / 4 * (0.75 * 0.1 + 0.25 * 0.4)),
])
def test_eq_3_with_a_teacher_that_is_certain(alpha, cross_entropy, taylorglo, tmp_path):
    """The loss of an image of class 0 whose teacher is certain of 3, at y = (0.1, 0.2, 0.3, 0.4)."""
    logits, lesson = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log(), torch.tensor([[0.0, 0, 0, 1e4]])
    for h, more, loss in ((CROSS_ENTROPY, {}, cross_entropy), (TAYLORGLO, {}, taylorglo),
                          (TAYLORGLO, dict(add_cross_entropy=True), cross_entropy + taylorglo)):
        trainer = trainer_of(images=data(class_names="abcd"), **more)
        taught = task(tmp_path, teacher=7, alpha=alpha)
        trainer.set_hyperparameters(trainer.config.fixed() | h, taught)
        found = trainer.backward(logits.clone().requires_grad_(), torch.tensor([0]), lesson)
        assert found.item() == pytest.approx(loss)


def test_the_teacher_sees_the_same_augmented_batch_in_evaluation_mode(tmp_path):
    trainer = trainer_of()
    trainer.evaluate(task(tmp_path, 7))
    Small.seen.clear()
    trainer.evaluate(task(tmp_path, teacher=7, alpha=0.5))
    batches = [(train, x) for train, x, _ in Small.seen if len(x) == 36]
    assert [train for train, _ in batches] == 4 * [False, True]
    assert all(torch.equal(batches[i][1], batches[i + 1][1]) for i in range(0, 8, 2))


# Fitness.


@pytest.mark.parametrize("given", [{}, dict(average_weights=0.5)], ids=["as trained", "averaged"])
def test_the_scores_equal_a_slow_recount_of_what_is_delivered(given, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "EVALUATION_BATCH", 7)  # divides neither 24 nor 30
    trainer = trainer_of("resnet8", data(label_noise=0.5), **given)
    individual, d = trainer.evaluate(task(tmp_path)), trainer.data
    model, wrong = model_with(trainer, state_of(task(tmp_path))), d.train.labels != d.train_clean
    right = [[model(normalize(image[None], d.mean, d.std)).argmax().item() == label
              for image, label in zip(images, labels.tolist(), strict=True)]
             for images, labels in (
                 (d.validation.images, d.validation.labels), (d.test.images, d.test.labels),
                 (d.train.images[wrong][:, :, 1:-1, 1:-1], d.train.labels[wrong]))]
    assert individual.correct.tolist() == right[0] and individual.correct.dtype == bool
    assert individual.fitness == sum(right[0]) / 24
    assert individual.test_accuracy == sum(right[1]) / 30 == accuracy(trainer.config, d, model)
    assert wrong.sum() == 36 and individual.scores == {"memorised": sum(right[2]) / 36}


def test_the_test_images_influence_nothing_but_the_test_accuracy(tmp_path):
    images, labels = stripes(30, 1)
    results = []
    for test in ((images, labels), (np.full_like(images, 255), (labels + 1) % 3)):
        one = outcome(trainer_of(images=data(test), epochs=5), task(tmp_path))
        results.append((one[0].pop("test_accuracy"), one[:2], state_of(task(tmp_path))))
    (accuracy, scores, state), (other, other_scores, other_state) = results
    assert accuracy != other and scores == other_scores and scores[0]["fitness"] > 0
    assert_close(state, other_state, rtol=0, atol=0)


@pytest.mark.parametrize("where", ["model/fc.bias", "momentum/conv.weight", "model/bn.running_var",
                                   "a loss", "a logit", "nowhere"])
def test_whoever_is_not_finite_has_diverged_and_is_right_nowhere(where, tmp_path):
    trainer = trainer_of(epochs=5)
    individual, state = trainer.evaluate(task(tmp_path)), state_of(task(tmp_path))
    assert individual.fitness > 0.3 and not individual.diverged
    if where == "a loss":
        individual.loss = None
    elif where == "a logit":
        state["model/fc.weight"].fill_(3e38)  # finite, unlike its products
    elif where in state:
        state[where].view(-1)[-1] = math.inf
    trainer.score(individual, state)
    assert individual.diverged == (where != "nowhere") == (individual.fitness == 0)
    assert individual.fitness == individual.correct.mean()


@pytest.mark.parametrize("high", [{"lr_scale": 1e30}, {"lr_scale": 1e300}, {"weight_decay": 1e300}])
def test_training_that_explodes_ends_at_once_and_the_next_one_is_unharmed(high, tmp_path):
    trainer = trainer_of("Whimsical", epochs=4)
    healthy = outcome(trainer, task(tmp_path, h=TAYLORGLO))
    individual = trainer.evaluate(task(tmp_path, 1, TAYLORGLO | high))
    assert individual.diverged and individual.loss is None and not individual.correct.any()
    assert state_of(task(tmp_path, 1))["model/steps"] == 2  # one epoch of four
    assert trainer.evaluate(task(tmp_path, 2, TAYLORGLO, generation=1, parent=1)).diverged
    assert outcome(trainer, task(tmp_path, h=TAYLORGLO)) == healthy


# Determinism.


def test_an_evaluation_is_a_function_of_its_task_alone(tmp_path):
    tasks = [task(tmp_path, 0, TAYLORGLO), task(tmp_path, 1, CROSS_ENTROPY),
             task(tmp_path, 2, TAYLORGLO, generation=1, parent=0, teacher=1, alpha=0.4),
             task(tmp_path, 3, EVOLVED, generation=1, parent=1, teacher=0, alpha=0.4)]
    trainer = trainer_of("Whimsical")
    forwards = [outcome(trainer, t) for t in tasks]
    torch.rand(1)  # moves the global generator, which dropout draws from
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    backwards = [outcome(trainer, t) for t in reversed(tasks)][::-1]
    elsewhere = [outcome(trainer_of("Whimsical"), t) for t in tasks]
    assert forwards == backwards == elsewhere
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == np.random.get_state()[1].tolist()


def test_seed_generation_and_id_each_change_the_training(tmp_path):
    trainer_of().evaluate(task(tmp_path, 7))
    losses = {trainer_of(seed=seed).evaluate(task(tmp_path, id, generation=g, parent=7)).loss
              for seed, id, g in ((1, 1, 1), (1, 2, 1), (1, 1, 0), (2, 1, 1))}
    assert len(losses) == 4  # of equal learning rates


@pytest.mark.cuda  # test_slots.py has the others
def test_a_gpu_trains_as_the_cpu_does(tmp_path):
    config = configured(epochs=1, device="cuda:0", deterministic=True)
    with settings(config):
        gpu = Trainer(config, data().to("cuda:0"))
        for t in (task(tmp_path, 0, EVOLVED), task(tmp_path, 1),
                  task(tmp_path, 2, EVOLVED, generation=1, parent=0, teacher=1, alpha=0.4)):
            gpu.evaluate(copy.deepcopy(t))
            assert_close(state_of(t), by_hand(trainer_of(epochs=1), t), rtol=1e-2, atol=1e-3)
