"""One try of a model before the run: a parent and its distilled child train a few steps on the CPU.

The model must train; a second training must end in the same bytes; a child must inherit its tensors
by name; and a new model with its state_dict must give the same logits.
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
from network import named_tensors, plain_attributes
from records import Individual
from settings import settings
from training import Classifier, Task, Trainer

STEPS = 4  # enough to see a change that a model makes in its third step


def tried(config, data, say):
    """The config with the first layout in which its model trains. say: called with a line if that
    is the second. Raises ConfigError if the model does not train on these images."""
    layouts = ("channels-last", "contiguous") if config.layout == "auto" else (config.layout,)
    errors = []
    for layout in layouts:
        try:
            with settings(replace(config, device="cpu", threads=1)), random_states_kept():
                try_model(replace(config, device="cpu", layout=layout), data)
        except ConfigError:
            raise
        except Exception as error:  # whatever the user's model raises
            errors.append(error)
        else:
            if errors:
                say(f"{config.model} trains on contiguous images; channels last would be faster, "
                    f"but there it raises {type(errors[0]).__name__}: {message(errors[0])}")
            return replace(config, layout=layout)
    error = errors[-1]
    shape = f"{data.channels} x {data.height} x {data.width} (channels, height, width)"
    raise refusal(config, f"it cannot be trained on images of {shape}: {type(error).__name__}: "
                  f"{message(error)}") from error


def refusal(config, why):
    return ConfigError(f"--model {config.model}: {why}")


def try_model(config, data):
    """Raise ConfigError for a model that trains, but not as a run needs it."""
    batch = min(config.batch_size, len(data.train), 2)
    rows = torch.arange(STEPS * batch) % len(data.train)
    some = ImageSet(data.test.images[:2], data.test.labels[:2])
    data = replace(data, validation=some, test=some, clean_labels=None,
                   train=ImageSet(data.train.images[rows], data.train.labels[rows]))
    trainer = Trainer(replace(config, batch_size=batch, epochs=1, generations=2, milestones=(),
                              fitness="accuracy"), data)
    model = trainer.new_network(0).model
    first = next((leaf for leaf in model.modules() if not list(leaf.children())), None)
    if isinstance(first, nn.GroupNorm) and first.affine and config.layout == "channels-last":
        raise NotImplementedError("PyTorch crashes on a GroupNorm whose input needs no gradient")
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{i}.safetensors" for i in range(3)]
        h = {v.name: v.at(0.5) for v in config.search_space(data.augmentation.cutout)}
        for path in paths[:2]:
            try:
                trainer.evaluate(Task(Individual(0, 0, h), path))
            finally:
                refuse_changes(trainer, model)
        trainer.evaluate(Task(Individual(1, 1, h, 0, teacher=0), paths[2], path, path, alpha=0.5))
        refuse_hidden_state(trainer, some)
        if paths[0].read_bytes() != paths[1].read_bytes():
            raise refusal(config, "trained twice alike, it ends differently: it shares a tensor "
                          "with other models of its factory, keeps something outside its "
                          "parameters and buffers, or has a random generator of its own; a run "
                          "could not be repeated or resumed")


def refuse_changes(trainer, new):
    """Refuse a model if training has added, removed or resized a tensor: no child could inherit
    it. new: an untrained model."""
    before, after = ({name: f"{t.dtype} {tuple(t.shape)}" for name, t in named_tensors(model)}
                     for model in (new, trainer.network.model))
    for name in before | after:
        was, now = before.get(name, "absent"), after.get(name, "absent")
        if was != now:
            raise refusal(trainer.config, f"its forward() changes the tensor {name}, {was} in a "
                          f"new model, to {now}: no child could inherit it; a model must make its "
                          "tensors in __init__ and keep their shapes")


@torch.no_grad()
def refuse_hidden_state(trainer, image_set):
    """Refuse a model if a new one with its state_dict gives other logits."""
    # A Network, so that both have the same memory layout and round alike.
    model, delivered = trainer.network.model, trainer.new_network(seed=1).model
    usual = plain_attributes(delivered)
    changed = [n for n, value in plain_attributes(model).items() if usual.get(n) != value]
    delivered.load_state_dict(model.state_dict())
    logits = []
    for network in (model, delivered):
        network.eval()
        torch.manual_seed(0)
        trainer.scored.model = network
        logits.append(Classifier(trainer, image_set).logits())
    if not np.array_equal(*logits, equal_nan=True):
        named = f", such as {changed[0]}," if changed else ""
        raise refusal(trainer.config, f"its logits depend on something{named} that its state_dict "
                      "lacks: the delivered model would not be the measured one; register it as a "
                      "buffer")
