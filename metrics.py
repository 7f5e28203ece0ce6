"""What fitness is: a number from an individual's logits on the validation images, higher is better.

"As a black-box method, EPBT requires no gradient information but only the fitness value"
(Sec. 3.1).
"""

import math

import torch

from errors import ConfigError, RunError, message, nearest
from models import imported


def accuracy(logits, labels):
    """The share of images classified correctly. logits (N, C), labels (N,), on the CPU."""
    return (logits.argmax(1) == labels).double().mean().item()


def balanced_accuracy(logits, labels):
    """The mean over the classes of the share of their images that are classified correctly."""
    from sklearn.metrics import balanced_accuracy_score  # here, because its import takes a second

    return balanced_accuracy_score(labels, logits.argmax(1))


def f1_macro(logits, labels):
    """The mean over the classes of the harmonic mean of precision and recall."""
    from sklearn.metrics import f1_score

    return f1_score(labels, logits.argmax(1), average="macro", zero_division=0)


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
