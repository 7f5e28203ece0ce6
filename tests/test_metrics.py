"""The fitness that people choose: hand-worked metrics, functions of one's own, and what is refused."""

import numpy as np
import pytest
import torch

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
