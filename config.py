"""`Config`: all that determines a run, as a dataclass and as the options of the command line.

What is not given is filled in by the protocol of the data set and by the preset. Options of the method say the paper's
section, or that the paper leaves them open.
"""

import hashlib
import importlib.util
import json
import os
import textwrap
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch

import options
from baselines import PBT_SPACE
from data import DATASETS, LABEL_NOISE, Augmentation, data_set
from evolution import search_space
from models import model_error
from options import ConfigError, option
from records import read_config, refuse_differences
from replay import read_schedule
from taylorglo_ext import PLAIN_LOSSES

# The paper's protocols (Sec. 4.1 and 4.2), and smaller ones for the data sets that fit a CPU. Any other data, a
# folder of images, is given CIFAR-10's.
CIFAR10 = dict(model="resnet32", population=40, generations=25, epochs=8, batch_size=128, milestones=(0.3, 0.6, 0.8),
               lr_decay=5.0)
PROTOCOLS = {
    "cifar10": CIFAR10,
    "svhn": {**CIFAR10, "generations": 40, "epochs": 1, "milestones": (0.5, 0.75), "lr_decay": 10.0},
    "fashion": {**CIFAR10, "model": "resnet8", "population": 8, "generations": 12, "epochs": 1},
    "digits": {**CIFAR10, "model": "resnet8", "population": 12, "generations": 15, "epochs": 3},
}


BY_DATA = "by data set: see the end"
BY_PRESET = "off, with --preset best on"

# The paper's method, and what `--preset best` makes of it: the README has the measurements.
PRESETS = {
    "paper": dict(distillation=0.8, theta_range=10.0, add_cross_entropy=False, average_weights=False, high_rates=False,
                  evolve_cutout=False),
    "best": dict(distillation=0.0, theta_range=1.0, add_cross_entropy=True, average_weights=True, milestones=(),
                 high_rates=True, evolve_cutout=True),
}
SINGLE = ("baseline", "replay")  # methods of one network, which trains on the validation images too (Sec. 4.1)
SCHEDULED = ("learning_rate", "momentum", "weight_decay", "loss", "normalize_loss")  # what a replay takes from its schedule
ELITES = {"paper": 2, "best": 4}  # P/k; with fewer elites, fewer children start from a parent that did not train lately


@dataclass
class Config:
    """All that determines a run. None: the protocol of the data set decides (PROTOCOLS), the preset or another field."""

    method: str = option("run", "epbt", "epbt; Sec. 4.1's Baseline 2 (pbt) and Baseline 1 (baseline: one network); or "
                         "independent networks with random learning rates (random)",
                         choices=("epbt", "pbt", "baseline", "random", "replay"))
    replay: str | None = option("run", None, "train one network under the schedule of a finished run's winner: its "
                                "folder or schedule.json; stretched to --generations epochs", otherwise="off")
    dataset: str | None = option("run", None, "digits, fashion, cifar10, svhn, or a folder with a subfolder a class",
                                 otherwise="digits; for --replay that of the schedule")
    model: str | None = option("run", None, "resnet8/20/32/56, wrn-10-12/16-8/22-6/28-5, torchvision:NAME, or "
                               "package.module:factory, Sec. 4.1", otherwise=BY_DATA)
    preset: str = option("run", "paper", "paper, or best: EPBT with what earned its place in measurements, PRESETS",
                         choices=("paper", "best"))
    seed: int = option("run", 0, "everything random derives from it", low=0, high=2**32 - 1)
    population: int | None = option("evolution", None, "P, networks in the population, Sec. 3.2", low=1,
                                    otherwise=BY_DATA)
    elites: int | None = option("evolution", None, "k, how many go on unchanged to the next generation, Sec. 3.2",
                                low=1, otherwise="P/2, with --preset best P/4")
    generations: int | None = option("evolution", None, "n, Alg. 1", low=1, otherwise=BY_DATA)
    tournament: int = option("evolution", 2, "t, of how many the fittest becomes a parent, Sec. 3.2", low=1)
    mutation: float = option("evolution", 0.1, "standard deviation of the multiplicative noise; the paper leaves it "
                             "open", low=0)
    reset: float = option("evolution", 0.05, "probability that a variable is drawn anew; the paper leaves it open",
                          low=0, high=1)
    crossover: float = option("evolution", 0.5, "probability that a variable comes from the mate, Sec. 3.2; 0: off",
                              low=0, high=1)
    theta_range: float | None = option("evolution", None, "initial thetas are uniform between minus this and this, Sec. "
                                       "4.1", above=0, high=1e6, otherwise="10, with --preset best 1")
    high_rates: bool | None = option("evolution", None, "leave low learning rates and momenta out of the search space; "
                                     "not in the paper", otherwise=BY_PRESET)
    evolve_cutout: bool | None = option("evolution", None, "evolve the cutout too, up to that of the data set; not in the "
                                        "paper", otherwise=BY_PRESET)
    viable_init: bool = option("evolution", False, "draw initial losses again that train backwards; not in the paper")
    known_losses: int = option("evolution", 0, "so many of the initial losses, learning rates and momenta are known to "
                               "learn: cross-entropy's second-order expansion under Baseline 1's schedule; 0 is the paper",
                               low=0)
    screen: int = option("evolution", 1, "S: of S*P initial individuals the P fittest after one epoch go on; 1 is the "
                         "paper", low=1, high=100)
    novelty: str = option("novelty", "pulsation", "Novelty Selection: off for p generations and on for p, on in one of "
                          "p, always, or never, Sec. 2.5, 3.4", choices=("pulsation", "one-in-p", "always", "off"))
    pulsation_period: int = option("novelty", 5, "p, in generations, Sec. 3.4", low=1)
    novelty_candidates: int | None = option("novelty", None, "m, of how many of the fittest the k most novel become "
                                            "elites, Sec. 3.4", low=1, otherwise="3k/2")
    behaviour_images: int = option("novelty", 400, "N, validation images on which novelty is measured, Sec. 3.4", low=1)
    loss: str = option("loss", "taylorglo", "taylorglo (evolved by epbt, Eq. 2; else cross-entropy), or one that is not "
                       "evolved", choices=("taylorglo", *PLAIN_LOSSES))
    distillation: float | None = option("loss", None, "alpha in the last generation, rising from 0, Eq. 3; 0: off; 0.8 "
                                        "is that of the paper's [23]", low=0, high=1, otherwise="0.8, with --preset best 0")
    normalize_loss: bool = option("loss", False, "scale each loss so that its first step is as large as that of "
                                  "cross-entropy; not in the paper")
    add_cross_entropy: bool | None = option("loss", None, "add cross-entropy to Eq. 2, so that it regularizes; not in "
                                            "the paper", otherwise=BY_PRESET)
    loss_backend: str = option("loss", "auto", "C++/CUDA kernel, plain PyTorch, or the first that works",
                               choices=("auto", "fused", "reference"))
    epochs: int | None = option("training", None, "per generation, Sec. 4.1", low=1, otherwise=BY_DATA)
    batch_size: int | None = option("training", None, "images a step, Sec. 4.1", low=1, otherwise=BY_DATA)
    learning_rate: float = option("training", 0.1, "before scale and decay, Sec. 4.1", above=0)
    milestones: tuple[float, ...] | None = option("training", None, "fractions of the run at which the learning rate "
                                                  "decays, Sec. 4.1", low=0, high=1,
                                                  otherwise=f"{BY_DATA}; none with --preset best")
    lr_decay: float | None = option("training", None, "what divides it there, where that is not evolved, Sec. 4.1",
                                    above=0, otherwise=BY_DATA)
    momentum: float = option("training", 0.9, "where it is not evolved, Sec. 4.1", low=0, high=1)
    weight_decay: float = option("training", 0.0, "where it is not evolved; the paper does not say", low=0)
    average_weights: bool | None = option("training", None, "score, teach and keep the running mean of a network's "
                                          "weights over a generation; not in the paper", otherwise=BY_PRESET)
    validation: int | None = option("data", None, "training images held out for the fitness, Sec. 4", low=1,
                                    otherwise=BY_DATA)
    enlarge: int | None = option("data", None, "augmented copies of each of them, Sec. 4.1", low=1, high=1000,
                                 otherwise=BY_DATA)
    label_noise: float = option("data", 0.0, "the share of the training and validation labels that are made wrong", low=0,
                                below=1)
    label_noise_kind: str = option("data", "uniform", "wrong labels are any other class, or the next one",
                                   choices=LABEL_NOISE)
    early_stopping: bool = option("data", False, "with --method baseline: hold out the validation images, and deliver the "
                                  "network of the best generation on them")
    limit: int | None = option("data", None, "use only so many training images", low=2, otherwise="all")
    image_size: int = option("data", 32, "side in pixels to which the images of a folder are resized", low=8,
                             high=2048)
    data_root: str | None = option("data", None, "where the data sets are", runtime=True,
                                   otherwise="$EPBT_DATA or ./data")
    download: bool = option("data", False, "fetch the data set if it is missing", runtime=True)
    device: str = option("machine", "auto", "auto: cuda if there is a GPU", choices=("auto", "cpu", "cuda"))
    precision: str = option("machine", "float32", "of the activations", choices=("float32", "bfloat16"))
    workers: int | None = option("machine", None, "individuals trained at once; default one a core, or as many as pay "
                                 "on the GPUs, which is measured", low=1, runtime=True)
    backend: str = option("machine", "processes", "where workers run: processes of this machine, or a Ray cluster "
                          "(requirements-ray.txt)", choices=("processes", "ray"), runtime=True)
    ray_address: str | None = option("machine", None, "of a running cluster; default a new one on this machine",
                                     runtime=True)
    no_graphs: bool = option("machine", False, "on a GPU, launch each operation by itself, without CUDA graphs",
                             runtime=True)
    deterministic: bool = option("machine", False, "on a GPU, the same bits in every run; always so on a CPU")
    threads: int | None = option("machine", None, "CPU threads a worker; default 1, for a single network all cores",
                                 low=1, high=1024)
    plan: bool = option("folder", False, "print what the run would cost, and stop", runtime=True)
    out: str | None = option("folder", None, "the run's folder", runtime=True, otherwise="runs/METHOD-DATASET-SEED")
    resume: bool = option("folder", False, "go on with the run in the folder", runtime=True)
    overwrite: bool = option("folder", False, "start the run in the folder over", runtime=True)
    tensorboard: bool = option("folder", False, "write the run's curves into the folder for TensorBoard (pip install "
                               "tensorboard)", runtime=True)

    def resolved(self):
        """The same with every default filled in. Raises ConfigError, which lists all that is wrong."""
        if lines := options.mistakes(self):
            raise ConfigError("\n".join(lines))
        c = replace(self)
        own = {} if c.replay is None else c.follow_schedule()
        c.dataset = c.dataset or "digits"
        for name, value in {**PROTOCOLS.get(c.dataset, CIFAR10), **own, **PRESETS[c.preset]}.items():
            if getattr(c, name) is None:
                setattr(c, name, value)
        if c.method in SINGLE:
            c.population = 1
        cores = len(os.sched_getaffinity(0))
        c.elites = c.elites or max(1, c.population // ELITES[c.preset])
        c.novelty_candidates = c.novelty_candidates or min(c.elites * 3 // 2, c.population)
        c.device = c.device.replace("auto", "cuda" if torch.cuda.is_available() else "cpu")
        c.threads = c.threads or (cores if c.population == 1 else 1)
        if c.device == "cpu" and c.backend == "processes":
            c.workers = c.workers or max(1, cores // c.threads)
        name = os.path.basename(os.path.normpath(c.dataset))
        c.out = os.path.expanduser(c.out or os.path.join("runs", f"{c.method}-{name}-{c.seed}"))
        if lines := c.contradictions():
            raise ConfigError("\n".join(lines))
        return c

    def follow_schedule(self):
        """Take what a replay has from its schedule; returns defaults that go before those of the data set."""
        self.replay = os.path.expanduser(self.replay)
        recorded = read_schedule(self.replay)
        if self.method not in ("epbt", "replay"):
            raise ConfigError(f"--replay trains one network, without --method {self.method}")
        if self.dataset is None and recorded.get("dataset") == "custom":
            raise ConfigError(f"{self.replay} is of data that were given to evolve(): say with --dataset what to train on")
        cross_entropy = recorded.get("add_cross_entropy", False)
        given = [f for f in fields(self) if f.name in SCHEDULED and getattr(self, f.name) != f.default]
        if self.add_cross_entropy not in (None, cross_entropy) or given:
            names = ", ".join(map(options.flag, given)) or "--add-cross-entropy"
            raise ConfigError(f"--replay has {names} from its schedule: leave that away")
        self.method, self.add_cross_entropy = "replay", cross_entropy
        self.dataset = self.dataset or recorded.get("dataset")
        if self.average_weights is None:
            self.average_weights = recorded.get("average_weights", False)
        return {"model": recorded["model"], "batch_size": recorded["batch_size"], "epochs": 1,
                "generations": len(recorded["epochs"])}

    def contradictions(self):
        """What is wrong with a config whose fields are each as declared, a line each."""
        lines = []
        if error := model_error(self.model):
            lines.append(f"--model: {error}")
        if self.method == "epbt" and self.population < 2:
            lines.append("--population must be at least 2 for --method epbt, not 1")
        elif self.method == "epbt" and self.elites >= self.population:
            lines.append(f"--elites must be below --population ({self.population}), not {self.elites}")
        elif self.method == "epbt" and not self.elites <= self.novelty_candidates <= self.population:
            lines.append(f"--novelty-candidates must be from --elites ({self.elites}) to --population "
                         f"({self.population}), not {self.novelty_candidates}")
        if self.method == "pbt" and self.population < 4:
            lines.append("--population must be at least 4 for --method pbt, which replaces a quarter of it, not "
                         f"{self.population}")
        if self.preset != "paper" and self.method != "epbt":
            lines.append(f"--preset {self.preset} is for --method epbt, not {self.method}")
        if self.known_losses > self.population and self.method == "epbt":
            lines.append(f"--known-losses must be at most --population ({self.population}), not {self.known_losses}")
        if self.early_stopping and self.method != "baseline":
            lines.append(f"--early-stopping is for --method baseline, not {self.method}")
        if self.screen > 1 and self.method != "epbt":
            lines.append(f"--screen is for --method epbt, not {self.method}")
        if self.method == "replay" and self.replay is None:
            lines.append("--method replay needs --replay with a finished run's folder or schedule.json")
        if self.device == "cuda" and not torch.cuda.is_available():
            lines.append("--device cuda: PyTorch finds no GPU; use --device cpu")
        if self.backend == "ray" and importlib.util.find_spec("ray") is None:
            lines.append("--backend ray needs Ray: pip install -r requirements-ray.txt")
        if self.ray_address is not None and self.backend != "ray":
            lines.append("--ray-address needs --backend ray")
        if self.tensorboard and importlib.util.find_spec("tensorboard") is None:
            lines.append("--tensorboard needs TensorBoard: pip install tensorboard")
        images = os.path.expanduser(self.dataset)
        if self.dataset not in DATASETS and os.path.isdir(images) and (
                Path(self.out).resolve().is_relative_to(Path(images).resolve())):
            lines.append(f"--out {self.out} must not lie within --dataset {self.dataset}, where each folder is a class")
        if self.resume and self.overwrite:
            lines.append("--resume and --overwrite exclude each other")
        return lines

    def average_epochs(self):
        """Over about how many epochs average_weights averages: a generation's, in a replay that of the replayed run."""
        return self.epochs if self.replay is None else read_schedule(self.replay).get("average_epochs", self.epochs)

    def plain_loss(self):
        """The name of the loss of networks for which none is evolved, in a replay that of its schedule."""
        if self.replay is not None:
            return read_schedule(self.replay).get("plain_loss", "cross-entropy")
        return "cross-entropy" if self.loss == "taylorglo" else self.loss

    def identity(self):
        """What a resumed run must share: all but the fields that cannot change the result."""
        shared = {f.name: getattr(self, f.name) for f in fields(self) if not f.metadata.get("runtime")}
        if self.replay is not None:
            schedule = json.dumps(read_schedule(self.replay)).encode()
            shared["schedule"] = hashlib.sha256(schedule).hexdigest()[:16]
        return shared

    def slots(self):
        """How many individuals are to be evaluated at once; None: as many as pay."""
        return 1 if self.population == 1 else self.workers and min(self.workers, self.population)

    def evaluations(self):
        """How many the whole run makes: S P + (n - 1)(P - k) for EPBT (Sec. 5.2, where S is 1), P n where all train
        on."""
        in_a_generation = self.population - (self.elites if self.method == "epbt" else 0)
        return self.population * self.screen + (self.generations - 1) * in_a_generation

    def trains_on_all(self):
        """Whether the validation images are trained on as well (Sec. 4.1, Baseline 1)."""
        return self.method in SINGLE and not self.early_stopping

    def search_space(self, augmentation=None):
        """The variables that the method evolves. augmentation: of data that are given to evolve()."""
        if self.method == "epbt":
            theta_range = self.theta_range if self.loss == "taylorglo" else None
            cutout = self.augmentation(augmentation).cutout if self.evolve_cutout else 0
            return search_space(theta_range, self.high_rates, cutout)
        return PBT_SPACE if self.method in ("pbt", "random") else ()

    def augmentation(self, given=None):
        """That of the data set; of data that are given to evolve(), what is given with them."""
        if given is not None or self.dataset == "custom":
            return given or Augmentation()
        return data_set(self.dataset, self.image_size).augmentation

    def fixed(self, data):
        """The hyperparameters of individuals that do not evolve them."""
        # Sec. 4.1: PBT evolves the learning rate in place of a schedule.
        return dict(lr_scale=1.0, lr_decay=1.0 if self.method == "pbt" else self.lr_decay, momentum=self.momentum,
                    weight_decay=self.weight_decay, cutout=data.augmentation.cutout)


def defaults():
    """The defaults that the data sets determine, as options."""
    text = ""
    for name, protocol in PROTOCOLS.items():
        words = {**protocol, "validation": DATASETS[name].validation, "enlarge": DATASETS[name].enlarge}
        words["milestones"] = " ".join(map(str, protocol["milestones"]))
        words = " ".join(f"--{key.replace('_', '-')} {value}" for key, value in words.items())
        text += textwrap.fill(f"{name}: {words}", 100, initial_indent="  ", subsequent_indent="    ",
                              break_on_hyphens=False) + "\n"
    return text


ENDING = f"""defaults by data set:
{defaults()}  a folder of images: as cifar10, but --validation a tenth of the training images, and --enlarge 1

commands to begin with:
  python epbt.py                                                                the digits, in half a minute
  python epbt.py --dataset pictures/ --model torchvision:resnet18 --out runs/a  images of your own
  python epbt.py --resume --out runs/a                                          go on after an interruption
  python epbt.py --replay runs/a --generations 100                              one network by the evolved schedule
"""


def parse(description, arguments):
    """The resolved Config of a command line. With --resume, the folder's config completes what is not given.

    description: what --help begins with."""
    given = options.parse(Config, description, ENDING, arguments)
    if not given.get("resume"):
        return Config(**given).resolved()
    out = given.get("out") or Config(**given).resolved().out
    stored = read_config(out)
    stored = {f.name: stored[f.name] for f in fields(Config) if f.name in stored}
    config = Config(**{**stored, **given}).resolved()
    same = {name: getattr(config, name) for name, value in given.items() if name in stored and value != "auto"}
    refuse_differences({name: stored[name] for name in same}, same, out)
    return Config(**{**given, **stored}).resolved()
