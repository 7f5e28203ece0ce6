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

# Parameters, for ten classes and three channels, and convolutions. A ResNet's name counts its
# linear layer too; a WRN's only the convolutions, 1x1 shortcuts included. Sec. 4.1: 0.47 million
# for ResNet-32, about 11 for the WRNs.
SIZES = {"resnet8": (75_290, 7), "resnet20": (269_722, 19), "resnet32": (464_154, 31),
         "resnet56": (853_018, 55), "wrn-10-1": (77_850, 9), "wrn-16-1": (175_066, 15),
         "wrn-10-12": (10_697_946, 10), "wrn-16-8": (10_961_370, 16),
         "wrn-22-6": (9_658_458, 22), "wrn-28-5": (9_132_634, 28)}
OWN = """
import random
import numpy as np
import torch
from torch import nn
def small(num_classes, in_channels):
    return nn.Sequential(nn.Flatten(), nn.Linear(in_channels * 64, num_classes))
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
    """zoo/own_nets.py and zoo/broken.py in the current folder, which is not in sys.path."""
    (tmp_path / "zoo").mkdir()
    (tmp_path / "zoo" / "own_nets.py").write_text(OWN)
    (tmp_path / "zoo" / "broken.py").write_text("1 / 0")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    yield
    for name in ("zoo", "zoo.own_nets", "zoo.broken"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", [*MODELS])
def test_parameters_and_convolutions(name):
    model = make_model(name, 10, 3, seed=0).eval()
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert (sum(p.numel() for p in model.parameters()), len(convolutions)) == SIZES[name]
    assert model(torch.zeros(1, 3, 8, 8)).shape == (1, 10) and MODELS.keys() == SIZES.keys()


@pytest.mark.parametrize("name", ["resnet8", "wrn-10-12"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32), (2, 9, 13)])
def test_any_image_size_and_channels(name, shape):
    model, stages = make_model(name, 7, shape[0], seed=0), []
    model.blocks.register_forward_hook(lambda module, args, out: stages.append(out.shape[2:]))
    logits = model(torch.rand(2, *shape, generator=torch.Generator().manual_seed(0)))
    assert logits.shape == (2, 7) and logits.isfinite().all()
    assert stages == [tuple(math.ceil(side / 4) for side in shape[1:])]  # halved twice


@pytest.mark.parametrize("name", ["resnet8", "torchvision:resnet18", "zoo.own_nets:drawn"])
def test_weights_depend_on_the_seed_alone_and_the_global_generators_stay(own_module, name):
    def states():
        return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()

    before = states()
    one = [*make_model(name, 10, 1, seed=5).parameters()]
    assert states() == before
    for draw in (lambda: torch.rand(3), np.random.rand, random.random):
        draw()
    assert all(map(torch.equal, one, make_model(name, 10, 1, seed=5).parameters()))
    assert not torch.equal(one[0], next(make_model(name, 10, 1, seed=6).parameters()))


def test_he_initialisation():
    model = make_model("resnet56", 10, 3, seed=1)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            scaled = module.weight.std().item() * math.sqrt(module.weight[0].numel() / 2)
            standard_error = 1 / math.sqrt(2 * module.weight.numel())
            assert scaled == pytest.approx(1, abs=5 * standard_error)
    assert not model.fc.bias.any()


def test_option_a_shortcut():
    x = torch.arange(1.0, 26.0).view(1, 1, 5, 5)
    shortcut = BasicBlock(1, 3, stride=2).shortcut(x)
    assert shortcut[0, 0].tolist() == [[1, 3, 5], [11, 13, 15], [21, 23, 25]]
    assert shortcut.shape == (1, 3, 3, 3) and not shortcut[0, 1:].any()
    assert BasicBlock(4, 4, stride=1).shortcut(x) is x


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("device, dtype, tolerance", [
    ("cpu", torch.float64, 1e-12), ("cpu", torch.bfloat16, 0.03),
    pytest.param("cuda", torch.float32, 1e-4, marks=pytest.mark.cuda),
    pytest.param("cuda", torch.bfloat16, 0.03, marks=pytest.mark.cuda)])
def test_folded_resnet(device, dtype, tolerance, channels):
    """Its logits are those of the network in evaluation mode, also after its weights change."""
    where = dict(device=device, dtype=dtype, memory_format=torch.channels_last)
    model = make_model("resnet20", 7, channels, 0).to(**where)
    images = torch.randn(5, channels, 17, 14).to(**where)
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        folded = FoldedResNet(model, dtype)
        for _ in range(2):
            model.train()(3 * torch.randn_like(images) + 1)
            for p in model.parameters():
                p.mul_(1 + 0.2 * torch.rand_like(p))
            folded.fold()
            expected = model.eval()(images)
            assert (folded(images) - expected).norm() < tolerance * expected.norm()


def test_pre_activation_block():
    x = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    same, wider = (PreActivationBlock(4, 4 * n, stride=n).eval() for n in (1, 2))
    for block in (same, wider):
        nn.init.zeros_(block.conv2.weight)  # leaves the shortcut alone
    assert torch.equal(same(x), x)
    activated = x.clamp(min=0) / math.sqrt(1 + 1e-5)  # by BatchNorm with its initial statistics
    torch.testing.assert_close(wider(x), wider.shortcut(activated))


def test_channels_last_is_kept():
    model, outputs = make_model("resnet8", 10, 3, seed=0).to(memory_format=torch.channels_last), []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, out: outputs.append(out))
    model(torch.zeros(2, 3, 32, 32).contiguous(memory_format=torch.channels_last))
    kept = [out.is_contiguous(memory_format=torch.channels_last) for out in outputs]
    assert kept == 3 * [True]


@pytest.mark.parametrize("name, stem, channels, shape", [
    *(("resnet18", "conv1", n, (64, n, 7, 7)) for n in (1, 3, 5)),
    ("googlenet", "conv1.conv", 1, (64, 1, 7, 7)),  # with auxiliary heads
    ("squeezenet1_0", "features.0", 2, (96, 2, 7, 7))])
def test_torchvision_models_return_logits_for_any_number_of_channels(name, stem, channels, shape):
    model = make_model(f"torchvision:{name}", 6, channels, seed=0)
    assert model(torch.zeros(2, channels, 64, 64)).shape == (2, 6)
    layer = model.get_submodule(stem)
    assert (layer.weight.shape, layer.stride) == (shape, (2, 2))
    assert layer.padding == ((0, 0) if name == "squeezenet1_0" else (3, 3))
    assert (layer.bias is not None) == (name == "squeezenet1_0")
    assert layer.bias is None or (layer.bias.shape == (96,) and not layer.bias.any())


@pytest.mark.parametrize("name, words", [
    ("resnet23", ["no model is called 'resnet23', did you mean 'resnet32'?", "torchvision:NAME"]),
    ("ResNet32", ["did you mean 'resnet32'?"]),
    ("zzz", ["no model is called 'zzz'; accepted are resnet8"]),
    ("", ["no model is called ''"]), (":small", ["no model is called ':small'"]),
    ("torchvision:resnet19", ["model called 'resnet19', did you mean 'resnet18'?"]),
    ("torchvision:", ["no classification model called ''"]),
    ("no.such:thing", ["cannot import 'no.such' (ModuleNotFoundError: No module named 'no')"]),
    ("zoo.broken:net", ["cannot import 'zoo.broken' (ZeroDivisionError: division by zero)"]),
    ("zoo.own_nets:Smal", ["own_nets.py has no callable 'Smal', did you mean 'small'?"]),
    ("zoo.own_nets:number", ["own_nets.py has no callable 'number'"]),
    ("zoo.own_nets:nothing", ["nothing: the factory returned int, not a torch.nn.Module"]),
])
def test_names_that_are_no_model(own_module, name, words):
    with pytest.raises(ConfigError, match="^--model") as error:
        make_model(name, 10, 3, seed=0)
    text = str(error.value)
    assert "\n" not in text and all(word in text for word in words), text


def test_other_names_that_are_models(own_module):
    assert callable(find_factory("torchvision:vit_b_16"))
    assert make_model("zoo.own_nets:small", 5, 2, seed=0)(torch.zeros(3, 2, 8, 8)).shape == (3, 5)


def local():
    def factory(num_classes, in_channels):
        return 1
    return factory


@pytest.mark.parametrize("factory, name", [
    (BasicBlock, "models:BasicBlock"), (nn.Linear, "torch.nn.modules.linear:Linear"),
    (local, f"{__name__}:local"), (make_model, "models:make_model"),
    (local(), "not local.<locals>.factory"), (lambda x: x, "not <lambda>"),
    (partial(local), "not an object of the class partial"),
    (nn.ReLU(), "not an object of the class ReLU"),
    ("resnet8", "not an object of the class str"), (nn.Linear.forward, "not Linear.forward"),
    (None, "NoneType")])
def test_the_name_by_which_a_worker_imports_a_function(factory, name):
    try:
        assert import_name(factory, "make(x)") == name
    except ConfigError as error:
        assert "at the top level of a module, called as make(x), not " in str(error)
        assert name in str(error)
