"""What a run is: one dataclass in the order of the paper's Section 4, and its values by data set.

`Config(dataset="svhn", seed=1)` has the paper's values for SVHN, except for the seed. The command
line is made from this dataclass: the text beside or under a field is its help.
"""

import math
from dataclasses import dataclass, fields
from typing import Annotated, Literal, get_type_hints

from errors import LEAST, MOST, ConfigError, mistake, nearest
from evolution import RATE, search_space

# A kind of number, and the lowest and highest that a field accepts.
Count, CountOrAuto = Annotated[int, 1, MOST], Annotated[int, 0, MOST]
Share, NotNegative = Annotated[float, 0, 1], Annotated[float, 0, MOST]
Positive = Annotated[float, LEAST, MOST]


@dataclass(frozen=True, init=False)
class Config:
    """All that determines a run. The values below are those of Sec. 4.1: CIFAR-10, ResNet-32.

    A field that is not given has the preset's value, else the data set's, else the one below. The
    data set's preset is for EPBT alone. Without a dataset it is for your own data. Raises
    ConfigError for an unknown name; `check` checks the values."""

    # The experiment.
    method: Literal["epbt", "pbt", "baseline", "random", "replay"] = "epbt"
    """epbt; pbt: Baseline 2 of Sec. 4.1; baseline: Baseline 1, one network; random: random search,
    independent networks with random rates; replay: one network under the schedule of --replay"""
    preset: Literal["paper", "known", "best"] = "paper"
    """paper: as published; known: two of the first individuals have a loss that is known to learn;
    best: what helped on Fashion-MNIST. PRESETS in config.py lists the changes"""
    dataset: str = "cifar10"
    """digits, fashion, fashion-long-tail, cifar10, svhn, or a folder with a subfolder per class"""
    model: str = "resnet32"
    """resnet8/20/32/56, wrn-10-12/16-8/22-6/28-5, torchvision:NAME, package.module:factory"""
    seed: Annotated[int, 0, 2**32 - 1] = 0  # Everything random derives from it
    replay: str = ""
    """Train one network under a schedule: a finished run's folder, or its schedule.json"""

    # The data, Sec. 4.1 and 4.2.
    validation: Positive = 1250
    """Training images held out for the fitness; below 1, a share of them"""
    enlarge: Annotated[int, 1, 1000] = 20  # Augmented copies of each validation image
    augmentation: str = "flip shift=4 cutout=16"
    """What happens at random to a training image, in pixels; none: nothing"""
    label_noise: Share = 0.0
    """Share of the training and validation labels that are made wrong, below 1"""
    label_noise_kind: Literal["uniform", "pair"] = "uniform"
    """A wrong label is any other class, or the next class"""
    early_stopping: bool = False
    """Baseline 1 holds out the validation images and delivers its best generation on them"""
    limit: CountOrAuto = 0  # Use only so many training images; 0: all
    image_size: Annotated[int, 8, 2048] = 32
    """Images of a folder are resized to this side, in pixels"""

    # Training one network, Sec. 4.1.
    epochs: Count = 8  # Per generation
    batch_size: Count = 128  # Images per step
    learning_rate: Positive = 0.1  # Before scale and decay
    milestones: tuple[Share, ...] = (0.3, 0.6, 0.8)
    """The learning rate decays after these shares of the run"""
    lr_decay: Positive = 5.0  # A milestone divides the rate by this, if not evolved
    momentum: Share = 0.9  # If not evolved
    weight_decay: NotNegative = 0.0  # If not evolved; the paper does not say
    average_weights: NotNegative = 0.0
    """Score, teach and keep an exponential moving average of the weights, over so many generations;
    0: none; not in the paper"""

    # Evolution, Sec. 3.2.
    fitness: str = "accuracy"
    """accuracy, balanced-accuracy, f1-macro or package.module:function, on the validation images"""
    population: Count = 40  # P, networks in the population
    generations: Count = 25  # n of Algorithm 1
    elites: Positive = 0.5  # k, how many survive unchanged; below 1, a share of P
    tournament: Count = 2  # t, each parent is the fittest of t random individuals
    mutation: NotNegative = 0.1  # Relative size of the random change; the paper does not say
    reset: Share = 0.05  # Probability that a variable is drawn anew; the paper does not say
    crossover: Share = 0.5  # Probability that a variable comes from the mate
    theta_range: Annotated[float, LEAST, 1e6] = 10.0
    """Initial thetas are uniform between minus this and this, Sec. 4.1"""
    known_losses: CountOrAuto = 0
    """How many of the first individuals start from Baseline 1's rates and the second-order Taylor
    expansion of cross-entropy; not in the paper"""
    high_rates: bool = False
    """Leave low learning rates and momenta out of the search space; not in the paper"""
    evolve_cutout: bool = False
    """Evolve the cutout too, up to the augmentation's; not in the paper"""

    # Novelty Selection and Pulsation, Sec. 2.5 and 3.4.
    novelty: Literal["pulsation", "one-in-p", "always", "off"] = "pulsation"
    """When Novelty Selection is on: p generations off, p on; one in p; always; never"""
    pulsation_period: Count = 5  # p, in generations
    novelty_candidates: Annotated[float, 1, MOST] = 1.5
    """m / k: of the m fittest the k most novel become elites"""
    behaviour_images: Count = 400  # N, validation images on which novelty is measured

    # The loss, Sec. 3.3, and distillation, Sec. 3.5.
    loss: Literal["taylorglo", "cross-entropy", "generalized-cross-entropy",
                  "label-smoothing"] = "taylorglo"
    """taylorglo: Eq. 2, evolved by epbt; the other methods then use cross-entropy"""
    distillation: Share = 0.8
    """alpha of Eq. 3 rises from 0 to this in the last generation; 0.8 is from the paper's [23]"""
    add_cross_entropy: bool = False  # Add cross-entropy to Eq. 2; not in the paper
    loss_backend: Literal["auto", "fused", "reference"] = "auto"
    """fused: C++/CUDA; reference: plain PyTorch; auto: fused if it works"""

    # The machine.
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda if there is a GPU
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the activations. On a GPU float32 means TF32; bfloat16 is about twice as fast"""
    layout: Literal["auto", "channels-last", "contiguous"] = "auto"
    """Of images in memory; auto: channels-last if the model can take it"""
    threads: CountOrAuto = 0  # Per worker, on the CPU; 0: one, or one per core for one network
    deterministic: bool = False  # The same bits in every run on a GPU, as always on a CPU
    no_graphs: bool = False  # Use no CUDA graphs
    workers: CountOrAuto = 0
    """Individuals trained at once; 0: one per core, or as many as pay on the GPUs"""
    backend: Literal["processes", "ray"] = "processes"
    """Workers are processes of this machine, or of a Ray cluster (requirements-ray.txt)"""
    ray_address: str = ""  # Of a running cluster; empty: a new one on this machine

    # The folders.
    data_root: str = ""  # Where the data sets are; empty: $EPBT_DATA or ./data
    download: bool = False  # Fetch the data set if it is missing
    out: str = ""  # The run's folder; empty: runs/METHOD-DATASET-SEED
    resume: bool = False  # Go on with the run in the folder
    overwrite: bool = False  # Replace the run in the folder
    tensorboard: bool = False  # Write curves for TensorBoard
    plan: bool = False  # Only print what the run would cost

    def __init__(self, dataset="custom", **given):
        defaults = {f.name: f.default for f in fields(Config)} | DATA_SETS.get(dataset, OWN)
        if given.get("method", defaults["method"]) != "epbt":
            defaults["preset"] = "paper"
        preset = PRESETS.get(given.get("preset", defaults["preset"]), {})
        values = defaults | preset | given | {"dataset": dataset}
        if values["method"] in ("baseline", "replay"):
            values["population"] = 1  # one network
        for name, value in values.items():
            if name not in Config.__dataclass_fields__:
                near = nearest(name, Config.__dataclass_fields__)
                raise ConfigError(f"Config has no field {name!r}{near}")
            object.__setattr__(self, name, tuple(value) if isinstance(value, list) else value)

    # Sec. 4.1: Baseline 1 is one network and trains on the validation images too.
    single = property(lambda self: self.method in ("baseline", "replay"))
    trains_on_all = property(lambda self: self.single and not self.early_stopping)
    evolves_theta = property(lambda self: self.method == "epbt" and self.loss == "taylorglo")
    # The loss where theta is not evolved.
    plain_loss = property(lambda self: self.loss.replace("taylorglo", "cross-entropy"))

    @property
    def k(self):
        """The number of elites, Sec. 3.2."""
        return floor(self.elites if self.elites >= 1 else max(1, self.population * self.elites))

    @property
    def m(self):
        """The number of candidates of Novelty Selection, Sec. 3.4."""
        return min(floor(self.k * self.novelty_candidates), self.population)

    def evaluations(self):
        """Sec. 5.2: P + (n - 1)(P - k) for EPBT. The other methods train everyone: P n."""
        children = self.population - (self.k if self.method == "epbt" else 0)
        return self.population + (self.generations - 1) * children

    def search_space(self, cutout=0):
        """The evolved variables. cutout: the augmentation's, in pixels; 0: none."""
        if self.method != "epbt":
            return () if self.single else RATE
        return search_space(self.theta_range if self.evolves_theta else None, self.high_rates,
                            cutout if self.evolve_cutout else 0)

    def fixed(self, cutout=0):
        """The values of hyperparameters that are not evolved."""
        return dict(lr_scale=1.0, lr_decay=1.0 if self.method == "pbt" else self.lr_decay,
                    momentum=self.momentum, weight_decay=self.weight_decay, cutout=cutout)

    def identity(self):
        """The fields that can change the result: a resumed run must have the same."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in RUNTIME}


RUNTIME = ("workers", "backend", "ray_address", "no_graphs", "data_root", "download", "out",
           "resume", "overwrite", "tensorboard", "plan")
OWN = dict(preset="best", validation=0.1, enlarge=1, augmentation="auto")  # any other data
DATA_SETS = {
    "cifar10": {},
    "svhn": dict(validation=30_000, enlarge=1, augmentation="none", epochs=1, generations=40,
                 milestones=(0.5, 0.75), lr_decay=10.0),  # Sec. 4.2
    "fashion": dict(preset="best", model="resnet8", validation=5_000, enlarge=1, epochs=1,
                    augmentation="flip shift=2 cutout=8", population=8, generations=12),
    "digits": dict(preset="known", model="resnet8", validation=240, enlarge=1, epochs=4,
                   augmentation="none", batch_size=64, population=12, generations=15),
}
DATA_SETS["fashion-long-tail"] = DATA_SETS["fashion"] | dict(validation=0.2)
PRESETS = {  # docs/choices-measured.md has the measurements
    "known": dict(known_losses=2),
    "best": dict(elites=0.25, distillation=0.0, theta_range=1.0, add_cross_entropy=True,
                 average_weights=1.0, milestones=(), high_rates=True, evolve_cutout=True),
}


def floor(x):
    """x rounded down to an int, but 100 * 0.29, in Python 28.999999999999996, is 29."""
    return math.floor(round(x, 9))


def flag(name):
    """The command line's name for a field."""
    return "--" + name.replace("_", "-")


def check(config):
    """Raises ConfigError: one line for each wrong value or, without any, each contradiction."""
    hints = get_type_hints(Config, include_extras=True)
    found = [(f.name, mistake(hints[f.name], getattr(config, f.name))) for f in fields(config)]
    lines = [f"{flag(name)} must be {line}" for name, line in found if line]
    if lines := lines or contradictions(config):
        raise ConfigError("\n".join(lines))


def contradictions(c):
    """One line for each pair of fields that do not fit."""
    least = {"epbt": 2, "pbt": 4}.get(c.method, 1)
    return [line for wrong, line in (
        (c.population < least,
         f"--population must be at least {least} for --method {c.method}, not {c.population}"),
        (c.method == "epbt" and c.k >= c.population >= least,
         f"--elites must be below --population ({c.population}), not {c.k}"),
        *((x > 1 and x % 1, f"{name} must be a whole number, or a share below 1, not {x}")
          for name, x in (("--elites", c.elites), ("--validation", c.validation))),
        (c.preset != "paper" and c.method not in ("epbt", "replay"),
         f"--preset {c.preset} is for --method epbt, not {c.method}"),
        (c.method == "epbt" and c.known_losses > c.population,
         f"--known-losses must be at most --population ({c.population}), not {c.known_losses}"),
        (c.early_stopping and c.method != "baseline",
         f"--early-stopping is for --method baseline, not {c.method}"),
        ((c.method == "replay") != bool(c.replay), "--method replay and --replay go together"),
        (c.ray_address and c.backend != "ray", "--ray-address needs --backend ray"),
        (c.resume and c.overwrite, "--resume and --overwrite exclude each other"),
    ) if wrong]
