"""The fitness that people choose: hand-worked metrics, functions of one's own, and what is refused."""

import warnings

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, f1_score

from epbt import Config, evolve
from errors import ConfigError, RunError
from metrics import METRICS, find_metric, measured

LABELS = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2])
PREDICTED = torch.tensor([0, 0, 0, 1, 1, 0, 2, 2])  # 3 of 4, 1 of 2 and 2 of 2 are right
LOGITS = torch.nn.functional.one_hot(PREDICTED, 3).float()


def negative_loss(logits, labels):
    """Higher is better, and never above 0."""
    return -torch.nn.functional.cross_entropy(logits, labels)


def broken(logits, labels):
    return float("nan")


@pytest.mark.parametrize("name, value", [
    ("accuracy", 6 / 8), ("balanced-accuracy", (3 / 4 + 1 / 2 + 1) / 3),
    # precision 3/4, 1/2, 1; recall 3/4, 1/2, 1
    ("f1-macro", (3 / 4 + 1 / 2 + 1) / 3),
])
def test_metrics_by_hand(name, value):
    assert measured(name, LOGITS, LABELS) == pytest.approx(value)


@pytest.mark.parametrize("classes, images", [(2, 1), (7, 13), (1000, 300)])
def test_metrics_are_those_of_scikit_learn_with_classes_missing_on_either_side(classes, images):
    for seed in range(20):
        rng = torch.Generator().manual_seed(seed)
        logits = torch.randn(images, classes, generator=rng)
        labels = torch.randint(0, classes, (images,), generator=rng)
        guess = logits.argmax(1)
        with warnings.catch_warnings():  # of classes that are only guessed
            warnings.simplefilter("ignore")
            balanced = balanced_accuracy_score(labels, guess)
        f1 = f1_score(labels, guess, average="macro", zero_division=0)
        assert measured("balanced-accuracy", logits, labels) == pytest.approx(balanced)
        assert measured("f1-macro", logits, labels) == pytest.approx(f1)


@pytest.mark.parametrize("name, error, words", [
    ("acuracy", ConfigError, "accuracy"), ("json:nothing", ConfigError, "no callable 'nothing'"),
    ("nowhere:f", ConfigError, "cannot import 'nowhere'"), ("json:loads", RunError, "raises TypeError"),
    ("tests.test_metrics:broken", RunError, "finite number, higher is better, not nan"),
])
def test_what_is_no_metric_costs_one_line(name, error, words):
    with pytest.raises(error, match=words) as raised:
        find_metric(name)
        measured(name, LOGITS, LABELS)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("method", ["epbt", "pbt"])
@pytest.mark.parametrize("fitness", ["balanced-accuracy", negative_loss])
def test_a_run_is_selected_by_the_metric(method, fitness, tmp_path):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (90, 1, 8, 8), dtype=np.uint8), np.arange(90) % 3
    config = Config(method=method, model="resnet8", population=4, generations=2, epochs=1, batch_size=16,
                    device="cpu", workers=1, threads=1, out=str(tmp_path / "run"), loss_backend="reference")
    named = {"fitness": fitness} if callable(fitness) else {}
    if not named:
        config = Config(**{**vars(config), "fitness": fitness})
    outcome = evolve(config, train=(images, labels), test=(images, labels), report=lambda line: None, **named)
    best = outcome.summary["best"]
    metric = METRICS.get(fitness, fitness)
    assert best["fitness"] == outcome.summary["fitness"]
    assert (best["fitness"] < 0) == (metric is negative_loss)
    assert best["scores"].keys() == {"validation_accuracy", "test_fitness"}
    scores = outcome.summary["test_scores"]
    assert list(scores)[:3] == list(METRICS) and len(scores) == 3 + (metric is negative_loss)
    name = fitness if fitness in METRICS else list(scores)[3]
    assert best["scores"]["test_fitness"] == scores[name]


def test_a_metric_of_ones_own_where_networks_diverge(tmp_path):
    """Their logits are not finite, and so is the metric: they have no say, and the run goes on."""
    images, labels = np.zeros((60, 1, 8, 8), np.uint8), np.arange(60) % 3
    images += np.uint8(80) * labels[:, None, None, None].astype(np.uint8)
    config = Config(model="resnet8", population=4, generations=2, epochs=1, batch_size=16,
                    learning_rate=1e30, device="cpu", workers=1, threads=1, out=str(tmp_path / "run"),
                    loss_backend="reference")
    outcome = evolve(config, train=(images, labels), test=(images, labels), fitness=negative_loss)
    assert outcome.summary["best"]["diverged"] and outcome.summary["fitness"] == 0
