"""The networks of Sec. 4.1, and any other classifier, by name.

A name is one of `MODELS` (`resnet32`, `wrn-16-8`, ...), `torchvision:NAME` for a classifier of
torchvision, or `package.module:factory` for your own, called as
`factory(num_classes=..., in_channels=...)`.
"""

import random
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from errors import ConfigError, nearest
from functions import find
from norm_relu import norm_relu


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters ([15], option A)."""

    def __init__(self, in_channels, channels, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.new_channels = channels - in_channels

    def forward(self, x):
        out = norm_relu(self.bn1, self.conv1(x))
        return norm_relu(self.bn2, self.conv2(out), self.shortcut(x))

    def shortcut(self, x):
        if self.new_channels == 0:
            return x
        # The same as x[:, :, ::stride, ::stride], whose gradient would not be channels last: that
        # costs a tenth of a step on a CPU.
        return F.pad(F.avg_pool2d(x, 1, self.stride), (0, 0, 0, 0, 0, self.new_channels))


class ResNet(nn.Module):
    """ResNet for CIFAR [15], `depth` = 6n + 2: three stages of n blocks, 16-32-64 channels."""

    def __init__(self, depth, num_classes, in_channels):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.blocks = stack(BasicBlock, [16, 16, 32, 64], (depth - 2) // 6)
        self.fc = nn.Linear(64, num_classes)
        he_init(self)

    def forward(self, x):
        x = norm_relu(self.bn, self.conv(x))
        return self.fc(self.blocks(x).mean((2, 3)))


class FoldedResNet:
    """A ResNet in evaluation mode, for a teacher. Each batch normalisation is folded into its
    convolution. On a GPU a convolution, its bias, the shortcut and ReLU are one kernel."""

    def __init__(self, resnet, dtype):
        self.resnet, self.dtype = resnet, dtype
        self.layers = [(resnet.conv, resnet.bn)]
        for block in resnet.blocks:
            self.layers += [(block.conv1, block.bn1), (block.conv2, block.bn2)]
        self.convolutions = [(torch.empty_like(conv.weight, dtype=dtype),
                              torch.empty_like(bn.bias, dtype=dtype)) for conv, bn in self.layers]
        self.fc = [torch.empty_like(p, dtype=dtype) for p in resnet.fc.parameters()]
        self.fold()

    @torch.no_grad()
    def fold(self):
        """Read the ResNet's present weights."""
        for (conv, bn), (weight, bias) in zip(self.layers, self.convolutions, strict=True):
            scale = bn.weight / (bn.running_var + bn.eps).sqrt()
            weight.copy_(conv.weight * scale[:, None, None, None])
            bias.copy_(bn.bias - bn.running_mean * scale)
        torch._foreach_copy_(self.fc, list(self.resnet.fc.parameters()))

    def __call__(self, x):
        first, *rest = self.convolutions
        x = convolution_relu(x.to(self.dtype), *first)
        for block, one, two in zip(self.resnet.blocks, rest[::2], rest[1::2], strict=True):
            out = convolution_relu(x, *one, block.stride)
            x = convolution_relu(out, *two, shortcut=block.shortcut(x))
        return F.linear(x.mean((2, 3)), *self.fc)


def convolution_relu(x, weight, bias, stride=1, shortcut=None):
    """ReLU of a 3x3 convolution with bias plus a shortcut."""
    # The fused operators of cuDNN do not know of deterministic algorithms.
    if not x.is_cuda or torch.are_deterministic_algorithms_enabled():
        out = F.conv2d(x, weight, bias, stride, padding=1)
        return F.relu(out if shortcut is None else out + shortcut)
    shape = [stride, stride], [1, 1], [1, 1], 1  # stride, padding, dilation, groups
    if shortcut is None:
        return torch.cudnn_convolution_relu(x, weight, bias, *shape)
    return torch.cudnn_convolution_add_relu(x, weight, shortcut, 1.0, bias, *shape)


class PreActivationBlock(nn.Module):
    """Batch normalisation and ReLU before each 3x3 convolution. The shortcut to a new shape is a
    1x1 convolution."""

    def __init__(self, in_channels, channels, stride):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        same = in_channels == channels and stride == 1
        self.shortcut = None if same else nn.Conv2d(in_channels, channels, 1, stride, bias=False)

    def forward(self, x):
        out = norm_relu(self.bn1, x)
        shortcut = x if self.shortcut is None else self.shortcut(out)
        out = self.conv2(norm_relu(self.bn2, self.conv1(out)))
        return out + shortcut


class WideResNet(nn.Module):
    """WRN-depth-width [53], `depth` = 6n + 4: three stages of n blocks, 16-32-64 channels times
    `width`."""

    def __init__(self, depth, width, num_classes, in_channels):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        channels = [16, 16 * width, 32 * width, 64 * width]
        self.blocks = stack(PreActivationBlock, channels, (depth - 4) // 6)
        self.bn = nn.BatchNorm2d(64 * width)
        self.fc = nn.Linear(64 * width, num_classes)
        he_init(self)

    def forward(self, x):
        x = norm_relu(self.bn, self.blocks(self.conv(x)))
        return self.fc(x.mean((2, 3)))


def stack(block, channels, blocks_per_stage):
    """Three stages from channels[i] to channels[i + 1]. The last two halve height and width."""
    layers = []
    for before, after, stride in zip(channels[:-1], channels[1:], (1, 2, 2), strict=True):
        layers.append(block(before, after, stride))
        layers += [block(after, after, stride=1) for _ in range(blocks_per_stage - 1)]
    return nn.Sequential(*layers)


def he_init(model):
    """He initialisation [14] of convolutions and linear layers: N(0, 2 / fan_in), biases 0."""
    for module in model.modules():
        # paper: unspecified: which layers, fan-in or fan-out
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


# The networks of Sec. 4.1. resnet8, wrn-10-1 and wrn-16-1 are small ones for a CPU.
WIDE = (10, 1), (16, 1), (10, 12), (16, 8), (22, 6), (28, 5)
MODELS = ({f"resnet{depth}": partial(ResNet, depth) for depth in (8, 20, 32, 56)}
          | {f"wrn-{depth}-{width}": partial(WideResNet, depth, width) for depth, width in WIDE})


def make_model(name: str, num_classes: int, in_channels: int, seed: int) -> nn.Module:
    """A new classifier on the CPU: images (B, in_channels, H, W) to logits (B, num_classes).

    Its weights depend on `seed` alone. The models in `MODELS` are float32 and take any height and
    width from 8 pixels on. Raises ConfigError for a name that is no model's, and whatever a factory
    of your own raises."""
    factory = find_factory(name)
    with random_states_kept():  # constructors draw from the global generators
        torch.default_generator.manual_seed(int(seed))
        seed_numpy_and_python(seed)
        model = factory(num_classes=num_classes, in_channels=in_channels)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"--model {name}: the factory returned {type(model).__name__}, not a "
                          "torch.nn.Module")
    return model


def random_states():
    """The states of the global generators on the CPU, from which a model may draw."""
    return torch.get_rng_state(), np.random.get_state(), random.getstate()


def set_random_states(states):
    for_torch, for_numpy, for_python = states
    torch.set_rng_state(for_torch)
    np.random.set_state(for_numpy)
    random.setstate(for_python)


def seed_numpy_and_python(seed):
    np.random.seed(seed % 2**32)
    random.seed(seed)


@contextmanager
def random_states_kept():
    """Put the global generators on the CPU back to their states afterwards."""
    before = random_states()
    try:
        yield
    finally:
        set_random_states(before)


def find_factory(name):
    """The callable behind a name. Raises ConfigError."""
    if name.startswith("torchvision:"):
        return torchvision_factory(name.partition(":")[2])
    return find(name, MODELS, "--model", "model", ", torchvision:NAME and package.module:factory")


def torchvision_factory(name):
    from torchvision import models  # here, as the import takes a second

    names = models.list_models(module=models)
    if name not in names:
        raise ConfigError(f"--model: torchvision has no classification model called {name!r}"
                          f"{nearest(name, names)}")
    # In training these two return a tuple unless their auxiliary heads are off.
    auxiliary = name in ("googlenet", "inception_v3")
    options = {"aux_logits": False, "init_weights": True} if auxiliary else {}

    def factory(num_classes, in_channels):
        model = models.get_model(name, weights=None, num_classes=num_classes, **options)
        return model if in_channels == 3 else replace_stem(model, in_channels)

    return factory


def replace_stem(model, in_channels):
    """Replace the first convolution by one for `in_channels` channels, He-initialised."""
    path, old = next((n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d))
    new = nn.Conv2d(in_channels, old.out_channels, old.kernel_size, old.stride, old.padding,
                    bias=old.bias is not None)
    he_init(new)
    model.set_submodule(path, new)
    return model
