"""The networks: their sizes, shapes and initialisation, and every form of a model's name."""

import math
import random
import sys

import numpy as np
import pytest
import torch
from torch import nn

from models import MODELS, BasicBlock, PreActivationBlock, make_model, model_error
from training import mismatch

# Parameters, for ten classes and three channels, and convolutions. A ResNet's name counts its linear layer too; a
# WRN's only the convolutions, 1x1 shortcuts included. Sec. 4.1: 0.47 million for ResNet-32, about 11 for the WRNs.
SIZES = {
    "resnet8": (75_290, 7),
    "resnet20": (269_722, 19),
    "resnet32": (464_154, 31),
    "resnet56": (853_018, 55),
    "wrn-10-1": (77_850, 9),
    "wrn-16-1": (175_066, 15),
    "wrn-10-12": (10_697_946, 10),
    "wrn-16-8": (10_961_370, 16),
    "wrn-22-6": (9_658_458, 22),
    "wrn-28-5": (9_132_634, 28),
}


OWN = """
import random
import numpy as np
import torch
from torch import nn
def small(num_classes, in_channels): return nn.Sequential(nn.Flatten(), nn.Linear(in_channels * 64, num_classes))
def wrong(classes): return small(classes, 1)
def nothing(num_classes, in_channels): return 42
def lazy(num_classes, in_channels): return nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes))
def frozen(num_classes, in_channels): return small(num_classes, in_channels).requires_grad_(False)
def double(num_classes, in_channels): return small(num_classes, in_channels).double()
class OneAtATime(nn.Linear):
    def __init__(self, num_classes, in_channels): super().__init__(8, num_classes)
    def forward(self, x): return super().forward(x.mean((1, 2))) if self.training else x.mean((1, 2)).argmax(1)
class Pair(nn.Linear):
    def __init__(self, num_classes, in_channels): super().__init__(8, num_classes)
    def forward(self, x): return x, super().forward(x)
class Centred(nn.Linear):
    def __init__(self, num_classes, in_channels):
        super().__init__(8, num_classes)
        self.register_buffer("centre", torch.zeros(()))
    def forward(self, x):
        if self.training: self.centre = 0.9 * self.centre + 0.1 * x.mean()
        return super().forward(x.mean((1, 2)) - self.centre)
backbones = []
def shared(num_classes, in_channels):
    backbones[:] = backbones or [nn.Linear(8, 8)]
    return nn.Sequential(backbones[0], nn.Flatten(), nn.Linear(in_channels * 64, num_classes))
def projected(num_classes, in_channels, persistent=False):
    model = small(num_classes, in_channels)
    model.register_buffer("projection", torch.randn(3), persistent)
    return model
def kept(num_classes, in_channels): return projected(num_classes, in_channels, True)
def volume(num_classes, in_channels):
    return nn.Sequential(nn.Unflatten(1, (1, -1)), nn.Conv3d(1, 1, 1), small(num_classes, in_channels))
class Standardized(nn.Conv2d):
    def __init__(self, num_classes, in_channels): super().__init__(in_channels, num_classes, 8)
    def forward(self, x):
        flat = self.weight.view(self.weight.size(0), -1)
        return torch.nn.functional.conv2d(x, self.weight / flat.std(1)[:, None, None, None], self.bias).flatten(1)
def normalized(num_classes, in_channels):
    return nn.Sequential(nn.GroupNorm(1, in_channels), small(num_classes, in_channels))
def normalized_later(num_classes, in_channels):
    return nn.Sequential(nn.Conv2d(in_channels, in_channels, 1), normalized(num_classes, in_channels))
def drawn(num_classes, in_channels):
    model = small(num_classes, in_channels)
    with torch.no_grad():
        model[1].weight.mul_(random.random()).add_(np.random.rand())
    return model
number = 3
"""


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """The current folder holds zoo/own_nets.py and zoo/broken.py; nothing else says where they are."""
    (tmp_path / "zoo").mkdir()
    (tmp_path / "zoo" / "own_nets.py").write_text(OWN)
    (tmp_path / "zoo" / "broken.py").write_text("1 / 0")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    yield
    for name in ("zoo", "zoo.own_nets", "zoo.broken"):
        sys.modules.pop(name, None)


def test_table_is_complete():
    assert set(MODELS) == set(SIZES)


@pytest.mark.parametrize("name", SIZES)
def test_parameters_and_convolutions(name):
    model = make_model(name, 10, 3, seed=0).eval()
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert (sum(p.numel() for p in model.parameters()), len(convolutions)) == SIZES[name]
    assert model(torch.zeros(1, 3, 8, 8)).shape == (1, 10)


@pytest.mark.parametrize("name", ["resnet8", "wrn-10-12"])
@pytest.mark.parametrize("channels, height, width", [(1, 8, 8), (1, 28, 28), (3, 32, 32), (2, 9, 13)])
def test_any_image_size_and_channels(name, channels, height, width):
    model = make_model(name, 7, channels, seed=0)
    stages = []
    model.blocks.register_forward_hook(lambda module, args, out: stages.append(out.shape[2:]))
    logits = model(torch.rand(2, channels, height, width, generator=torch.Generator().manual_seed(0)))
    assert logits.shape == (2, 7) and logits.isfinite().all()
    assert stages == [(math.ceil(height / 4), math.ceil(width / 4))]  # halved twice


def test_weights_are_a_function_of_the_seed():
    one, same, other = (make_model("resnet8", 10, 1, seed).state_dict() for seed in (5, 5, 6))
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert not torch.equal(one["conv.weight"], other["conv.weight"])


@pytest.mark.parametrize("name", ["resnet8", "torchvision:resnet18", "zoo.own_nets:small"])
def test_global_generator_is_left_alone(own_module, name):
    torch.manual_seed(123)
    before = torch.get_rng_state()
    first = make_model(name, 10, 1, seed=9)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)  # what the caller drew in between does not matter
    for a, b in zip(first.parameters(), make_model(name, 10, 1, seed=9).parameters(), strict=True):
        assert torch.equal(a, b)


def test_what_a_factory_draws_from_numpy_and_python_is_of_the_seed_too(own_module):
    before = random.getstate(), np.random.get_state()[1].tolist()
    one, same, other = (make_model("zoo.own_nets:drawn", 10, 1, seed)[1].weight for seed in (3, 3, 4))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert before == (random.getstate(), np.random.get_state()[1].tolist())


def test_he_initialisation():
    model = make_model("resnet56", 10, 3, seed=1)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            fan_in = module.weight[0].numel()
            standard_error = 1 / math.sqrt(2 * module.weight.numel())
            assert module.weight.std().item() * math.sqrt(fan_in / 2) == pytest.approx(1, abs=5 * standard_error)
    assert not model.fc.bias.any()


def test_option_a_shortcut():
    x = torch.arange(1.0, 26.0).view(1, 1, 5, 5)
    shortcut = BasicBlock(1, 3, stride=2).shortcut(x)
    assert shortcut[0, 0].tolist() == [[1, 3, 5], [11, 13, 15], [21, 23, 25]]
    assert shortcut.shape == (1, 3, 3, 3) and not shortcut[0, 1:].any()
    assert BasicBlock(4, 4, stride=1).shortcut(x) is x


def test_pre_activation_block():
    x = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    same, wider = PreActivationBlock(4, 4, stride=1).eval(), PreActivationBlock(4, 8, stride=2).eval()
    for block in (same, wider):
        nn.init.zeros_(block.conv2.weight)  # leaves the shortcut alone
    assert torch.equal(same(x), x)
    activated = x.clamp(min=0) / math.sqrt(1 + 1e-5)  # batch normalisation with its initial statistics
    torch.testing.assert_close(wider(x), wider.shortcut(activated))


def test_channels_last_is_kept():
    model = make_model("resnet8", 10, 3, seed=0).to(memory_format=torch.channels_last)
    outputs = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, out: outputs.append(out))
    model(torch.zeros(2, 3, 32, 32).contiguous(memory_format=torch.channels_last))
    assert len(outputs) == 3 and all(out.is_contiguous(memory_format=torch.channels_last) for out in outputs)


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_torchvision_models(channels):
    model = make_model("torchvision:resnet18", 6, channels, seed=0)
    assert model(torch.zeros(2, channels, 32, 32)).shape == (2, 6)
    stem = model.conv1
    assert (stem.weight.shape, stem.stride, stem.padding) == ((64, channels, 7, 7), (2, 2), (3, 3))


def test_torchvision_model_with_auxiliary_heads_returns_logits():
    model = make_model("torchvision:googlenet", 6, 1, seed=0)
    assert model(torch.zeros(2, 1, 64, 64)).shape == (2, 6)


def test_replaced_stem_keeps_its_bias():
    stem = make_model("torchvision:squeezenet1_0", 6, 2, seed=0).features[0]
    assert stem.weight.shape == (96, 2, 7, 7) and stem.bias.shape == (96,) and not stem.bias.any()


def test_own_factory(own_module):
    assert model_error("zoo.own_nets:small") is None
    assert make_model("zoo.own_nets:small", 5, 2, seed=0)(torch.zeros(3, 2, 8, 8)).shape == (3, 5)


def test_factory_that_makes_no_module(own_module):
    with pytest.raises(ValueError, match="own_nets:nothing: the factory returned int, not a torch.nn.Module"):
        make_model("zoo.own_nets:nothing", 5, 2, seed=0)


@pytest.mark.parametrize("name, words", [
    ("resnet23", ["no model is called 'resnet23', did you mean 'resnet32'?", "wrn-28-5, torchvision:NAME"]),
    ("ResNet32", ["did you mean 'resnet32'?"]),
    ("zzz", ["no model is called 'zzz'; accepted are resnet8"]),
    ("", ["no model is called ''"]),
    (":small", ["no model is called ':small'"]),
    ("torchvision:resnet19", ["no classification model called 'resnet19', did you mean 'resnet18'?"]),
    ("torchvision:", ["no classification model called ''"]),
    ("no.such:thing", ["cannot import 'no.such' (ModuleNotFoundError: No module named 'no')"]),
    ("zoo.broken:net", ["cannot import 'zoo.broken' (ZeroDivisionError: division by zero)"]),
    ("zoo.own_nets:Smal", ["own_nets.py has no callable 'Smal', did you mean 'small'?"]),
    ("zoo.own_nets:number", ["own_nets.py has no callable 'number'"]),
    ("zoo.own_nets:wrong", ["factory(num_classes=..., in_channels=...)", "required argument: 'classes'"]),
])
def test_names_that_are_no_model(own_module, name, words):
    line = model_error(name)
    assert "\n" not in line and all(word in line for word in words), line
    with pytest.raises(ValueError) as error:
        make_model(name, 10, 3, seed=0)
    assert str(error.value) == line


@pytest.mark.parametrize("name", [*MODELS, "torchvision:resnet18", "torchvision:vit_b_16"])
def test_names_that_are_models(name):
    assert model_error(name) is None


@pytest.mark.parametrize("name, shape, words", [
    ("resnet8", (1, 8, 8), None),
    ("torchvision:googlenet", (3, 64, 64), None),
    ("zoo.own_nets:small", (3, 8, 8), None),
    ("zoo.own_nets:small", (3, 8, 9), ["trained on batches of 5 images of 3 x 8 x 9", "RuntimeError: mat1 and mat2"]),
    ("zoo.own_nets:lazy", (3, 8, 8), ["lazy layers"]),
    ("zoo.own_nets:frozen", (3, 8, 8), ["does not require grad"]),
    ("zoo.own_nets:double", (3, 8, 8), ["must be float32, not torch.float64"]),
    ("zoo.own_nets:OneAtATime", (3, 8, 8), ["a tensor (2, 7), not (2,)"]),
    ("zoo.own_nets:Pair", (3, 8, 8), ["a tensor (2, 7), not tuple"]),
    ("zoo.own_nets:Centred", (3, 8, 8), ["forward() replaces the buffer centre", "copy_()"]),
    ("zoo.own_nets:shared", (3, 8, 8), ["every parameter and buffer anew in each call"]),
    ("zoo.own_nets:projected", (3, 8, 8), ["its buffer projection is drawn at random", "persistent=True"]),
    ("zoo.own_nets:kept", (3, 8, 8), None),
    ("zoo.own_nets:volume", (3, 8, 8), ["RuntimeError: required rank 4 tensor to use channels_last format"]),
    ("zoo.own_nets:Standardized", (3, 8, 8), ["RuntimeError: view size is not compatible"]),  # weights are channels last
    ("zoo.own_nets:normalized", (3, 8, 8), ["PyTorch crashes on a GroupNorm whose input needs no gradient"]),
    ("zoo.own_nets:normalized_later", (3, 8, 8), None),
    ("zoo.own_nets:nothing", (3, 8, 8), ["returned int"]),
    ("torchvision:vit_b_16", (3, 32, 32), ["AssertionError: Wrong image height! Expected 224 but got 32!"]),
])
def test_a_model_that_does_not_fit_the_data_is_told_in_a_line(own_module, name, shape, words):
    before = torch.get_rng_state()
    line = mismatch(name, 7, shape, batch_size=5)
    assert torch.equal(torch.get_rng_state(), before)
    assert line is None if words is None else "\n" not in line and all(word in line for word in [name, *words]), line


def test_too_many_outputs_are_a_mismatch(own_module, monkeypatch):
    monkeypatch.setitem(MODELS, "wide", lambda num_classes, in_channels: make_model("resnet8", 99, in_channels, seed=0))
    assert "must return a tensor (2, 10), not (2, 99)" in mismatch("wide", 10, (3, 8, 8), batch_size=5)


def test_a_batch_of_one_image_is_tried_as_one():
    words = "cannot be trained on batches of 1 images of 3 x 32 x 32 (channels, height, width): ValueError: Expected more"
    assert words in mismatch("torchvision:resnet18", 10, (3, 32, 32), batch_size=1)
    assert mismatch("resnet8", 10, (3, 8, 8), batch_size=1) is None
