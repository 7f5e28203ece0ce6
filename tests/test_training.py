"""Training and scoring one individual, against a plain loop of torch.optim.SGD, hand computation
and slow recounts."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small import (
    CROSS_ENTROPY,
    EVOLVED,
    TAYLORGLO,
    Small,
    assert_close,
    by_hand,
    configured,
    data,
    model_with,
    outcome,
    state_of,
    stripes,
    task,
    trainer_of,
)
from torch import nn

import training
from augmentation import Augmentation, normalize
from config import Config
from errors import RunError
from metrics import METRICS
from settings import settings
from training import Trainer, all_metrics, learning_rate

pytestmark = pytest.mark.usefixtures("one_thread")


# Models, found by the name test_training:NAME.


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


# SGD: what one evaluation does, and what a child inherits.


@pytest.mark.parametrize("model, h, given", [
    ("resnet8", EVOLVED, {}), ("Small", CROSS_ENTROPY, {}), ("Whimsical", EVOLVED, {}),
    ("Tied", CROSS_ENTROPY, dict(weight_decay=0.1)), ("Tied", EVOLVED, {}),
    ("Replacing", EVOLVED, {}), ("Small", TAYLORGLO, dict(batch_size=32)),
    ("Small", TAYLORGLO, dict(batch_size=1000)),
    ("Small", TAYLORGLO, dict(momentum=0.0)), ("Small", EVOLVED, dict(add_cross_entropy=True)),
    ("Small", EVOLVED, dict(layout="contiguous")),
    ("Small", TAYLORGLO, dict(precision="bfloat16")), ("Tied", EVOLVED, dict(average_weights=2.0)),
    ("Whimsical", EVOLVED, dict(average_weights=0.5)),
    ("Small", EVOLVED, dict(average_weights=0.01)),  # of less than a step: the weights themselves
], ids=lambda value: str(value.get("lr_scale", value)) if isinstance(value, dict) else value)
def test_a_network_and_its_distilled_child_train_as_by_torch_optim_sgd(model, h, given, tmp_path):
    trainer = trainer_of(model, **given)
    for t in (task(tmp_path, 7, CROSS_ENTROPY), task(tmp_path, 0, h),
              task(tmp_path, 1, h, generation=1, parent=0, teacher=7, alpha=0.4)):
        trainer.evaluate(copy.deepcopy(t))
        assert_close(state_of(t), by_hand(trainer, t), rtol=1e-3, atol=1e-4)


def test_a_child_of_another_model_is_refused_with_the_tensors_name(tmp_path):
    trainer_of("Small").evaluate(task(tmp_path))
    with pytest.raises(RunError, match="another model.*twice.weight it has torch.*none"):
        trainer_of("Tied").evaluate(task(tmp_path, 1, parent=0, generation=1))


# Learning rates and other hyperparameters.


@pytest.mark.parametrize("config, h, rates", [
    (Config(dataset="cifar10"), {}, {0: 0.1, 59: 0.1, 60: 0.02, 119: 0.02, 120: 4e-3, 159: 4e-3,
                                     160: 8e-4, 199: 8e-4}),
    (Config(dataset="svhn"), {}, {0: 0.1, 19: 0.1, 20: 0.01, 29: 0.01, 30: 1e-3, 39: 1e-3}),
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


@pytest.mark.parametrize("h, precision", [(CROSS_ENTROPY, "bfloat16"), (TAYLORGLO, "float32")],
                         ids=["cross-entropy", "taylorglo"])
def test_training_learns(h, precision, tmp_path):
    Small.seen.clear()
    trainer = trainer_of(epochs=15, learning_rate=0.3, precision=precision)
    with settings(trainer.config):  # as in a run: an autocast around it all
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
    """Of an image of class 0 whose teacher is certain of 3, at y = (0.1, 0.2, 0.3, 0.4)."""
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
    model, wrong = model_with(trainer, state_of(task(tmp_path))), d.train.labels != d.clean_labels
    right = [[model(normalize(image[None], d.mean, d.std)).argmax().item() == label
              for image, label in zip(images, labels.tolist(), strict=True)]
             for images, labels in (
                 (d.validation.images, d.validation.labels), (d.test.images, d.test.labels),
                 (d.train.images[wrong][:, :, 1:-1, 1:-1], d.train.labels[wrong]))]
    assert individual.correct.tolist() == right[0] and individual.correct.dtype == bool
    assert individual.fitness == sum(right[0]) / 24
    assert individual.test_accuracy == sum(right[1]) / 30
    scores = all_metrics(trainer.config, d, model)
    assert scores.keys() == METRICS.keys() and scores["accuracy"] == individual.test_accuracy
    assert wrong.sum() == 36 and individual.scores == {"memorised": sum(right[2]) / 36}


def test_without_a_wrong_label_among_the_training_images_none_is_memorised(tmp_path):
    one = data(label_noise=0.5)
    one.clean_labels = one.train.labels.clone()  # all the wrong ones are for validation
    assert trainer_of("Small", one).evaluate(task(tmp_path)).scores == {}


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
