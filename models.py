"""The networks of Sec. 4.1, and any other classifier, by name.

A name is one of `MODELS` (`resnet32`, `wrn-16-8`, ...), `torchvision:NAME` for a classifier of torchvision,
or `package.module:factory` for your own, called as `factory(num_classes=..., in_channels=...)`.
"""

import importlib
import inspect
import os
import random
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from errors import ConfigError, message, nearest


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters (He et al. [15], option A)."""

    def __init__(self, in_channels, channels, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.new_channels = channels - in_channels

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x), inplace=True)

    def shortcut(self, x):
        if self.new_channels == 0:
            return x
        # As x[:, :, ::stride, ::stride], whose gradient would not be channels last: a tenth of a step on a CPU.
        return F.pad(F.avg_pool2d(x, 1, self.stride), (0, 0, 0, 0, 0, self.new_channels))


class ResNet(nn.Module):
    """ResNet for CIFAR [15] of `depth` = 6n + 2 layers: three stages of n blocks, 16-32-64 channels."""

    def __init__(self, depth, num_classes, in_channels):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.blocks = stack(BasicBlock, [16, 16, 32, 64], (depth - 2) // 6)
        self.fc = nn.Linear(64, num_classes)
        he_init(self)

    def forward(self, x):
        x = F.relu(self.bn(self.conv(x)), inplace=True)
        return self.fc(self.blocks(x).mean((2, 3)))


class PreActivationBlock(nn.Module):
    """Batch normalisation and ReLU before each 3x3 convolution; a 1x1 shortcut to a new shape."""

    def __init__(self, in_channels, channels, stride):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        same = in_channels == channels and stride == 1
        self.shortcut = None if same else nn.Conv2d(in_channels, channels, 1, stride, bias=False)

    def forward(self, x):
        out = F.relu(self.bn1(x), inplace=True)
        shortcut = x if self.shortcut is None else self.shortcut(out)
        out = self.conv1(out)
        out = self.conv2(F.relu(self.bn2(out), inplace=True))
        return out + shortcut


class WideResNet(nn.Module):
    """WRN-depth-width [53], `depth` = 6n + 4: three stages of n blocks, 16-32-64 times `width` channels."""

    def __init__(self, depth, width, num_classes, in_channels):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.blocks = stack(PreActivationBlock, [16, 16 * width, 32 * width, 64 * width], (depth - 4) // 6)
        self.bn = nn.BatchNorm2d(64 * width)
        self.fc = nn.Linear(64 * width, num_classes)
        he_init(self)

    def forward(self, x):
        x = F.relu(self.bn(self.blocks(self.conv(x))), inplace=True)
        return self.fc(x.mean((2, 3)))


def stack(block, channels, blocks_per_stage):
    """Three stages, from channels[i] to channels[i + 1]; the last two begin by halving height and width."""
    layers = []
    for before, after, stride in zip(channels[:-1], channels[1:], (1, 2, 2), strict=True):
        layers.append(block(before, after, stride))
        layers += [block(after, after, stride=1) for _ in range(blocks_per_stage - 1)]
    return nn.Sequential(*layers)


def he_init(model):
    """He initialisation [14] of every convolution and linear layer: N(0, 2 / fan_in), biases 0."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):  # paper: unspecified (which layers, fan-in or fan-out)
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


# Sec. 4.1; resnet8, wrn-10-1 and wrn-16-1 are small ones for a CPU.
MODELS = {
    "resnet8": partial(ResNet, 8),
    "resnet20": partial(ResNet, 20),
    "resnet32": partial(ResNet, 32),
    "resnet56": partial(ResNet, 56),
    "wrn-10-1": partial(WideResNet, 10, 1),
    "wrn-16-1": partial(WideResNet, 16, 1),
    "wrn-10-12": partial(WideResNet, 10, 12),
    "wrn-16-8": partial(WideResNet, 16, 8),
    "wrn-22-6": partial(WideResNet, 22, 6),
    "wrn-28-5": partial(WideResNet, 28, 5),
}


def make_model(name: str, num_classes: int, in_channels: int, seed: int) -> nn.Module:
    """A new classifier, float32 on the CPU: images (B, in_channels, H, W) to logits (B, num_classes).

    Its weights are a function of `seed` alone; the global random generators stay as they were. The models in
    `MODELS` take any height and width from 8 pixels on. Raises ValueError for a name that is not a model's.
    """
    factory = find_factory(name)
    # Constructors, other people's too, draw from the global generators: seed these, then restore them.
    with random_states_kept():
        torch.default_generator.manual_seed(int(seed))
        seed_numpy_and_python(seed)
        model = factory(num_classes=num_classes, in_channels=in_channels)
    if not isinstance(model, nn.Module):
        raise ValueError(f"model {name}: the factory returned {type(model).__name__}, not a torch.nn.Module")
    return model


def random_states():
    """Those of the global generators on the CPU, from which a model may draw."""
    return torch.get_rng_state(), np.random.get_state(), random.getstate()


def set_random_states(states):
    for set_state, state in zip((torch.set_rng_state, np.random.set_state, random.setstate), states, strict=True):
        set_state(state)


def seed_numpy_and_python(seed):
    np.random.seed(seed % 2**32)
    random.seed(seed)


@contextmanager
def random_states_kept():
    """What is drawn within changes nothing outside."""
    before = random_states()
    try:
        yield
    finally:
        set_random_states(before)


def model_error(name: str) -> str | None:
    """One line that says why `name` is not a model and what is, or None if it is one."""
    try:
        find_factory(name)
    except ValueError as error:
        return str(error)
    return None


def find_factory(name):
    """The callable behind a name, or ValueError with one clear line."""
    if name in MODELS:
        return MODELS[name]
    module, colon, attribute = name.partition(":")
    if module == "torchvision" and colon:
        return torchvision_factory(attribute)
    if module and attribute:
        return own_factory(module, attribute)
    raise ValueError(f"no model is called {name!r}{nearest(name, MODELS)}; accepted are {', '.join(MODELS)}, "
                     "torchvision:NAME and package.module:factory")


def torchvision_factory(name):
    from torchvision import models  # here, because it takes a second that no other model needs

    names = models.list_models(module=models)
    if name not in names:
        raise ValueError(f"torchvision has no classification model called {name!r}{nearest(name, names)}")
    # These two return a tuple while they train unless their auxiliary heads are off.
    options = {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}

    def factory(num_classes, in_channels):
        model = models.get_model(name, weights=None, num_classes=num_classes, **options)
        return model if in_channels == 3 else replace_stem(model, in_channels)

    return factory


def replace_stem(model, in_channels):
    """Replace the first convolution by one for `in_channels` channels, He-initialised."""
    path, old = next((path, m) for path, m in model.named_modules() if isinstance(m, nn.Conv2d))
    new = nn.Conv2d(in_channels, old.out_channels, old.kernel_size, old.stride, old.padding,
                    bias=old.bias is not None)
    he_init(new)
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, new)
    return model


def factory_name(factory):
    """The name of a factory, as worker processes find it and tables show it. Raises ConfigError for what has none."""
    if not (inspect.isfunction(factory) or inspect.isclass(factory)) or "<" in factory.__qualname__:
        what = getattr(factory, "__qualname__", f"an object of the class {type(factory).__name__}")
        raise ConfigError("make_model must be a function or class at the top level of a module, called as "
                          f"make_model(num_classes=..., in_channels=...), not {what}")
    module, main = factory.__module__, sys.modules["__main__"]
    if module == "__main__" and os.path.isfile(getattr(main, "__file__", "")):  # of a script, elsewhere a module
        name = main.__spec__.name if main.__spec__ else Path(main.__file__).stem
        if "." in name and not main.__spec__:
            raise ConfigError(f"make_model is in {Path(main.__file__).name}, which cannot be imported: there must be no "
                              "dot before .py")
        if sys.modules.setdefault(name, main) is main:  # not to be carried out again here
            module = name
    return f"{module}:{factory.__qualname__}"


def own_factory(module_name, attribute):
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last, so that a file of the user's never hides one of this repository
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's module raises while it is imported
        raise ValueError(f"model {module_name}:{attribute}: cannot import {module_name!r} "
                         f"({type(error).__name__}: {message(error)})") from error
    factory = getattr(module, attribute, None)
    if not callable(factory):
        where = getattr(module, "__file__", module_name)
        raise ValueError(f"model {module_name}:{attribute}: {where} has no callable "
                         f"{attribute!r}{nearest(attribute, vars(module))}")
    try:
        inspect.signature(factory).bind(num_classes=10, in_channels=3)
    except TypeError as error:
        raise ValueError(f"model {module_name}:{attribute}: it must be callable as factory(num_classes=..., "
                         f"in_channels=...) ({error})") from error
    return factory
