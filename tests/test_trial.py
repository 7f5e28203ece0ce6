"""Models that do what a training loop does not expect: the accuracy that a run records is that of
the model which it delivers, or the model is refused in one line before the run."""

import copy

import pytest
import torch
import torch.nn.functional as F
from test_training import Small, assert_close, by_hand, state_of, stripes, task, trainer_of
from torch import nn

from config import Config
from data import normalize
from epbt import evolve
from errors import ConfigError
from records import read_log

pytestmark = pytest.mark.usefixtures("one_thread")


# What must train.


class MaxNorm(Small):
    """As EEGNet: the weight's memory is replaced in each forward pass."""

    def features(self, x):
        self.conv.weight.data = torch.renorm(self.conv.weight.data, 2, 0, 0.5)
        return super().features(x)


class Centred(Small):
    """A running centre, as DINO's, whose memory is replaced."""

    def __init__(self, num_classes, in_channels):
        super().__init__(num_classes, in_channels)
        self.register_buffer("centre", torch.zeros(128))

    def features(self, x):
        f = super().features(x)
        if self.training:
            self.centre.data = 0.5 * self.centre + 0.5 * f.detach().mean(0)
        return f - self.centre


class ZeroGrad(Small):
    def features(self, x):
        self.zero_grad()
        return super().features(x)


class Unfreezing(Small):
    """Its first layer is trained from the third step on."""

    def __init__(self, num_classes, in_channels):
        super().__init__(num_classes, in_channels)
        self.conv.requires_grad_(False)
        self.calls = 0

    def features(self, x):
        self.calls += self.training
        if self.calls == 3:
            self.conv.requires_grad_(True)
        return super().features(x)


class Copying(Small):
    def forward(self, x):
        return super().forward((x - 0.5) * 2)


class InPlace(Small):
    """As Copying, but it changes the images that it is given."""

    def forward(self, x):
        return super().forward(x.sub_(0.5).mul_(2))


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


class NoSelf(Small):
    """Its train() returns nothing, and so does eval()."""

    def train(self, mode=True):
        super().train(mode)


class Hooked(nn.Sequential):
    """Without BatchNorm, and with old-style weight normalisation, which keeps the weight as a plain
    attribute."""

    def __init__(self, num_classes, in_channels):
        with pytest.warns(FutureWarning):
            layer = nn.utils.weight_norm(nn.Linear(64 * in_channels, num_classes))
        super().__init__(nn.Flatten(), layer)


# What cannot be inherited, delivered or repeated.


class LazyHead(Small):
    def forward(self, x):
        f = self.features(x)
        if not hasattr(self, "head"):
            self.head = nn.Linear(f.shape[1], self.fc.out_features)
        return self.head(f)


class Resized(Small):
    def __init__(self, num_classes, in_channels):
        super().__init__(num_classes, in_channels)
        self.register_buffer("range", torch.empty(0))

    def features(self, x):
        f = super().features(x)
        self.range.resize_(f.shape[1]).copy_(f.detach().mean(0))
        return f


class Remaking(Small):
    """Its first convolution is another parameter in each pass."""

    def features(self, x):
        self.conv.weight = nn.Parameter(self.conv.weight.detach() * 0.99)
        return super().features(x)


class Cooling(Small):
    """A number that it keeps outside its buffers decides."""

    temperature = 8.0

    def features(self, x):
        if self.training:
            self.temperature = max(0.5, self.temperature * 0.9)
        return super().features(x) / self.temperature


class PlainTensor(Small):
    def __init__(self, num_classes, in_channels):
        super().__init__(num_classes, in_channels)
        self.scale = torch.ones(1)

    def features(self, x):
        self.scale += 0.5 * self.training
        return super().features(x) * self.scale


class Unsaved(Small):
    """A buffer that its state_dict lacks."""

    def __init__(self, num_classes, in_channels):
        super().__init__(num_classes, in_channels)
        self.register_buffer("scale", torch.ones(1), persistent=False)

    def features(self, x):
        self.scale += 0.5 * self.training
        return super().features(x) * self.scale


class OfTheClass(Small):
    """All its models share a number, which each makes larger."""

    calls = 0

    def features(self, x):
        OfTheClass.calls += self.training
        return super().features(x) * (1 + self.training * 0.1 * OfTheClass.calls)


class OwnNoise(Small):
    """Draws from a generator that nobody seeds."""

    generator = torch.Generator()

    def features(self, x):
        f = super().features(x)
        return f + self.training * torch.rand(f.shape, generator=self.generator)


common = nn.Linear(128, 3)


class Common(Small):
    """All its models have one layer in common."""

    def __init__(self, num_classes, in_channels):
        super().__init__(num_classes, in_channels)
        self.fc = common


class TwoLogits(Small):
    def forward(self, x):
        return super().forward(x)[:, :2]


def run(model, folder, say=lambda line: None, **given):
    tiny = dict(population=2, generations=2, epochs=2, batch_size=16, learning_rate=0.05, threads=1,
                workers=1, device="cpu", loss="cross-entropy", loss_backend="reference")
    config = Config(**tiny | given, out=str(folder))
    return evolve(config, model, stripes(96, 0), stripes(60, 1), report=say)


@pytest.mark.parametrize("model", [MaxNorm, Centred, ZeroGrad, Unfreezing, InPlace, Shared, Volume,
                                   View, NoSelf, Remaking])
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
    assert any("channels last would be faster" in line for line in lines) == (model is View)


@pytest.mark.parametrize("model, why", [
    (LazyHead, "its forward() changes the tensor head.weight, absent in a new model,"),
    (Resized, "its forward() changes the tensor range, torch.float32 (0,) in a new model,"),
    (Cooling, "its logits depend on something, such as temperature,"),
    (PlainTensor, "its logits depend on something, such as scale,"),
    (Unsaved, "its logits depend on something that its state_dict lacks"),
    (OfTheClass, "trained twice alike, it ends differently:"),
    (OwnNoise, "trained twice alike, it ends differently:"),
    (Common, "its factory must make every parameter and buffer anew in each call"),
    (TwoLogits, "it cannot be trained on batches of 16 images of 1 x 8 x 8 (channels, height, width)"
                ": ValueError: for 2 images of 3 classes the model must return a tensor (2, 3), not"),
])
def test_what_would_make_the_numbers_untrue_is_refused_in_one_line(model, why, tmp_path):
    with pytest.raises(ConfigError) as error:
        run(model, tmp_path / "run")
    text = str(error.value)
    assert text.startswith(f"--model test_trial:{model.__name__}: {why}") and "\n" not in text
    assert not (tmp_path / "run").exists()


def test_a_batch_of_one_image_is_tried_as_it_will_be_trained(tmp_path):
    with pytest.raises(ConfigError, match="on batches of 1 images of 1 x 8 x 8.*more than 1 value"):
        run(BatchNormAtTheEnd, tmp_path / "run", batch_size=1)
    assert run(Hooked, tmp_path / "run", batch_size=1).summary["fitness"] > 0.4


class BatchNormAtTheEnd(nn.Sequential):
    def __init__(self, num_classes, in_channels):
        super().__init__(nn.Flatten(), nn.Linear(64 * in_channels, num_classes),
                         nn.BatchNorm1d(num_classes))


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
