"""Tables 1 and 2 and Figures 2 to 6 of the paper, from run folders alone, at any time during a run.

    python figures.py runs/NAME                       one run: its own figures, into its folder
    python figures.py runs/A runs/B ... [--out DIR]   several: compared; runs that differ in the seed are repetitions
"""

import argparse
import csv
import io
import json
import math
import os
import re
import sys
import textwrap
from dataclasses import dataclass, fields
from itertools import chain, count, cycle
from pathlib import Path
from statistics import fmean, median, stdev
from types import SimpleNamespace

import matplotlib
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image
from scipy.special import stdtr

from config import CIFAR10, ELITES, PRESETS, PROTOCOLS, SINGLE, Config
from data import Augmentation
from evolution import SEARCH_SPACE
from records import RunError, fittest, read_config, read_log
from replay import ancestry
from taylorglo_ext.reference import eq2
from training import learning_rate, scaled_theta

TITLES = {"baseline": "Baseline 1", "pbt": "Baseline 2 (PBT)", "random": "Independent networks", "epbt": "EPBT",
           "replay": "Replayed schedule"}
BASELINES = ("baseline", "pbt", "random")
# Okabe and Ito's colours, which the colour-blind can tell apart; markers say the same again.
LOOKS = {"Baseline 1": ("#0072B2", "s"), "Baseline 2 (PBT)": ("#009E73", "^"), "Independent networks": ("#CC79A7", "D"),
         "EPBT": ("#D55E00", "o"), "Replayed schedule": ("#56B4E9", "P")}
MORE_LOOKS = (("#E69F00", "v"), ("#000000", "X"), ("#999999", "<"), ("#882255", ">"),
              ("#44AA99", "*"), ("#117733", "d"), ("#661100", "p"), ("#6699CC", "h"), ("#AA4499", "8"), ("#DDCC77", "H"))
STYLE = {
    "font.size": 9, "axes.titlesize": 9, "legend.fontsize": 8, "legend.frameon": False, "lines.linewidth": 1.4,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#dddddd",
    "grid.linewidth": 0.5, "axes.axisbelow": True, "svg.fonttype": "none", "svg.hashsalt": "epbt", "savefig.dpi": 150,
}
# Tables 1 and 2 of the paper: mean and standard deviation in percent, and the epochs that EPBT needed to pass it.
PAPER = {
    ("cifar10", "resnet32"): {"baseline": (92.42, 0.21, 168), "pbt": (91.53, 0.56, 128), "epbt": (92.79, 0.15, None)},
    ("cifar10", "wrn-10-12"): {"baseline": (94.18, 0.09, 168), "epbt": (94.38, 0.14, None)},
    ("cifar10", "wrn-16-8"): {"baseline": (95.66, 0.13, 168), "epbt": (95.79, 0.08, None)},
    ("cifar10", "wrn-22-6"): {"baseline": (95.87, 0.18, 176), "epbt": (96.05, 0.09, None)},
    ("cifar10", "wrn-28-5"): {"baseline": (95.95, 0.07, 184), "epbt": (96.02, 0.12, None)},
    ("svhn", "resnet32"): {"baseline": (97.81, 0.04, 21), "epbt": (98.08, 0.08, None)},
}
# The settings in config.json that figures cannot do without; the others only tell variants apart.
NEEDED = {"method", "dataset", "model", "seed", "population", "generations", "epochs", "learning_rate", "milestones",
          "lr_decay", "momentum"}


@dataclass
class Run:
    """A run as its folder tells it."""

    folder: Path
    config: SimpleNamespace
    log: list[dict]
    seconds: float  # of the generations so far

    def __post_init__(self):
        self.method = TITLES[self.config.method]
        preset = getattr(self.config, "preset", "paper")
        self.label = self.method + ("" if preset == "paper" else f" (preset {preset})")
        self.best = [fittest(line["population"]) for line in self.log]  # of each generation, by fitness alone
        self.epochs = [(line["generation"] + 1) * self.config.epochs for line in self.log]
        self.finished = len(self.log) >= self.config.generations
        self.total_epochs = self.config.generations * self.config.epochs
        self.problem = Path(self.config.dataset).name, self.config.model
        self.source = self.config.dataset if self.config.dataset in PROTOCOLS else (
            f"{os.path.normpath(self.config.dataset)}, {getattr(self.config, 'classes', '?')} classes")
        # What the run does not evolve; PBT's learning rate has no schedule (Sec. 4.1).
        decay = 1.0 if self.config.method == "pbt" else self.config.lr_decay
        self.fixed = dict(lr_scale=1.0, lr_decay=decay, momentum=self.config.momentum)
        self.ancestry = ancestry(self.log) if self.log else []

    def __str__(self):
        return f"{self.label}, {', '.join(self.problem)}, seed {self.config.seed}"


@dataclass
class Row:
    """A line of the tables and of Figures 2 to 4: the runs of one method that differ in nothing but the seed."""

    label: str
    method: str
    runs: list[Run]

    @property
    def plain(self):
        return self.label == TITLES[self.method]

    @property
    def complete(self):
        return [run for run in self.runs if run.finished]

    @property
    def final(self):
        """Final test accuracy of the fittest individual in percent, by seed."""
        return {run.config.seed: 100 * run.best[-1]["test_accuracy"] for run in self.complete}

    def curve(self):
        """Epochs, and over the runs the mean and the standard error (0 for one run) of the test accuracy in percent:
        of the completed runs, or before there are any, of all as far as they have come."""
        runs = self.complete or self.runs
        n = min(len(run.log) for run in runs)
        accuracy = 100 * np.array([[best["test_accuracy"] for best in run.best[:n]] for run in runs])
        error = accuracy.std(axis=0, ddof=1) / math.sqrt(len(runs)) if len(runs) > 1 else np.zeros(n)
        return runs[0].epochs[:n], accuracy.mean(axis=0), error


def load_run(folder):
    """Raises RunError, naming it, for a folder that holds no run or a damaged one."""
    folder = Path(folder)
    config, log, times = read_config(folder), read_log(folder), folder / "timing.jsonl"
    try:
        if missing := NEEDED - config.keys():
            raise ValueError(f"no {' and no '.join(sorted(missing))} in its config")
        lines = times.read_text().splitlines() if times.exists() else []
        seconds = math.fsum(json.loads(line)["seconds"] for line in lines)
        return Run(folder, SimpleNamespace(**config), log, seconds)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{folder} is damaged: {type(error).__name__}: {error}") from error


def load_started(folder):
    run = load_run(folder)
    if not run.log:
        raise RunError(f"{folder}: no generation is finished yet")
    return run


def binary_loss(theta, y):
    """Eq. 2 as the 2-D binary classification loss of Sec. 5.3: labels x = (1, 0), predictions (y, 1 - y), n = 2."""
    return eq2(np.array([1.0, 0.0]), np.stack([y, 1.0 - y], axis=-1), theta)


def theta(run, individual):
    """The eight numbers as its loss took them."""
    return scaled_theta(individual["hyperparameters"], getattr(run.config, "normalize_loss", False),
                        getattr(run.config, "classes", None))


def evolved_values(run):
    """{name: values by epoch} of the learning rate, and of the momentum and whatever else is evolved beside the loss,
    under which the best individual of each generation was trained. An elite keeps those of its own generation."""
    others = [name for name in run.best[-1]["hyperparameters"] if not name.startswith(("theta", "lr_"))]
    values = {name: [] for name in ("learning rate", *others)}
    for best in run.best:
        h = {**run.fixed, **best["hyperparameters"]}
        for epoch in range(run.config.epochs):
            h["learning rate"] = learning_rate(h, best["generation"] * run.config.epochs + epoch, run.config)
            for name in values:
                values[name].append(h[name])
    return values


def baseline_rates(run):
    """The learning rate of Baseline 1 by epoch, with the data set's milestones where a preset has others."""
    protocol = PROTOCOLS.get(run.config.dataset, CIFAR10)
    given = getattr(run.config, "preset", "paper") == "paper"
    job = SimpleNamespace(**{**vars(run.config), "milestones": run.config.milestones if given else protocol["milestones"]})
    h = {"lr_scale": 1.0, "lr_decay": run.config.lr_decay}
    return [learning_rate(h, epoch, job) for epoch in range(run.total_epochs)]


# Grouping ------------------------------------------------------------------------------------------------------------

SEARCH = "loss", "theta_range", "high_rates", "evolve_cutout", "image_size"  # what the search space depends on
OF_THE_SCHEDULE = "add_cross_entropy", "average_weights"  # a replay has these from what it replays
NO_VARIANT = {"method", "dataset", "model", "seed", "replay", "device", "threads", "loss_backend"}


def group(runs):
    """{(dataset, model): rows}, the rows in the order of TITLES, those with other settings after the plain one."""
    problems, sources = {}, {}
    for run in runs:
        sources.setdefault(run.problem[0], set()).add(run.source)
    for run in runs:
        if len(sources[run.problem[0]]) > 1:  # of one name, but not the same data
            run.problem = run.source, run.config.model
    for run in sorted(runs, key=lambda run: (run.problem, list(TITLES).index(run.config.method), run.config.seed)):
        problems.setdefault(run.problem, []).append(run)
    return {problem: make_rows(same) for problem, same in problems.items()}


def make_rows(runs):
    rows = {}
    for run in runs:
        variant = ", ".join(spell(key, value) for key, value in settings_apart(run, runs).items())
        row = rows.setdefault((run.config.method, variant), Row(run.method, run.config.method, []))
        row.label += f" ({variant})" if variant and not row.runs else ""
        if twin := next((other for other in row.runs if other.config.seed == run.config.seed), None):
            raise RunError(f"{twin.folder} and {run.folder} are the same experiment with the same seed: give one")
        row.runs.append(run)
    return sorted(rows.values(), key=lambda row: (list(TITLES).index(row.method), not row.plain, row.label))


def settings_apart(run, runs):
    """The settings of a run that are neither the default nor shared by all runs; of a replay, also what sets it apart from
    other replays."""
    apart = {key: value for key, value in unusual(run.config).items() if not shared(key, value, runs)}
    if run.config.method == "replay":
        own = {key: getattr(run.config, key, False) for key in OF_THE_SCHEDULE}
        replays = [other for other in runs if other.config.method == "replay"]
        apart |= {key: value for key, value in own.items() if not shared(key, value, replays)}
    return apart


def settings_shared(runs):
    """The settings that are not the default and that all runs share."""
    largest = max(runs, key=lambda run: run.config.population)
    return {key: value for key, value in unusual(largest.config).items() if shared(key, value, runs)}


def shared(key, value, runs):
    """Whether all have the value of a setting. A single network has no population, and a replay has its own pace."""
    return all(getattr(run.config, key, None) == value or (key == "population" and run.config.method in SINGLE)
               or (key in ("generations", "epochs") and run.config.method == "replay") for run in runs)


def unusual(config):
    """The settings that are not the default, of those that tell variants of a method apart."""
    usual = {f.name: f.default for f in fields(Config) if not f.metadata.get("runtime") and f.name not in NO_VARIANT}
    usual |= {key: value for key, value in PROTOCOLS.get(config.dataset, CIFAR10).items() if key in usual}
    preset = getattr(config, "preset", "paper")
    usual |= PRESETS[preset] | {"elites": max(1, config.population // ELITES[preset])}
    usual |= {"novelty_candidates": min(getattr(config, "elites", 1) * 3 // 2, config.population)}
    if config.method in SINGLE:
        usual |= {"population": 1}
    if config.method == "replay":
        own = "generations", "epochs", "milestones", "lr_decay", *OF_THE_SCHEDULE
        usual |= {key: getattr(config, key) for key in own if hasattr(config, key)}
    choices = {key: getattr(config, key, usual[key]) for key in SEARCH}
    given = getattr(config, "augmentation", None)  # with data of one's own
    standard = Config(method=config.method, dataset=config.dataset, **choices).search_space(given and Augmentation(**given))
    usual |= {"augmentation": None, "space": [list(vars(v).values()) for v in standard]}
    usual = json.loads(json.dumps(usual))  # tuples are lists there
    return {key: getattr(config, key) for key in usual if getattr(config, key, usual[key]) != usual[key]}


def spell(key, value):
    if key == "space":
        return spell_space(value)
    words = key.replace("_", " ")
    if isinstance(value, dict):
        return f"{words} {', '.join(f'{name} {x}' for name, x in value.items())}"
    if isinstance(value, bool) or value == []:
        return words if value else f"no {words}"
    return f"{words} {'/'.join(map(str, value)) if isinstance(value, list) else value}"


def spell_space(space):
    """The evolved variables, with their range where it is not the usual one."""
    usual = [list(vars(v).values()) for v in SEARCH_SPACE]
    words = [v[0] if v in usual else "{} {:g} to {:g}".format(*v) for v in space]
    return "evolved " + ", ".join(dict.fromkeys(re.sub(r"^theta\d", "theta", w).replace("_", " ") for w in words))


# Tables --------------------------------------------------------------------------------------------------------------


def table(header, lines):
    """A Markdown table that is aligned as plain text too."""
    cells = [[str(cell) for cell in line] for line in (header, *lines)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    text = ["| " + " | ".join(cell.ljust(w) if i == 0 else cell.rjust(w)
                              for i, (cell, w) in enumerate(zip(line, widths, strict=True))) + " |" for line in cells]
    rule = "|" + "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return "\n".join([text[0], rule, *text[1:]])


def mean_sd(values):
    """Mean (sample standard deviation)."""
    if not values:
        return "-"
    return f"{fmean(values):.2f} ({stdev(values):.2f})" if len(values) > 1 else f"{values[0]:.2f} (-)"


def paired_t(a, b):
    """Student's t-test of paired samples, two-sided: mean difference, t, p (None where all differences are equal)."""
    differences = [x - y for x, y in zip(a, b, strict=True)]
    n, mean, deviation = len(differences), fmean(differences), stdev(differences)
    if deviation < 1e-12:
        return mean, None, None
    t = mean / (deviation / math.sqrt(n))
    return mean, t, 2 * float(stdtr(n - 1, -abs(t)))


def table1(problem, rows):
    paper = PAPER.get(problem, {})
    lines = []
    for row in rows:
        printed = paper.get(row.method) if row.plain else None
        lines.append([row.label, mean_sd(list(row.final.values())), len(row.final),
                      *(["{:.2f} ({:.2f})".format(*printed[:2]) if printed else "-"] if paper else [])])
    return table(["method", "mean (sd), %", "n", *(["paper, n = 5"] if paper else [])], lines)


def rivals(rows):
    """Pairs of rows to compare: EPBT and what comes of it with each baseline, and each variant with the first EPBT."""
    ours = [row for row in rows if row.method not in BASELINES]
    return ([(row, other) for row in ours for other in rows if other.method in BASELINES]
            + [(row, ours[0]) for row in ours[1:] if ours[0].method == "epbt"])


def t_tests(rows):
    """Paired over the common seeds, where there are two or more."""
    lines = []
    for row, other in rivals(rows):
        seeds = sorted(row.final.keys() & other.final.keys())
        if len(seeds) > 1:
            mean, t, p = paired_t([row.final[s] for s in seeds], [other.final[s] for s in seeds])
            lines.append([f"{row.label} - {other.label}", f"{mean:+.2f}", len(seeds),
                          *(["-", "-"] if p is None else [f"{t:+.2f}", f"{p:.3f}" if p >= 0.001 else "< 0.001"])])
    return table(["paired difference", "points", "seeds", "t", "p"], lines) if lines else ""


def epochs_to_pass(row, other):
    """Table 2: after how many epochs the mean curve first exceeds the other's final mean; None: never."""
    target = fmean(other.final.values())
    return next((epoch for epoch, mean, _ in zip(*row.curve(), strict=True) if mean > target), None)


def table2(problem, rows):
    ours = [row for row in rows if row.method == "epbt" and row.complete]
    others = [row for row in rows if row.method in BASELINES and row.complete]
    if not ours or not others:
        return ""
    paper = PAPER.get(problem, {})
    lines = [[other.label, *(epochs_to_pass(row, other) or "-" for row in ours),
              *([paper.get(other.method, (0, 0, "-"))[2] if other.plain else "-"] if paper else [])] for other in others]
    return table(["to pass", *(f"{row.label}, of {row.complete[0].total_epochs}" for row in ours),
                  *(["paper"] if paper else [])], lines)


def accounting(run):
    """Sec. 5.2: different settings tried (in EPBT each has a loss of its own), epochs trained, and the epochs that
    the full training of one network under each setting would take."""
    individuals = {m["id"]: m for line in run.log for m in line["population"]}
    settings = {tuple(m["hyperparameters"].items()) for m in individuals.values()}
    tried = 1 if run.config.method == "replay" else len(settings)
    return tried, len(individuals) * run.config.epochs, tried * run.total_epochs


def accounting_table(rows):
    lines = []
    for row in rows:
        tried, trained, full = map(fmean, zip(*map(accounting, row.complete or row.runs), strict=True))
        hours = fmean(run.seconds / 3600 for run in row.complete or row.runs)
        lines.append([row.label, f"{tried:,.0f}", f"{trained:,.0f}", f"{full:,.0f}", f"{full / trained:.1f}",
                      f"{hours:.3g}" if hours else "-"])  # published results carry no times
    return table(["a run", "losses or settings tried", "epochs trained", "full training of each", "ratio", "hours"],
                 lines)


def tables(problem, rows):
    """All that is printed of one data set and model, as Markdown."""
    runs = [run for row in rows for run in row.runs]
    parts = [f"## {', '.join(problem)}"]
    if settings := settings_shared(runs):
        parts.append("All runs: " + ", ".join(spell(key, value) for key, value in settings.items()) + ".")
    parts += ["Table 1. Final test accuracy of the fittest individual, chosen by its fitness: mean (sample standard "
              "deviation) over n seeds.", table1(problem, rows)]
    if text := t_tests(rows):
        parts += ["Differences in percentage points, with a two-sided paired t-test over the common seeds.", text]
    if text := table2(problem, rows):
        parts += ["Table 2. Epochs of training after which EPBT's mean exceeds the final mean of the baselines.", text]
    parts += ["Cost (Sec. 5.2), in epochs of one network: what a run trained, and what it would take to train one "
              "network in full under each loss or setting that it tried.", accounting_table(rows)]
    if unfinished := [run for run in runs if not run.finished]:
        parts.append("Not finished, so not in the tables: " + ", ".join(
            f"{run.folder} ({len(run.log)} of {run.config.generations} generations)" for run in unfinished) + ".")
    return "\n\n".join(parts) + "\n"


def write_csv(path, problems):
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow("dataset model method seed test_accuracy fitness epochs finished folder".split())
        for problem, rows in problems.items():
            for row in rows:
                for run in row.runs:
                    best = run.best[-1]
                    writer.writerow([*problem, row.label, run.config.seed, best["test_accuracy"], best["fitness"],
                                     run.epochs[-1], run.finished, run.folder])


# Figures -------------------------------------------------------------------------------------------------------------


def looks(rows):
    """{label: (colour, marker)}: a method always has the same, if it is there in one variant."""
    more, labels = cycle(MORE_LOOKS), {}
    for row in rows:
        labels.setdefault(row.method, set()).add(row.label)
    return {row.label: LOOKS[TITLES[row.method]] if row.plain or len(labels[row.method]) == 1 else next(more)
            for row in rows}


def figure_accuracy(problems):
    """Figures 2 to 4: test accuracy of the fittest individual over epochs, mean and standard error over the seeds.
    A column for each model; the top is a zoomed-in version of the bottom."""
    look = looks([row for rows in problems.values() for row in rows])
    figure = Figure(figsize=(max(4.6, 3.0 * len(problems) + 0.6), 5.6), layout="constrained")
    axes = figure.subplots(2, len(problems), squeeze=False, sharex="col")
    for (zoomed, whole), ((dataset, model), rows) in zip(axes.T, problems.items(), strict=True):
        for row in rows:
            colour, marker = look[row.label]
            epochs, mean, error = row.curve()
            for ax in (zoomed, whole):
                ax.errorbar(epochs, mean, error if error.any() else None, color=colour, marker=marker, markersize=3,
                            elinewidth=0.9, capsize=1.5, label=f"{row.label}, n = {len(row.complete or row.runs)}")
        zoomed.set_title(fill(f"{dataset}, {model}", 3.0))
        zoomed.set_ylim(*zoom([row.curve() for row in rows]))
        whole.set_xlabel("epochs of training")
        whole.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    for ax in axes[:, 0]:
        ax.set_ylabel("test accuracy (%)")
    handles = {label: handle for ax in axes[1] for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    longest = max(map(len, handles), default=0)
    columns = max(1, int(figure.get_figwidth() / (0.5 + 0.065 * longest)))  # inches: the handle, and a character
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns,
                  title="mean and standard error of the fittest individual")
    return figure


def zoom(curves):
    """A range that shows the later part of all curves but those that end far below the others, and what is above it."""
    ends = [mean[-1] for _, mean, _ in curves]
    far_below = max(ends) - 3 * (max(ends) - median(ends))
    shown = [(mean, error, int(0.6 * len(mean))) for _, mean, error in curves if mean[-1] >= far_below]
    low = min((mean - error)[late:].min() for mean, error, late in shown)
    high = max((mean + error).max() for mean, error, _ in shown)
    margin = 0.05 * (high - low) or 0.5
    return low - margin, high + margin


def figure_losses(runs, title):
    """Figure 5: the losses of the final best individual's ancestry as binary classification losses, early ones dark
    and late ones light, a panel for each run, and cross-entropy in the last. Each is drawn as its difference from its
    value at y = 1: Eq. 2 has a constant part, of up to thousands, that trains nothing and would hide the shapes."""
    columns = min(3, len(runs) + 1)
    lines = -(-(len(runs) + 1) // columns)
    figure = Figure(figsize=(2.4 * columns + 0.9, 2.2 * lines + 0.5), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False, sharex=True).flatten()
    y = np.linspace(0, 1, 51)
    colours = ListedColormap(matplotlib.colormaps["viridis"](np.linspace(0, 0.8, 256)))
    norm = Normalize(0, max(run.total_epochs for run in runs))
    for ax, run in zip(axes, runs, strict=False):
        for ancestor in run.ancestry:
            loss = binary_loss(theta(run, ancestor), y)
            ax.plot(y, loss - loss[-1], color=colours(norm((ancestor["generation"] + 1) * run.config.epochs)))
        ax.set_title(f"seed {run.config.seed}")
    y = np.geomspace(0.01, 1, 51)
    axes[len(runs)].plot(y, -np.log(y), color="black")
    axes[len(runs)].set_title("cross-entropy")
    for ax in axes[len(runs) + 1 :]:
        ax.remove()
    added = "\nEq. 2 alone; cross-entropy is added to it" if getattr(runs[0].config, "add_cross_entropy", False) else ""
    figure.suptitle(fill(title, figure.get_figwidth()) + added, fontsize=9)
    figure.supxlabel("y, predicted probability of the true class", fontsize=9)
    figure.supylabel("loss above that at y = 1", fontsize=9)
    figure.colorbar(ScalarMappable(norm, colours), ax=axes[: len(runs) + 1], label="epochs of training")
    return figure


FIGURE_6 = {"learning rate": "#D55E00", "momentum": "#0072B2"}  # and their colours


def figure_schedule(runs, title):
    """Figure 6: learning rate and momentum of the best individual of each generation by epoch, on a linear and a
    logarithmic scale, and below them what else is evolved beside the loss; a column for each run."""
    others = [name for name in evolved_values(runs[0]) if name not in FIGURE_6]
    figure = Figure(figsize=(max(4.6, 2.3 * len(runs) + 0.5), 4.8 + 1.3 * len(others)), layout="constrained")
    axes = figure.subplots(2 + len(others), len(runs), squeeze=False, sharex=True, sharey="row",
                           height_ratios=[2, 2, *(1 for _ in others)])

    def stairs(ax, values, **look):
        ax.stairs(values, np.arange(len(values) + 1), baseline=None, **look)

    for (linear, logarithmic, *more), run in zip(axes.T, runs, strict=True):
        values = evolved_values(run)
        fixed = baseline_rates(run)
        for ax in (linear, logarithmic):
            for name, colour in FIGURE_6.items():
                if name in values:
                    stairs(ax, values[name], color=colour, linewidth=1.3, label=name)
            stairs(ax, fixed, color="#777777", linestyle=":", label="learning rate of Baseline 1")
        for ax, name in zip(more, others, strict=True):
            stairs(ax, values[name], color="#009E73", linewidth=1.3)
        linear.set_title(f"seed {run.config.seed}")
        logarithmic.set_yscale("log")
        axes[-1, 0].xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    for ax, name in zip(axes[:, 0], ("value of each", "the same, log scale", *others), strict=True):
        ax.set_ylabel(name.replace("_", " "))
    for ax in axes[-1]:
        ax.set_xlabel("epoch")
    figure.suptitle(fill(title, figure.get_figwidth()), fontsize=9)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def figure_curves(run):
    """A run's learning curves: best and median fitness, and the test accuracy of the fittest."""
    figure = Figure(figsize=(4.6, 3.2), layout="constrained")
    ax = figure.subplots()
    single = run.config.method in SINGLE
    fitness = "validation accuracy (trained on too)" if single else "best fitness (validation accuracy)"
    best = [100 * best["fitness"] for best in run.best]
    middle = [100 * median(m["fitness"] for m in line["population"]) for line in run.log]
    ax.plot(run.epochs, best, color="#D55E00", marker="o", markersize=3, label=fitness)
    if best != middle:
        ax.plot(run.epochs, middle, color="#E69F00", marker="v", markersize=3, label="median fitness")
    ax.plot(run.epochs, [100 * best["test_accuracy"] for best in run.best], color="#0072B2", marker="s", markersize=3,
            linestyle="--", label="test accuracy of the fittest")
    ax.set(title=fill(str(run), 4.6), xlabel="epochs of training", ylabel="accuracy (%)", xlim=(0, run.total_epochs * 1.02))
    ax.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    ax.legend()
    return figure


def evolved_figures(runs, title):
    """Figure 5 if the loss is evolved, Figure 6 if anything else is."""
    names = runs[0].best[-1]["hyperparameters"].keys()
    figures = {"losses": figure_losses(runs, title)} if "theta0" in names else {}
    if not all(name.startswith("theta") for name in names):
        figures["schedule"] = figure_schedule(runs, title)
    return figures


def compared_figures(problems):
    """{name: Figure}: one of Figures 2 to 4 for each data set, Figures 5 and 6 for each row of the tables."""
    figures = {}
    for dataset in dict.fromkeys(dataset for dataset, _ in problems):
        same = {problem: rows for problem, rows in problems.items() if problem[0] == dataset}
        figures[file_name(["accuracy", dataset], figures)] = figure_accuracy(same)
    for problem, rows in problems.items():
        for row in rows:
            for kind, figure in evolved_figures(row.runs, ", ".join([row.label, *problem])).items():
                figures[file_name([kind, *problem, row.label], figures)] = figure
    return figures


def file_name(words, taken):
    """A file name of these words that is not taken yet, of at most 200 bytes and a number."""
    name = re.sub(r"[^\w.]+", "-", " ".join(words).lower()).strip("-").encode()[:200].decode(errors="ignore")
    return next(n for n in chain([name], (f"{name}-{i}" for i in count(2))) if n not in taken)


def fill(title, width):
    """A title of as many lines as it needs in a figure of this width, in inches."""
    return textwrap.fill(title, int(13 * width))


def save(figures, folder):
    """Write each as PNG and SVG, the same bytes each time. Returns the paths of the PNGs."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
        image = io.BytesIO()
        figure.savefig(image, format="png")
        # 256 colours: a third of the bytes, and no difference that is seen.
        Image.open(image).convert("RGB").quantize().save(folder / f"{name}.png", optimize=True)
    return [folder / f"{name}.png" for name in figures]


def draw_run(folder, out=None):
    """A run's own figures, into its folder or another. Returns the paths of the PNGs. Raises RunError."""
    run = load_started(folder)
    with matplotlib.rc_context(STYLE):
        figures = {"curves": figure_curves(run), **evolved_figures([run], f"{run.label}, {', '.join(run.problem)}")}
        return save(figures, Path(out or folder))


def compare(folders, out="figures"):
    """The tables, as text; tables.md, runs.csv and the figures in out. Raises RunError."""
    runs = [load_run(folder) for folder in dict.fromkeys(map(Path, folders))]
    started = [run for run in runs if run.log]
    if not started:
        raise RunError("no generation of any run is finished yet")
    problems = group(started)
    text = "\n".join(tables(problem, rows) for problem, rows in problems.items())
    if waiting := [str(run.folder) for run in runs if not run.log]:
        text += f"\nNo generation finished yet: {', '.join(waiting)}.\n"
    with matplotlib.rc_context(STYLE):
        save(compared_figures(problems), Path(out))
    (Path(out) / "tables.md").write_text(text)
    write_csv(Path(out) / "runs.csv", problems)
    return text


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the folder of a run")
    parser.add_argument("--out", help="where to draw; default the folder of the one run, figures/ for several")
    options = parser.parse_args(arguments)
    try:
        if len(options.runs) == 1:
            print(*draw_run(options.runs[0], options.out), sep="\n")
            run = load_run(options.runs[0])
            print(accounting_table([Row(run.method, run.config.method, [run])]))
        else:
            print(compare(options.runs, options.out or "figures"))
            print(f"figures, tables.md and runs.csv are in {options.out or 'figures'}")
    except (RunError, OSError) as error:
        print(f"figures.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
