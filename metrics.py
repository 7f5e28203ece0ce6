"""Metrics: the fitness is one of them on the validation images. Higher is better.

Each takes logits (N, C) and labels (N,) on the CPU and returns a number.
"""

import math

import torch

from errors import RunError, message
from functions import find


def accuracy(logits, labels):
    """The share of images that are classified correctly."""
    return (logits.argmax(1) == labels).double().mean().item()


def balanced_accuracy(logits, labels):
    """The mean over the classes of the share of their images that are classified correctly."""
    right, images, _ = counts(logits, labels)
    return (right / images)[images > 0].mean().item()


def f1_macro(logits, labels):
    """The mean over the classes of the harmonic mean of precision and recall."""
    right, images, predicted = counts(logits, labels)
    return (2 * right / (images + predicted))[images + predicted > 0].mean().item()


def counts(logits, labels):
    """Three counts (C,) for the classes: of their images that are classified correctly, of all
    their images, and of the images that are classified as them."""
    # scikit-learn has the metrics too, but importing it takes each worker a second.
    guess, n = logits.argmax(1), logits.shape[1]
    return [x.bincount(minlength=n).double() for x in (labels[guess == labels], labels, guess)]


METRICS = {"accuracy": accuracy, "balanced-accuracy": balanced_accuracy, "f1-macro": f1_macro}


def find_metric(name):
    """The metric called by a name of METRICS or package.module:function. Raises ConfigError."""
    return find(name, METRICS, "--fitness", "metric", " and package.module:function")


def measured(name, logits, labels):
    """The value of a metric. Raises RunError if the metric fails or the value is not finite."""
    try:
        value = float(find_metric(name)(logits, labels))
    except Exception as error:  # whatever the user's function raises
        shapes = f"logits {tuple(logits.shape)}, labels {tuple(labels.shape)}"
        raise RunError(f"--fitness {name}: called as function({shapes}), it raises "
                       f"{type(error).__name__}: {message(error)}") from error
    if not math.isfinite(value):
        raise RunError(f"--fitness {name}: it must return a finite number, higher is better, "
                       f"not {value}")
    return value


def tried_metric(name, data):
    """Tries the metric on the validation labels. Raises RunError if it does not work."""
    labels = data.validation.labels
    measured(name, torch.zeros(len(labels), data.num_classes), labels)
