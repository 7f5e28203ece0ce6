"""What a run is: one dataclass in the order of the paper's Section 4, and its values for each data set.

`Config(dataset="svhn", seed=1)` has the paper's values for SVHN but for the seed. The command line is this dataclass:
the line under each field is its help.
"""

import math
from dataclasses import dataclass, fields
from typing import Annotated, Literal, get_args, get_origin, get_type_hints

from errors import ConfigError, nearest
from evolution import Variable, search_space


@dataclass(frozen=True)
class Bounds:
    """The numbers that a field accepts."""

    low: float
    high: float = math.inf
    above: bool = False  # low itself is not accepted

    def refuses(self, x):
        return not (self.low < x if self.above else self.low <= x) or x > self.high

    def __str__(self):
        upper = "" if math.isinf(self.high) else f" and at most {self.high}"
        return f"{'above' if self.above else 'at least'} {self.low}{upper}"


Count = Annotated[int, Bounds(1)]
CountOrAuto = Annotated[int, Bounds(0)]
Share = Annotated[float, Bounds(0, 1)]
NotNegative = Annotated[float, Bounds(0)]
Positive = Annotated[float, Bounds(0, above=True)]


@dataclass(frozen=True, init=False)
class Config:
    """All that determines a run. The values below are those of Sec. 4.1: CIFAR-10 with ResNet-32.

    Config(...): what is not given has the preset's value, else the data set's (DATA_SETS), else the value below.
    Raises ConfigError for a name that is no field's; `check` says what else is wrong."""

    # The experiment.
    method: Literal["epbt", "pbt", "baseline", "random", "replay"] = "epbt"
    """epbt; Baseline 2 (pbt) or Baseline 1 (baseline, one network) of Sec. 4.1; random: independent
    networks with random learning rates; replay: one network by the schedule of --replay."""
    preset: Literal["paper", "known", "best"] = "paper"
    """paper: as published; known: two of the first individuals start from a loss that is known to
    learn; best: what earned its place on clean Fashion-MNIST. PRESETS has what each changes."""
    dataset: str = "cifar10"
    """digits, fashion, cifar10, svhn, or a folder with a subfolder of images a class."""
    model: str = "resnet32"
    """resnet8/20/32/56, wrn-10-12/16-8/22-6/28-5, torchvision:NAME, package.module:factory."""
    seed: Annotated[int, Bounds(0, 2**32 - 1)] = 0
    """Everything random derives from it."""
    replay: str = ""
    """Train one network by the schedule of a finished run's winner: its folder or schedule.json."""

    # The data, Sec. 4.1 and 4.2.
    validation: Positive = 1250
    """Training images held out for the fitness; below 1, a share of them."""
    enlarge: Annotated[int, Bounds(1, 1000)] = 20
    """Augmented copies of each validation image."""
    augmentation: str = "flip shift=4 cutout=16"
    """What happens at random to a training image; sizes in pixels; none: nothing."""
    label_noise: Share = 0.0
    """The share, below 1, of the training and validation labels that are made wrong."""
    label_noise_kind: Literal["uniform", "pair"] = "uniform"
    """Wrong labels are any other class, or the next one."""
    early_stopping: bool = False
    """With --method baseline: hold out the validation images, and deliver the network of the best
    generation on them."""
    limit: CountOrAuto = 0
    """Use only so many training images; 0: all."""
    image_size: Annotated[int, Bounds(8, 2048)] = 32
    """Side in pixels to which the images of a folder are resized."""

    # Training one network, Sec. 4.1.
    epochs: Count = 8
    """Per generation."""
    batch_size: Count = 128
    """Images a step."""
    learning_rate: Positive = 0.1
    """Before scale and decay."""
    milestones: tuple[Share, ...] = (0.3, 0.6, 0.8)
    """Shares of the run after which the learning rate decays."""
    lr_decay: Positive = 5.0
    """What divides it there, where that is not evolved."""
    momentum: Share = 0.9
    """Where it is not evolved."""
    weight_decay: NotNegative = 0.0
    """Where it is not evolved; the paper does not say."""
    average_weights: NotNegative = 0.0
    """Score, teach and keep the running mean of the weights over about so many generations; 0: off;
    not in the paper."""

    # Evolution, Sec. 3.2.
    population: Count = 40
    """P, networks in the population."""
    generations: Count = 25
    """n of Algorithm 1."""
    elites: Positive = 0.5
    """k, how many survive unchanged; below 1, a share of P."""
    tournament: Count = 2
    """t, of how many the fittest becomes a parent."""
    mutation: NotNegative = 0.1
    """Standard deviation of the multiplicative noise; the paper does not say."""
    reset: Share = 0.05
    """Probability that a variable is drawn anew; the paper does not say."""
    crossover: Share = 0.5
    """Probability that a variable comes from the mate."""
    theta_range: Annotated[float, Bounds(0, 1e6, above=True)] = 10.0
    """Initial thetas are uniform between minus this and this, Sec. 4.1."""
    known_losses: CountOrAuto = 0
    """So many initial individuals start from a loss that is known to learn, under Baseline 1's rates:
    evolution.known_loss; 0 is the paper."""
    high_rates: bool = False
    """Leave low learning rates and momenta out of the search space; not in the paper."""
    evolve_cutout: bool = False
    """Evolve the cutout too, up to that of the augmentation; not in the paper."""

    # Novelty Selection and Pulsation, Sec. 2.5 and 3.4.
    novelty: Literal["pulsation", "one-in-p", "always", "off"] = "pulsation"
    """Novelty Selection is off for p generations and on for p; on in one of p; always; never."""
    pulsation_period: Count = 5
    """p, in generations."""
    novelty_candidates: Annotated[float, Bounds(1)] = 1.5
    """m as a multiple of k: of so many of the fittest the k most novel become elites."""
    behaviour_images: Count = 400
    """N, validation images on which novelty is measured."""

    # The loss, Sec. 3.3, and distillation, Sec. 3.5.
    loss: Literal["taylorglo", "cross-entropy", "generalized-cross-entropy", "label-smoothing"] = "taylorglo"
    """taylorglo is Eq. 2, evolved by epbt, while the others then have cross-entropy."""
    distillation: Share = 0.8
    """alpha of Eq. 3 in the last generation, rising from 0; 0.8 is that of the paper's [23]."""
    add_cross_entropy: bool = False
    """Add cross-entropy to Eq. 2, so that Eq. 2 regularizes; not in the paper."""
    loss_backend: Literal["auto", "fused", "reference"] = "auto"
    """The C++/CUDA kernel, plain PyTorch, or the first that works."""

    # The machine.
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda if there is a GPU."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the activations. On a GPU float32 means TF32 convolutions, and bfloat16 is about twice
    as fast."""
    layout: Literal["auto", "channels-last", "contiguous"] = "auto"
    """Of images and weights in memory; auto: channels last unless the model cannot take it."""
    threads: CountOrAuto = 0
    """CPU threads a worker; 0: one, for a single network one a core."""
    deterministic: bool = False
    """On a GPU, the same bits in every run; always so on a CPU."""
    no_graphs: bool = False
    """On a GPU, launch each operation by itself, without CUDA graphs."""
    workers: CountOrAuto = 0
    """Individuals trained at once; 0: one a core, or as many as pay on the GPUs."""
    backend: Literal["processes", "ray"] = "processes"
    """Where workers run: processes of this machine, or a Ray cluster (requirements-ray.txt)."""
    ray_address: str = ""
    """Of a running cluster; empty: a new one on this machine."""

    # The folders.
    data_root: str = ""
    """Where the data sets are; empty: $EPBT_DATA or ./data."""
    download: bool = False
    """Fetch the data set if it is missing."""
    out: str = ""
    """The run's folder; empty: runs/METHOD-DATASET-SEED."""
    resume: bool = False
    """Go on with the run in the folder."""
    overwrite: bool = False
    """Start the run in the folder over."""
    tensorboard: bool = False
    """Write the curves for TensorBoard too."""
    plan: bool = False
    """Print what the run would cost, and stop."""

    def __init__(self, dataset="custom", **given):
        values = {f.name: f.default for f in fields(Config)} | DATA_SETS.get(dataset, OWN) | {"dataset": dataset}
        values |= PRESETS.get(given.get("preset", values["preset"]), {}) | given
        for name, value in values.items():
            if name not in Config.__dataclass_fields__:
                raise ConfigError(f"no field of a config is called {name!r}"
                                  f"{nearest(name, Config.__dataclass_fields__)}")
            object.__setattr__(self, name, value)

    @property
    def k(self):
        """The number of elites, Sec. 3.2."""
        return int(self.elites) if self.elites >= 1 else max(1, int(self.population * self.elites))

    @property
    def m(self):
        """The number of candidates of Novelty Selection, Sec. 3.4."""
        return min(int(self.k * self.novelty_candidates), self.population)

    @property
    def evolves_theta(self):
        return self.method == "epbt" and self.loss == "taylorglo"

    @property
    def plain_loss(self):
        """The loss of individuals without theta."""
        return "cross-entropy" if self.loss == "taylorglo" else self.loss

    @property
    def single(self):
        """Whether one network trains alone."""
        return self.method in ("baseline", "replay")

    @property
    def trains_on_all(self):
        """Whether the validation images are trained on as well (Sec. 4.1, Baseline 1)."""
        return self.single and not self.early_stopping

    def evaluations(self):
        """P + (n - 1)(P - k) for EPBT (Sec. 5.2), P n for the methods in which everyone trains on."""
        children = self.population - (self.k if self.method == "epbt" else 0)
        return self.population + (self.generations - 1) * children

    def search_space(self, cutout=0):
        """The evolved variables. cutout: the augmentation's, in pixels."""
        if self.method == "epbt":
            return search_space(self.theta_range if self.evolves_theta else None, self.high_rates,
                                cutout if self.evolve_cutout else 0)
        # Sec. 4.1: between 0.1 and 0.0001, here as a scale of the rate 0.1.
        # paper: unspecified: uniform in the logarithm.
        return (Variable("lr_scale", 1e-3, 1.0, log=True),) if self.method in ("pbt", "random") else ()

    def fixed(self, cutout=0):
        """The hyperparameters of individuals that do not evolve them."""
        return dict(lr_scale=1.0, lr_decay=1.0 if self.method == "pbt" else self.lr_decay,
                    momentum=self.momentum, weight_decay=self.weight_decay, cutout=cutout)

    def identity(self):
        """What a resumed run must share: all but the fields that cannot change the result."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in RUNTIME}


RUNTIME = ("workers", "backend", "ray_address", "no_graphs", "data_root", "download", "out", "resume",
           "overwrite", "tensorboard", "plan")
# Any other data, a folder of images or your own.
OWN = dict(preset="known", validation=0.1, enlarge=1, augmentation="auto")
DATA_SETS = {
    "cifar10": {},
    "svhn": dict(validation=30_000, enlarge=1, augmentation="none", epochs=1, generations=40,
                 milestones=(0.5, 0.75), lr_decay=10.0),  # Sec. 4.2
    "fashion": dict(preset="known", model="resnet8", validation=5_000, enlarge=1, augmentation="flip shift=2 cutout=8",
                    epochs=1, population=8, generations=12),
    "digits": dict(preset="known", model="resnet8", validation=240, enlarge=1, augmentation="none",
                   epochs=4, batch_size=64, population=12, generations=15),
}
PRESETS = {  # what each changes; docs/choices.md has the measurements
    "paper": {},
    "known": dict(known_losses=2),
    "best": dict(elites=0.25, distillation=0.0, theta_range=1.0, add_cross_entropy=True,
                 average_weights=1.0, milestones=(), high_rates=True, evolve_cutout=True),
}


def check(config):
    """Raise ConfigError, one line for each field that is not as declared and each contradiction."""
    hints = get_type_hints(Config, include_extras=True)
    lines = [line for f in fields(config)
             if (line := mistake(f"--{f.name.replace('_', '-')}", hints[f.name], getattr(config, f.name)))]
    if not lines:
        lines = contradictions(config)
    if lines:
        raise ConfigError("\n".join(lines))


def mistake(flag, declared, value):
    """One line if `value` is not what a field declares, else None."""
    kind, bounds = get_origin(declared) or declared, ()
    if kind is Literal:
        choices = get_args(declared)
        return None if value in choices else (
            f"{flag} must be one of {', '.join(choices)}, not {value!r}{nearest(str(value), choices)}")
    if kind is tuple:
        if not isinstance(value, tuple | list):
            return f"{flag} must be a tuple of numbers, not {value!r}"
        return next(filter(None, (mistake(flag, get_args(declared)[0], x) for x in value)), None)
    if kind is Annotated:
        declared, *bounds = get_args(declared)
    number = declared in (int, float) and isinstance(value, int | float) and not isinstance(value, bool)
    right = number and math.isfinite(value) and (declared is float or isinstance(value, int))
    if not (right if declared in (int, float) else isinstance(value, declared)):
        word = {int: "a whole number", float: "a number", str: "text", bool: "True or False"}[declared]
        return f"{flag} must be {word}{''.join(f' {b}' for b in bounds)}, not {value!r}"
    refused = [b for b in bounds if b.refuses(value)]
    return f"{flag} must be {refused[0]}, not {value!r}" if refused else None


def contradictions(c):
    """What is wrong with a config whose fields are each as declared, a line each."""
    lines = []
    if c.method == "epbt" and c.population < 2:
        lines.append("--population must be at least 2 for --method epbt, not 1")
    elif c.method == "epbt" and c.k >= c.population:
        lines.append(f"--elites must be below --population ({c.population}), not {c.k}")
    if c.method == "pbt" and c.population < 4:
        lines.append("--population must be at least 4 for --method pbt, which replaces a quarter of it, "
                     f"not {c.population}")
    if c.preset == "best" and c.method not in ("epbt", "replay"):
        lines.append(f"--preset best is for --method epbt, not {c.method}")
    if c.method == "epbt" and c.known_losses > c.population:
        lines.append(f"--known-losses must be at most --population ({c.population}), not {c.known_losses}")
    if c.early_stopping and c.method != "baseline":
        lines.append(f"--early-stopping is for --method baseline, not {c.method}")
    if c.label_noise == 1:
        lines.append("--label-noise must be below 1")
    if (c.method == "replay") != bool(c.replay):
        lines.append("--method replay and --replay FOLDER go together")
    if c.ray_address and c.backend != "ray":
        lines.append("--ray-address needs --backend ray")
    if c.resume and c.overwrite:
        lines.append("--resume and --overwrite exclude each other")
    return lines
