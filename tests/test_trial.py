"""Models that do what a training loop does not expect: the accuracy that a run records is that of
the model which it delivers, or the model is refused in one line before the run."""

import copy

import pytest
import torch
import torch.nn.functional as F
from small import Small, assert_close, by_hand, small, state_of, stripes, task, trainer_of
from torch import nn

from config import Config
from data import normalize
from epbt import evolve
from errors import ConfigError
from records import read_log

pytestmark = pytest.mark.usefixtures("one_thread")


# What must train. `small` makes a model of each function, which acts before each forward pass.


@small()
def MaxNorm(model, x):
    """As EEGNet: the weight's memory is replaced."""
    model.conv.weight.data = torch.renorm(model.conv.weight.data, 2, 0, 0.5)


@small()
def Remaking(model, x):
    model.conv.weight = nn.Parameter(model.conv.weight.detach() * 0.99)


@small(centre=torch.zeros(()))
def Centred(model, x):
    """A running mean, as DINO's, whose memory is replaced."""
    if model.training:
        model.centre.data = 0.5 * model.centre + 0.5 * x.std()
    return 1 + model.centre


@small()
def ZeroGrad(model, x):
    model.zero_grad()


@small()
def Unfreezing(model, x):
    """Its first layer is trained from the third step on."""
    model.calls = getattr(model, "calls", 0) + model.training
    model.conv.requires_grad_(model.calls >= 3)


@small()
def InPlace(model, x):
    x.sub_(0.5).mul_(2)


class Copying(Small):
    """As InPlace, but the images that it is given stay as they are."""

    def features(self, x):
        return super().features((x - 0.5) * 2)


class Shared(Small):
    """One tensor registered as two buffers, and complex numbers."""

    def __init__(self, num_classes, in_channels):
        super().__init__(num_classes, in_channels)
        self.register_buffer("one", torch.zeros(1))
        self.register_buffer("same", self.one)
        self.register_buffer("turn", torch.ones((), dtype=torch.complex128))

    def features(self, x):
        if self.training:
            self.one += 0.1
            self.turn *= 1j
        return super().features(x) * (2 + self.same + self.turn.real.float())


class Volume(nn.Module):
    """With a weight of five dimensions, of complex numbers and of double precision."""

    def __init__(self, num_classes, in_channels):
        super().__init__()
        self.conv, self.fc = nn.Conv3d(1, 4, 3), nn.Linear(4, num_classes).double()
        self.turned = nn.Parameter(torch.randn(4, dtype=torch.complex64))

    def forward(self, x):
        x = F.relu(self.conv(x.repeat(1, 3, 1, 1)[:, None])).mean((2, 3, 4))
        return self.fc((x * self.turned).real.double())


class View(Small):
    """As thousands of published models: only contiguous images can be viewed."""

    def features(self, x):
        return F.avg_pool2d(F.relu(self.bn(self.conv(x))), 2).view(len(x), -1)


def GroupNormFirst(num_classes, in_channels):
    """On channels last PyTorch crashes where the input of a GroupNorm needs no gradient."""
    return nn.Sequential(nn.GroupNorm(1, 1), Small(num_classes, in_channels))


class NoSelf(Small):
    """Its train() returns nothing, and so does eval()."""

    def train(self, mode=True):
        super().train(mode)


def run(model, folder, say=lambda line: None, **given):
    tiny = dict(population=2, generations=2, epochs=2, batch_size=16, learning_rate=0.05, threads=1,
                workers=1, device="cpu", loss="cross-entropy", loss_backend="reference")
    config = Config(**tiny | given, out=str(folder))
    return evolve(config, model, stripes(96, 0), stripes(60, 1), report=say)


@pytest.mark.parametrize("model", [MaxNorm, Remaking, Centred, ZeroGrad, Unfreezing, InPlace,
                                   Shared, Volume, View, GroupNormFirst, NoSelf])
@pytest.mark.parametrize("given", [{}, dict(average_weights=0.5)], ids=["", "averaged"])
def test_the_recorded_accuracy_is_that_of_the_delivered_model(model, given, tmp_path):
    lines = []
    outcome = run(model, tmp_path / "run", lines.append, **given)
    d, delivered = outcome.data, outcome.model
    assert not any(module.training for module in delivered.modules())
    with torch.no_grad():
        images = normalize(d.test.images, d.mean, d.std)
        logits = delivered(images.clone(memory_format=torch.contiguous_format))
    accuracy = (logits.argmax(1) == d.test.labels).double().mean().item()
    assert outcome.summary["test_accuracy"] == accuracy and accuracy > 0.4
    assert not any("WARNING" in line for line in lines)
    assert any("channels last would be faster" in line for line in lines) == (
        model in (View, GroupNormFirst))


def test_a_model_that_changes_its_input_trains_as_one_that_copies_it(tmp_path):
    logs = []
    for model in (InPlace, Copying):
        run(model, tmp_path / model.__name__, generations=3)
        logs.append(read_log(tmp_path / model.__name__))
    assert logs[0] == logs[1]


def test_a_layer_that_is_unfrozen_moves_as_under_torch_optim_sgd(tmp_path):
    trainer = trainer_of("test_trial:Unfreezing")
    for t in (task(tmp_path), task(tmp_path, 1, generation=1, parent=0, teacher=0, alpha=0.5)):
        trainer.evaluate(copy.deepcopy(t))
        assert_close(state_of(t), by_hand(trainer, t), rtol=1e-4, atol=1e-5)
        assert state_of(t)["momentum/conv.weight"].abs().max() > 0


# What cannot be inherited, delivered or repeated.


class LazyHead(Small):
    def forward(self, x):
        f = self.features(x)
        if not hasattr(self, "head"):
            self.head = nn.Linear(f.shape[1], self.fc.out_features)
        return self.head(f)


@small(range=torch.empty(0))
def Resized(model, x):
    model.range.resize_(2).copy_(torch.stack([x.min(), x.max()]))


@small()
def Cooling(model, x):
    model.temperature = getattr(model, "temperature", 8.0) * (0.9 if model.training else 1)
    return 1 / model.temperature


@small()
def PlainTensor(model, x):
    model.scale = getattr(model, "scale", torch.ones(1)) + 0.5 * model.training
    return model.scale


class Unsaved(Small):
    """A buffer that its state_dict lacks."""

    def __init__(self, num_classes, in_channels):
        super().__init__(num_classes, in_channels)
        self.register_buffer("scale", torch.ones(1), persistent=False)

    def features(self, x):
        self.scale += 0.5 * self.training
        return super().features(x) * self.scale


@small()
def OfTheClass(model, x):
    """All its models share a number, which each makes larger."""
    type(model).calls = getattr(model, "calls", 0) + model.training
    return 1 + 0.1 * model.training * model.calls


@small()
def OwnNoise(model, x):
    """Draws from a generator that nobody seeds."""
    return 1 + model.training * torch.rand(1, generator=own)


own, common = torch.Generator(), nn.Linear(128, 3)


class Common(Small):
    """All its models have one layer in common."""

    def __init__(self, num_classes, in_channels):
        super().__init__(num_classes, in_channels)
        self.fc = common


class TwoLogits(Small):
    def forward(self, x):
        return super().forward(x)[:, :2]


def Normed(num_classes, in_channels):
    """BatchNorm cannot train on one image."""
    return nn.Sequential(Plain(num_classes, in_channels), nn.BatchNorm1d(num_classes))


def Plain(num_classes, in_channels):
    return nn.Sequential(nn.Flatten(), nn.Linear(64 * in_channels, num_classes))


UNTRAINED = "it cannot be trained on images of 1 x 8 x 8 (channels, height, width): "


@pytest.mark.parametrize("model, why, given", [
    (LazyHead, "its forward() changes the tensor head.weight, absent in a new model,", {}),
    (Resized, "its forward() changes the tensor range, torch.float32 (0,) in a new model,", {}),
    (Cooling, "its logits depend on something, such as temperature,", {}),
    (PlainTensor, "its logits depend on something, such as scale,", {}),
    (Unsaved, "its logits depend on something that its state_dict lacks", {}),
    (OfTheClass, "trained twice alike, it ends differently:", {}),
    (OwnNoise, "trained twice alike, it ends differently:", {}),
    (Common, "trained twice alike, it ends differently: it shares a tensor", {}),
    (TwoLogits, UNTRAINED + "ValueError: for 2 images of 3 classes the model must "
     "return a tensor (2, 3), not (2, 2)", {}),
    (Normed, UNTRAINED + "ValueError: Expected more than 1 value", dict(batch_size=1)),
])
def test_what_would_make_the_numbers_untrue_is_refused_in_one_line(model, why, given, tmp_path):
    with pytest.raises(ConfigError) as error:
        run(model, tmp_path / "run", **given)
    text = str(error.value)
    assert text.startswith(f"--model test_trial:{model.__name__}: {why}") and "\n" not in text
    assert not (tmp_path / "run").exists()


def test_a_batch_of_one_image_can_be_trained_on_without_batch_norm(tmp_path):
    assert run(Plain, tmp_path / "run", batch_size=1).summary["fitness"] > 0.4
