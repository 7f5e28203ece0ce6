"""Reads run folders, sorts the runs into rows, and makes Tables 1 and 2 of the paper.

A folder is named ROW-SEED or ROW-NOISE-SEED, such as best-decay-3 or best-0.4-3. Its config has
the seed and the share of wrong labels. The runs of a row differ in the seed alone.
"""

import gzip
import io
import json
import math
import os
import tarfile
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
from tabulate import tabulate

from errors import RunError, plain
from records import ancestry, differing, fittest, read_config, read_log, read_timing

# What the runs of a row may differ in: the seed, what follows from it, and the machine.
FREE = {"seed", "data", "replay", "schedule", "device", "threads", "loss_backend"}


class Run:
    """What the folder of a run says about it, finished or not."""

    def __init__(self, folder):
        """Raises RunError, which names the folder, if it holds no run or a damaged one."""
        self.folder, self.config, self.log = Path(folder), read_config(folder), read_log(folder)
        if not self.log:
            raise RunError(f"{folder}: no generation is finished yet")
        try:
            self.read()
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise RunError(f"{folder} is damaged: {type(error).__name__}: {error}") from error

    def read(self):
        config, log, name = self.config, self.log, plain(self.folder.absolute().name)
        self.seed, self.noise = config["seed"], config.get("label_noise") or 0
        self.row = name.removesuffix(f"-{self.seed}").removesuffix(f"-{self.noise:g}") or name
        self.problem = plain(f"{config['dataset']}, {config['model']}")
        fittest_ones = [fittest(line["population"]) for line in log]  # of each generation
        self.best = [m.get("scores", {}) | m for m in fittest_ones]
        self.ancestry = ancestry(log)
        self.epochs = [(line["generation"] + 1) * config["epochs"] for line in log]
        self.total_epochs = config["generations"] * config["epochs"]
        self.finished = len(log) >= config["generations"]
        self.metric, summary = config.get("fitness", "accuracy"), self.folder / "summary.json"
        # The metrics of the fittest on the test images.
        self.scores = {"accuracy": self.best[-1]["test_accuracy"]}
        if summary.exists():
            found = json.loads(summary.read_text(encoding="utf-8")).get("test_scores", {})
            self.scores = found | self.scores
        times = read_timing(self.folder)
        self.hours = sum(line["seconds"] for line in times) / 3600
        self.commits = dict.fromkeys(line["commit"] for line in times if line.get("commit"))
        # Sec. 5.2: how many losses or settings it tried, how many epochs it trained, and how many
        # it would take to train one network in full under each loss or setting.
        everyone = {m["id"]: m for line in log for m in line["population"]}
        tried = len({tuple(m["hyperparameters"].values()) for m in everyone.values()})
        tried = 1 if config["method"] == "replay" else tried
        best = {f"test_{name}".replace("-", "_"): self.scores.get(name)
                for name in ("accuracy", "balanced-accuracy", "f1-macro")}
        best |= {key: self.best[-1].get(key) for key in ("fitness", "memorised")}
        self.numbers = dict(  # its line in runs.csv
            problem=self.problem, label_noise=self.noise, method=self.row, seed=self.seed, **best,
            epochs=self.epochs[-1], finished=self.finished, tried=tried,
            epochs_trained=len(everyone) * config["epochs"],
            full_training=tried * self.total_epochs, hours=round(self.hours, 6),
            commit=" ".join(self.commits))

    def fitness_text(self, fitness):
        return f"{fitness:.2%}" if scale(self.metric) == 100 else f"{fitness:.4g}"

    def __str__(self):
        return f"{self.row}, seed {self.seed}: {self.problem}{noisy(self.noise)}"


def scale(metric):
    """100 for a share, which is shown in %; 1 for a user's function, whose values may be any."""
    return 1 if ":" in metric else 100


def noisy(noise):
    return f", {100 * noise:g}% wrong labels" if noise else ""


def group(runs):
    """{dataset and model: {share of wrong labels: {row: runs}}}, the rows in the order given.
    Raises RunError if the runs of a row differ in more than the seed. A setting that an older run
    lacks counts as off."""
    problems = {}
    for run in sorted(runs, key=lambda run: run.noise):
        row = problems.setdefault(run.problem, {}).setdefault(run.noise, {}).setdefault(run.row, [])
        # A replay has as many generations as its schedule has epochs.
        free = FREE | ({"generations"} if run.config["method"] == "replay" else set())
        for other in row:
            apart = differing(*({key: value for key, value in r.config.items()
                                 if value and key not in free} for r in (other, run)))
            if apart or other.seed == run.seed:
                what = f"differ in {', '.join(apart)}" if apart else "have the same seed"
                raise RunError(f"{other.folder} and {run.folder} are named as one row, {run.row}, "
                               f"but {what}: the runs of a row differ in the seed and only there")
        row.append(run)
    return problems


def final(runs, metric="accuracy"):
    """{seed: test metric of the fittest individual, in % if a share}, for the runs that have it."""
    return {run.seed: scale(metric) * run.scores[metric] for run in runs if metric in run.scores}


def curve(runs, key="test_accuracy"):
    """Epochs, mean and standard error of `key` of the fittest of each generation, in % if it is a
    share. A run that ends before the others, a replay, counts with its end from then on. The error
    is None for one run. Returns None if the log lacks the key."""
    longest = max(runs, key=lambda run: len(run.log))
    best = [run.best + run.best[-1:] * (len(longest.log) - len(run.log)) for run in runs]
    values = np.array([[member.get(key) for member in line] for line in best], float)
    if np.isnan(values).any():
        return None
    values *= scale(runs[0].metric) if key == "fitness" else 100
    error = values.std(axis=0, ddof=1) / math.sqrt(len(runs)) if len(runs) > 1 else None
    return longest.epochs, values.mean(axis=0), error


def table(lines):
    """A Markdown table. The first line is its header."""
    cells = [[str(cell).replace("|", "\\|") for cell in line] for line in lines]
    return tabulate(cells, "firstrow", "pipe", disable_numparse=True,
                    colalign=("left", *["right"] * (len(cells[0]) - 1)))


def mean_sd(runs, metric):
    values = [*final(runs, metric).values()]
    sd = f"{stdev(values):.2f}" if len(values) > 1 else "-"
    return f"{fmean(values):.2f} ({sd}; {len(values)})" if values else "-"


def paired(runs, others, metric="accuracy"):
    """The mean difference over the common seeds in percentage points, and p of the two-sided paired
    t-test unless all differences are equal."""
    from scipy.stats import ttest_1samp  # slow to import, and the report of a run needs no test

    ours, theirs = final(runs, metric), final(others, metric)
    differences = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    if not differences or runs is others:
        return "-"
    text = f"{fmean(differences):+.2f}"
    text += f" over {len(differences)} seeds" * (len(differences) < len(ours))
    if np.ptp(differences) < 1e-9:
        return text
    p = ttest_1samp(differences, 0).pvalue
    return f"{text}, p " + (f"= {p:.3f}" if p >= 0.001 else "< 0.001")


def table1(levels, everyone, references, metric):
    """A row for each method of everyone = {row: runs}. For each share of wrong labels, columns with
    the metric and with the difference from each row in `references`."""
    columns = [["method", *everyone]]
    for noise, rows in levels.items():
        runs = [rows.get(name, []) for name in everyone]
        columns.append([metric + noisy(noise), *(mean_sd(mine, metric) for mine in runs)])
        columns += [[f"against {other}",
                     *(paired(mine, rows.get(other, []), metric) for mine in runs)]
                    for other in references]
    trained = (fmean(run.numbers["epochs_trained"] for run in runs) for runs in everyone.values())
    columns.append(["epochs trained", *(f"{epochs:,.0f}" for epochs in trained)])
    return table(zip(*columns, strict=True))


def epochs_to_pass(runs, others):
    """Table 2: the epoch in which the mean curve first exceeds the others' final mean."""
    target, (epochs, means, _) = fmean(final(others).values()), curve(runs)
    return next((e for e, mean in zip(epochs, means, strict=True) if mean > target), "never")


def table2(rows):
    ours = {name: runs for name, runs in rows.items() if runs[0].config["method"] == "epbt"}
    lines = [[name, *(epochs_to_pass(runs, others) for runs in ours.values())]
             for name, others in rows.items()
             if others[0].config["method"] not in ("epbt", "replay")]
    header = ["to pass", *(f"{name}, of {runs[0].total_epochs}" for name, runs in ours.items())]
    return table([header, *lines]) if ours and lines else ""


def compared(runs):
    """The metrics of Table 1: the accuracy and, if a run evolved for another metric, all metrics
    that differ from it."""
    others = dict.fromkeys(name for run in runs for name in run.scores)
    if all(run.metric == "accuracy" for run in runs):
        others = ()
    return ["accuracy", *(name for name in others if any(
        abs(run.scores.get(name, 0) - run.scores["accuracy"]) > 1e-9 for run in runs))]


def tables(problems, references=()):
    """All tables as Markdown. If no reference is named, it is the first row."""
    parts = []
    for problem, levels in problems.items():
        everyone = {}
        for rows in levels.values():
            for name, runs in rows.items():
                everyone[name] = everyone.get(name, []) + runs
        if missing := set(references) - everyone.keys():
            raise RunError(f"{problem}: no row is called {min(missing)}, only "
                           f"{', '.join(everyone)}")
        metrics = compared(sum(everyone.values(), []))
        own = any(scale(name) == 1 for name in metrics)
        parts += [f"## {problem}", "Table 1. Final test accuracy in % of the fittest individual, "
                  "chosen by its fitness: mean (sample standard deviation; number of seeds). "
                  "Differences are over the common seeds, with a two-sided paired t-test. The "
                  "epochs are those that all networks of a run trained."
                  + " A function of one's own is not in %." * own,
                  *(table1(levels, everyone, references or [*everyone][: len(everyone) > 1], metric)
                    for metric in metrics)]
        for noise, rows in levels.items():
            if text := table2(rows):
                parts += [f"Table 2{noisy(noise)}. Epochs of training after which EPBT's mean "
                          "exceeds the final mean of a baseline.", text]
    return "\n\n".join(parts) + "\n"


def write_logs(path, runs):
    """Archive the runs' text files: sorted, without times and owners, so always the same bytes."""
    folders = [run.folder.absolute() for run in runs]
    top = os.path.commonpath([folder.parent for folder in folders])
    with (gzip.GzipFile(path, "wb", mtime=0) as file,
          tarfile.open(fileobj=file, mode="w") as archive):
        for source in sorted(file for folder in folders for file in folder.glob("*.json*")):
            entry, content = tarfile.TarInfo(os.path.relpath(source, top)), source.read_bytes()
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
