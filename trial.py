"""One try of a model before the run: a parent and its distilled child train a few steps on the CPU.

What a run needs of a model is tried, not asked: it trains, twice to the same end; a child inherits
its tensors by name; and a new model that is given its state_dict answers as it does.
"""

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from data import ImageSet
from errors import ConfigError, message
from models import random_states_kept
from records import Individual
from settings import settings
from training import Classifier, Task, Trainer, named_tensors, plain_attributes

STEPS = 4  # so that what a model changes in its third step is seen
SEED_OF_ANOTHER = 1


def tried(config, data, say):
    """The config with its layout settled. say: called with a line if that is not channels last.

    Raises ConfigError, whose line says why the model cannot be trained on these images."""
    layouts = ("channels-last", "contiguous") if config.layout == "auto" else (config.layout,)
    errors = []
    for layout in layouts:
        try:
            with settings(replace(config, device="cpu", threads=1)), random_states_kept():
                try_model(replace(config, device="cpu", layout=layout), data)
        except Refusal as error:
            raise ConfigError(f"--model {config.model}: {error}") from error
        except ConfigError:
            raise
        except Exception as error:  # whatever the user's model raises
            errors.append(error)
            continue
        if errors:
            say(f"{config.model} trains on contiguous images; channels last would be faster, but "
                f"there it raises {type(errors[0]).__name__}: {message(errors[0])}")
        return replace(config, layout=layout)
    shape = " x ".join(map(str, (data.channels, data.height, data.width)))
    error = errors[-1]
    raise ConfigError(f"--model {config.model}: it cannot be trained on batches of "
                      f"{config.batch_size} images of {shape} (channels, height, width): "
                      f"{type(error).__name__}: {message(error)}") from error


class Refusal(Exception):
    """What is wrong with a model that trains."""


def try_model(config, data):
    batch = min(config.batch_size, len(data.train), 2)  # BatchNorm cannot train on one image
    rows = torch.arange(STEPS * batch) % len(data.train)
    some = ImageSet(data.test.images[:2], data.test.labels[:2])
    data = replace(data, validation=some, test=some, train_clean=None,
                   train=ImageSet(data.train.images[rows], data.train.labels[rows]))
    config = replace(config, batch_size=batch, epochs=1, generations=2, milestones=(),
                     fitness="accuracy")
    trainer = Trainer(config, data)
    refuse_shared(trainer)
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{i}.safetensors" for i in range(3)]
        h = {v.name: v.at(0.5) for v in config.search_space(data.augmentation.cutout)}
        for path in paths[:2]:
            try:
                trainer.evaluate(Task(Individual(0, 0, h), path))
            finally:
                refuse_changes(trainer)
        trainer.evaluate(Task(Individual(1, 1, h, 0, teacher=0), paths[2], path, path, alpha=0.5))
        refuse_hidden_state(trainer, some)
        if paths[0].read_bytes() != paths[1].read_bytes():
            raise Refusal("trained twice alike, it ends differently: it keeps something outside "
                          "its parameters and buffers, or has a random generator of its own; a run "
                          "could not be repeated or resumed")


def refuse_shared(trainer):
    """Raise Refusal if two models of the factory share a tensor: training one changes the other."""
    one, other = (trainer.new_network(seed).model for seed in range(2))
    if {id(t) for _, t in named_tensors(one)} & {id(t) for _, t in named_tensors(other)}:
        raise Refusal("its factory must make every parameter and buffer anew in each call, and two "
                      "of its models share some")
    first = next((leaf for leaf in one.modules() if not list(leaf.children())), None)
    if isinstance(first, nn.GroupNorm) and first.affine:  # with PyTorch 2.11 the process dies
        raise Refusal("PyTorch crashes on a GroupNorm whose input needs no gradient; begin with "
                      "another layer")


def refuse_changes(trainer):
    """Raise Refusal if training has added, removed, resized or replaced a tensor, so that no child
    could inherit it."""
    described = [{name: f"{t.dtype} {tuple(t.shape)}" for name, t in named_tensors(model)}
                 for model in (trainer.new_network(seed=0).model, trainer.network.model)]
    for name in {**described[0], **described[1]}:
        before, after = (d.get(name, "absent") for d in described)
        if before != after:
            raise Refusal(f"its forward() changes the tensor {name}, {before} in a new model, to "
                          f"{after}: no child could inherit it; a model must make its tensors in "
                          "__init__ and keep their shapes")


@torch.no_grad()
def refuse_hidden_state(trainer, image_set):
    """Raise Refusal if a new model with the trained one's state_dict gives other logits."""
    # Laid out in memory alike, since other layouts round otherwise.
    model, delivered = trainer.network.model, trainer.new_network(SEED_OF_ANOTHER).model
    usual = plain_attributes(delivered)
    changed = [n for n, value in plain_attributes(model).items() if usual.get(n) != value]
    delivered.load_state_dict(model.state_dict())
    logits = []
    for network in (model, delivered):
        network.eval()
        torch.manual_seed(0)
        trainer.scored.model = network
        logits.append(Classifier(trainer, image_set).logits().copy())
    if not np.array_equal(*logits, equal_nan=True):
        named = f", such as {changed[0]}," if changed else ""
        raise Refusal(f"its logits depend on something{named} that its state_dict lacks: the "
                      "delivered model would not be the measured one; register it as a buffer")
