"""Reads run folders, sorts the runs into rows, and makes Tables 1 and 2 of the paper of them.

A folder is named ROW-SEED, such as best-decay-3, or ROW-NOISE-SEED, such as best-0.4-3: its config
tells the seed and the share of wrong labels. The runs of a row are repetitions.
"""

import gzip
import json
import math
import os
import re
import tarfile
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
from tabulate import tabulate

from records import RunError, fittest, read_config, read_log

BASELINES = ("baseline", "pbt", "random")  # methods; Sec. 4.1
# What the runs of a row may differ in: the seed, what follows from it, and the machine.
FREE = set("seed data replay schedule device threads loss_backend workers backend ray_address "
           "no_graphs out data_root download resume overwrite tensorboard plan".split())
SETTINGS = "method dataset model seed generations epochs".split()
RECORD = "id generation parent hyperparameters fitness test_accuracy diverged".split()
FILES = ("config.json", "log.jsonl", "schedule.json", "summary.json", "timing.jsonl")


@dataclass
class Run:
    """A run as its folder tells it, finished or not."""

    folder: Path
    config: dict
    log: list[dict]
    seconds: float  # of its generations; 0 where the folder has no times
    scores: dict  # {metric: of the fittest on the test images}, where the run is finished

    def __post_init__(self):
        config, name = self.config, printable(Path(os.path.abspath(self.folder)).name)
        self.seed, self.noise = config["seed"], config.get("label_noise") or 0
        self.row = re.sub(rf"(-{re.escape(f'{self.noise:g}')})?-{self.seed}$", "", name) or name
        self.problem = printable(f"{config['dataset']}, {config['model']}")
        fittest_ones = [fittest(line["population"]) for line in self.log]  # of each generation
        self.best = [m.get("scores", {}) | m for m in fittest_ones]
        self.epochs = [(line["generation"] + 1) * config["epochs"] for line in self.log]
        self.total_epochs = config["generations"] * config["epochs"]
        self.finished = len(self.log) >= config["generations"]
        self.metric = config.get("fitness", "accuracy")
        if self.best:
            self.scores["accuracy"] = self.best[-1]["test_accuracy"]

    def __str__(self):
        return f"{self.row}, seed {self.seed}: {self.problem}{noisy(self.noise)}"

    def numbers(self):
        """The run's line in runs.csv. Sec. 5.2: the losses or settings that it tried, the epochs
        that it trained, and those of one network's full training under each loss or setting."""
        everyone = {m["id"]: m for line in self.log for m in line["population"]}
        tried = len({tuple(m["hyperparameters"].values()) for m in everyone.values()})
        tried = 1 if self.config["method"] == "replay" else tried
        metrics = ("accuracy", "balanced-accuracy", "f1-macro")
        best = {f"test_{name}".replace("-", "_"): self.scores.get(name) for name in metrics}
        best |= {key: self.best[-1].get(key) for key in ("fitness", "memorised")}
        return dict(problem=self.problem, label_noise=self.noise, method=self.row, seed=self.seed,
                    **best, epochs=self.epochs[-1], finished=self.finished, tried=tried,
                    epochs_trained=len(everyone) * self.config["epochs"],
                    full_training=tried * self.total_epochs, hours=round(self.seconds / 3600, 6))


def printable(text):
    """Free text, such as a folder's name, as it can be written anywhere: bytes that are not UTF-8
    and control characters become the replacement character."""
    return "".join(c if c.isprintable() else "\ufffd" for c in str(text))


def noisy(noise):
    return f", {100 * noise:g}% wrong labels" if noise else ""


def load_run(folder):
    """Raises RunError, whose one line names the folder, where it holds no run or a damaged one."""
    folder = Path(folder)
    config, log, times = read_config(folder), read_log(folder), folder / "timing.jsonl"
    try:
        _ = [config[name] for name in SETTINGS]
        _ = [m[name] for line in log for m in line["population"] for name in RECORD]
        lines = times.read_text(encoding="utf-8").splitlines() if times.exists() else []
        seconds, summary = sum(json.loads(line)["seconds"] for line in lines), {}
        if (folder / "summary.json").exists():
            summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        run = Run(folder, config, log, seconds, summary.get("test_scores", {}))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{folder} is damaged: {type(error).__name__}: {error}") from error
    if not log:
        raise RunError(f"{folder}: no generation is finished yet")
    return run


# Rows: lists of runs ------------------------------------------------------------------------------


def group(runs):
    """{dataset and model: {share of wrong labels: {row: runs}}}, the rows in the order given.
    Raises RunError where the runs of a row differ in more than the seed. A setting that one of them
    lacks came with a later version: it is off there."""
    problems = {}
    for run in sorted(runs, key=lambda run: run.noise):
        row = problems.setdefault(run.problem, {}).setdefault(run.noise, {}).setdefault(run.row, [])
        for other in row:
            # A replay has as many generations as its schedule has epochs.
            free = FREE | ({"generations"} if run.config["method"] == "replay" else set())
            a, b = ({key: value for key, value in r.config.items() if value and key not in free}
                    for r in (other, run))
            apart = [key for key in sorted({*a, *b}) if a.get(key) != b.get(key)]
            if apart or other.seed == run.seed:
                what = f"differ in {', '.join(apart)}" if apart else "have the same seed"
                raise RunError(f"{other.folder} and {run.folder} are named as one row, {run.row}, "
                               f"but {what}: the runs of a row differ in the seed and only there")
        row.append(run)
    return problems


def shown(runs):
    """The finished runs of a row; before there are any, all."""
    return [run for run in runs if run.finished] or runs


def final(runs, metric="accuracy"):
    """{seed: metric of the fittest individual on the test images in percent} of the finished runs
    that have it."""
    return {run.seed: 100 * run.scores[metric] for run in runs
            if run.finished and metric in run.scores}


def curve(runs, key="test_accuracy"):
    """Epochs, mean and standard error over the runs, in percent, of what the log has as `key` of
    the fittest of each generation; None where it is missing."""
    runs = shown(runs)
    n = min(len(run.log) for run in runs)
    values = 100 * np.array([[best.get(key) for best in run.best[:n]] for run in runs], float)
    if np.isnan(values).any():
        return None
    error = values.std(axis=0, ddof=min(1, len(runs) - 1)) / math.sqrt(len(runs))
    return runs[0].epochs[:n], values.mean(axis=0), error


# Tables -------------------------------------------------------------------------------------------


def table(header, lines):
    """A Markdown table that is aligned as plain text too."""
    header, *lines = [[str(cell).replace("|", "\\|") for cell in line] for line in (header, *lines)]
    return tabulate(lines, header, "pipe", disable_numparse=True,
                    colalign=("left", *["right"] * (len(header) - 1)))


def mean_sd(values):
    if not values:
        return "-"
    sd = f"{stdev(values):.2f}" if len(values) > 1 else "-"
    return f"{fmean(values):.2f} ({sd}; {len(values)})"


def paired(runs, others, metric="accuracy"):
    """The mean difference over the common seeds in percentage points, and p of the two-sided paired
    t-test where there are two or more."""
    from scipy.stats import ttest_rel  # here: it takes a second, which a single run can do without

    ours, theirs = final(runs, metric), final(others, metric)
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds or runs is others:
        return "-"
    a, b = ([values[seed] for seed in seeds] for values in (ours, theirs))
    text = f"{fmean(a) - fmean(b):+.2f}"
    text += f" over {len(seeds)} seeds" * (len(seeds) < len(ours))
    if np.ptp(np.subtract(a, b)) < 1e-9:  # one seed, or differences that are all equal: no test
        return text
    p = ttest_rel(a, b).pvalue
    return f"{text}, p " + (f"= {p:.3f}" if p >= 0.001 else "< 0.001")


def table1(levels, references, metric):
    """Rows are methods; for each share of wrong labels the metric, and the difference from each
    row that `references` names."""
    header, lines = ["method"], {name: [name] for rows in levels.values() for name in rows}
    for noise, rows in levels.items():
        header += [f"{metric}{noisy(noise)}", *(f"against {name}" for name in references)]
        for name, line in lines.items():
            runs = rows.get(name, [])
            line += [mean_sd([*final(runs, metric).values()]),
                     *(paired(runs, rows.get(other, []), metric) for other in references)]
    for name, line in lines.items():
        runs = [run for rows in levels.values() for run in shown(rows.get(name, []))]
        line.append(f"{fmean(run.numbers()['epochs_trained'] for run in runs):,.0f}")
    return table([*header, "epochs trained"], lines.values())


def epochs_to_pass(runs, others):
    """Table 2: after how many epochs the mean curve first exceeds the others' final mean."""
    target, (epochs, means, _) = fmean(final(others).values()), curve(runs)
    return next((e for e, mean in zip(epochs, means, strict=True) if mean > target), "never")


def table2(rows):
    done = {name: runs for name, runs in rows.items() if final(runs)}
    ours = {name: runs for name, runs in done.items() if runs[0].config["method"] == "epbt"}
    lines = [[name, *(epochs_to_pass(runs, others) for runs in ours.values())]
             for name, others in done.items() if others[0].config["method"] in BASELINES]
    header = ["to pass", *(f"{name}, of {runs[0].total_epochs}" for name, runs in ours.items())]
    return table(header, lines) if ours and lines else ""


def compared(runs):
    """What Table 1 compares: the accuracy and, where a run evolved for another metric, all that
    differ from the accuracy."""
    found = dict.fromkeys(name for run in runs for name in run.scores)
    return ["accuracy", *(name for name in found if any(run.metric != "accuracy" for run in runs)
            and any(abs(run.scores.get(name, 0) - run.scores["accuracy"]) > 1e-9 for run in runs))]


def tables(problems, references=()):
    """All tables as Markdown. The reference is the first row where none is named."""
    parts = []
    for problem, levels in problems.items():
        rows = {name: [run for level in levels.values() for run in level.get(name, [])]
                for name in chain(*levels.values())}
        if missing := set(references) - rows.keys():
            raise RunError(f"{problem}: no row is called {min(missing)}, only {', '.join(rows)}")
        parts += [f"## {problem}", "Table 1. Final test accuracy in % of the fittest individual, "
                  "chosen by its fitness: mean (sample standard deviation; number of seeds). "
                  "Differences are over the common seeds, with a two-sided paired t-test. The "
                  "epochs are those that all networks of a run trained.",
                  *(table1(levels, references or list(rows)[: len(rows) > 1], metric)
                    for metric in compared([*chain(*rows.values())]))]
        for noise, level in levels.items():
            if text := table2(level):
                parts += [f"Table 2{noisy(noise)}. Epochs of training after which EPBT's mean "
                          "exceeds the final mean of a baseline.", text]
        if late := [run for run in chain(*rows.values()) if not run.finished]:
            parts.append("Not finished, so not in the tables: " + ", ".join(
                f"{run} ({run.epochs[-1]} of {run.total_epochs} epochs)" for run in late) + ".")
    return "\n\n".join(parts) + "\n"


def write_logs(path, runs):
    """An archive of the runs' text files. The same bytes each time: sorted, no times, no owners."""
    folders = [Path(os.path.abspath(run.folder)) for run in runs]
    top = os.path.commonpath([folder.parent for folder in folders])
    with (gzip.GzipFile(path, "wb", mtime=0) as file,
          tarfile.open(fileobj=file, mode="w") as archive):
        for source in sorted(folder / name for folder in folders for name in FILES):
            if source.exists():
                entry = tarfile.TarInfo(os.path.relpath(source, top))
                entry.size = source.stat().st_size
                with open(source, "rb") as content:
                    archive.addfile(entry, content)
