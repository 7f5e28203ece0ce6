"""What fitness is: a number from an individual's logits on the validation images, higher is better.

"As a black-box method, EPBT requires no gradient information but only the fitness value"
(Sec. 3.1).
"""

import math

import torch

from errors import ConfigError, RunError, message, nearest
from functions import imported


def accuracy(logits, labels):
    """The share of images classified correctly. logits (N, C), labels (N,), on the CPU."""
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
    """Of each class: its images that are classified correctly, all its images, and the images that
    are classified as it."""
    # scikit-learn has these metrics too, but its import takes each worker a second.
    guess, n = logits.argmax(1), logits.shape[1]
    return [x.bincount(minlength=n).double() for x in (labels[guess == labels], labels, guess)]


METRICS = {"accuracy": accuracy, "balanced-accuracy": balanced_accuracy, "f1-macro": f1_macro}


def find_metric(name):
    """The function behind a name: of METRICS, or package.module:function. Raises ConfigError."""
    if name in METRICS:
        return METRICS[name]
    module, _, function = name.partition(":")
    if not module or not function:
        raise ConfigError(f"--fitness: no metric is called {name!r}{nearest(name, METRICS)}; "
                          f"accepted are {', '.join(METRICS)} and package.module:function")
    return imported("--fitness", module, function)


def measured(name, logits, labels):
    """The metric of logits and labels, tensors on the CPU. Raises RunError if it is not finite."""
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
    """Raise RunError before the run if the metric does not work on these validation labels."""
    labels = data.validation.labels
    measured(name, torch.zeros(len(labels), data.num_classes), labels)
