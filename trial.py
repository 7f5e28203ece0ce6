"""One try of a model before the run: a parent and its distilled child are trained for a few steps on the CPU.

What a run needs of a model is tried, not asked: it trains, a child inherits its tensors by name, and a new model
that is given its state_dict answers as it does.
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
            say(f"{config.model} trains on contiguous images; channels last would be faster, but there it raises "
                f"{type(errors[0]).__name__}: {message(errors[0])}")
        return replace(config, layout=layout)
    shape = " x ".join(map(str, (data.channels, data.height, data.width)))
    raise ConfigError(f"--model {config.model}: it cannot be trained on batches of {config.batch_size} images of {shape} "
                      f"(channels, height, width): {type(errors[0]).__name__}: {message(errors[0])}") from errors[0]


class Refusal(Exception):
    """What is wrong with a model that trains."""


def try_model(config, data):
    batch = min(config.batch_size, len(data.train), 2)  # BatchNorm cannot train on one image, and may have to
    rows = torch.arange(STEPS * batch) % len(data.train)
    some = ImageSet(data.test.images[:2], data.test.labels[:2])
    data = replace(data, validation=some, test=some, train_clean=None,
                   train=ImageSet(data.train.images[rows], data.train.labels[rows]))
    trainer = Trainer(replace(config, batch_size=batch, epochs=1, fitness="accuracy", generations=2, milestones=()), data)
    refuse_shared(trainer)
    with tempfile.TemporaryDirectory() as folder:
        path = [Path(folder) / f"{i}.safetensors" for i in range(2)]
        h = {v.name: v.at(0.5) for v in config.search_space(data.augmentation.cutout)}
        try:
            trainer.evaluate(Task(Individual(0, 0, h), path[0]))
        finally:
            refuse_changes(config, trainer)
        trainer.evaluate(Task(Individual(1, 1, h, parent=0, teacher=0), path[1], path[0], path[0], alpha=0.5))
    refuse_hidden_state(trainer, some)


def refuse_shared(trainer):
    """Raise Refusal if two models of the factory share a tensor, so that one's training would change the other."""
    one, other = (trainer.new_network(seed).model for seed in range(2))
    if {id(t) for _, t in named_tensors(one)} & {id(t) for _, t in named_tensors(other)}:
        raise Refusal("its factory must make every parameter and buffer anew in each call, and two of its models share "
                      "some")
    first = next((leaf for leaf in one.modules() if not list(leaf.children())), None)
    if isinstance(first, nn.GroupNorm) and first.affine:  # PyTorch 2.11 would take this process with it
        raise Refusal("PyTorch crashes on a GroupNorm whose input needs no gradient; begin with another layer")


def refuse_changes(config, trainer):
    """Raise Refusal if training has added, removed or resized a tensor, so that no child could inherit it."""
    described = [{name: f"{t.dtype} {tuple(t.shape)}" for name, t in named_tensors(model)} for model in (
        trainer.new_network(seed=0).model, trainer.network.model)]
    for name in {**described[0], **described[1]}:
        before, after = (d.get(name, "absent") for d in described)
        if before != after:
            raise Refusal(f"its forward() changes the tensor {name}, {before} in a new model, to {after}: no child could "
                          "inherit it; a model must make its tensors in __init__ and keep their shapes")


@torch.no_grad()
def refuse_hidden_state(trainer, image_set):
    """Raise Refusal if a new model with the trained one's state_dict does not give the same logits."""
    # Laid out in memory alike, since other layouts round otherwise.
    model, delivered = trainer.network.model, trainer.new_network(SEED_OF_ANOTHER).model
    theirs = plain_attributes(delivered)
    changed = [name for name, value in plain_attributes(model).items() if theirs.get(name) != value]
    delivered.load_state_dict(model.state_dict())
    logits = []
    for network in (model, delivered):
        network.eval()
        torch.manual_seed(0)
        trainer.scored.model = network
        logits.append(Classifier(trainer, image_set).logits().copy())
    if not np.array_equal(*logits, equal_nan=True):
        named = f", such as {changed[0]}," if changed else ""
        raise Refusal(f"its logits depend on something{named} that its state_dict lacks: the delivered model would not be "
                      "the measured one; register it as a buffer")
