"""The networks: their sizes, shapes and initialisation, and every form of a model's name."""

import math
import random
import sys
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from errors import ConfigError
from functions import import_name
from models import (
    MODELS,
    BasicBlock,
    FoldedResNet,
    PreActivationBlock,
    find_factory,
    make_model,
)

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


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_folded_resnet(device):
    """Its logits are those of the network in evaluation mode, also after the weights have changed."""
    model = make_model("resnet20", 7, 3, 0).to(device, torch.float32 if device == "cuda" else torch.float64)
    model.to(memory_format=torch.channels_last)
    dtype = model.fc.weight.dtype
    images = torch.randn(5, 3, 17, 14, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    with torch.no_grad(), torch.backends.cudnn.flags(allow_tf32=False):
        folded = FoldedResNet(model, dtype)
        for _ in range(2):
            model.train()(3 * torch.randn_like(images) + 1)
            for p in model.parameters():
                p.mul_(1 + 0.2 * torch.rand_like(p))
            folded.fold()
            tolerance = 1e-10 if device == "cpu" else 1e-3
            torch.testing.assert_close(folded(images), model.eval()(images), rtol=tolerance, atol=tolerance)


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


def test_a_factory_of_ones_own(own_module):
    assert make_model("zoo.own_nets:small", 5, 2, seed=0)(torch.zeros(3, 2, 8, 8)).shape == (3, 5)
    with pytest.raises(ConfigError, match="own_nets:nothing: the factory returned int, not a torch.nn.Module"):
        make_model("zoo.own_nets:nothing", 5, 2, seed=0)


@pytest.mark.parametrize("name, words", [
    ("resnet23", ["no model is called 'resnet23', did you mean 'resnet32'?", "wrn-28-5, torchvision:NAME"]),
    ("ResNet32", ["did you mean 'resnet32'?"]), ("zzz", ["no model is called 'zzz'; accepted are resnet8"]),
    ("", ["no model is called ''"]), (":small", ["no model is called ':small'"]),
    ("torchvision:resnet19", ["no classification model called 'resnet19', did you mean 'resnet18'?"]),
    ("torchvision:", ["no classification model called ''"]),
    ("no.such:thing", ["cannot import 'no.such' (ModuleNotFoundError: No module named 'no')"]),
    ("zoo.broken:net", ["cannot import 'zoo.broken' (ZeroDivisionError: division by zero)"]),
    ("zoo.own_nets:Smal", ["own_nets.py has no callable 'Smal', did you mean 'small'?"]),
    ("zoo.own_nets:number", ["own_nets.py has no callable 'number'"]),
])
def test_names_that_are_no_model(own_module, name, words):
    with pytest.raises(ConfigError, match="^--model") as error:
        make_model(name, 10, 3, seed=0)
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("name", [*MODELS, "torchvision:resnet18", "torchvision:vit_b_16"])
def test_names_that_are_models(name):
    assert callable(find_factory(name))


def local():
    def factory(num_classes, in_channels):
        return 1
    return factory


@pytest.mark.parametrize("factory, name", [
    (BasicBlock, "models:BasicBlock"), (nn.Linear, "torch.nn.modules.linear:Linear"), (local, f"{__name__}:local"),
    (local(), "not local.<locals>.factory"), (lambda x: x, "not <lambda>"), (make_model, "models:make_model"),
    (partial(local), "not an object of the class partial"), (nn.ReLU(), "not an object of the class ReLU"),
    ("resnet8", "not an object of the class str"), (nn.Linear.forward, "not Linear.forward"), (None, "NoneType")])
def test_the_name_by_which_a_worker_imports_a_function(factory, name):
    try:
        assert import_name(factory, "make(x)") == name
    except ConfigError as error:
        assert "at the top level of a module, called as make(x), not " in str(error) and name in str(error)
