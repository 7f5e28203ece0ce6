"""The fitness that people choose: metrics by hand, functions of their own, what is refused."""

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
    ("accuracy", 6 / 8),
    ("balanced-accuracy", (3 / 4 + 1 / 2 + 1) / 3),
    ("f1-macro", (3 / 4 + 1 / 2 + 1) / 3),  # precision and recall are 3/4, 1/2, 1
])
def test_metrics_by_hand(name, value):
    assert measured(name, LOGITS, LABELS) == pytest.approx(value)


@pytest.mark.parametrize("classes, images", [(2, 1), (7, 13), (1000, 300)])
def test_metrics_are_those_of_scikit_learn_also_where_classes_are_missing(classes, images):
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
    ("nowhere:f", ConfigError, "cannot import 'nowhere'"),
    ("json:loads", RunError, "raises TypeError"),
    ("tests.test_metrics:broken", RunError, "finite number, higher is better, not nan"),
])
def test_what_is_no_metric_costs_one_line(name, error, words):
    with pytest.raises(error, match=words) as raised:
        find_metric(name)
        measured(name, LOGITS, LABELS)
    assert "\n" not in str(raised.value)


def run(folder, fitness, **settings):
    labels = np.arange(90) % 3
    images = (80 * labels[:, None, None, None] * np.ones((1, 8, 8))).astype(np.uint8)
    config = Config(model="resnet8", population=4, generations=2, epochs=1, batch_size=16,
                    device="cpu", workers=1, threads=1, loss_backend="reference", out=str(folder),
                    **{} if callable(fitness) else {"fitness": fitness}, **settings)
    return evolve(config, train=(images, labels), test=(images, labels),
                  fitness=fitness if callable(fitness) else None)


@pytest.mark.parametrize("method, fitness", [("epbt", negative_loss), ("pbt", "balanced-accuracy")])
def test_a_run_is_selected_by_the_metric(method, fitness, tmp_path):
    summary = run(tmp_path / "run", fitness, method=method).summary
    best, scores = summary["best"], summary["test_scores"]
    assert best["fitness"] == summary["fitness"]
    assert best["scores"].keys() == {"validation_accuracy", "test_fitness"}
    own = callable(fitness)
    assert (best["fitness"] < 0) == own and [*scores][:3] == [*METRICS] and len(scores) == 3 + own
    assert best["scores"]["test_fitness"] == scores[[*scores][3] if own else fitness]


def test_networks_that_diverge_have_no_fitness_and_the_run_goes_on(tmp_path):
    """The metric of their logits is not finite."""
    summary = run(tmp_path / "run", negative_loss, learning_rate=1e30).summary
    assert summary["best"]["diverged"] and summary["fitness"] == 0
