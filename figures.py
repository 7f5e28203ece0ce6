"""Makes Tables 1 and 2 and Figures 2 to 6 of the paper from run folders.

    python figures.py --out results/NAME RUN ...

writes README.md with the tables, the pictures, runs.csv and logs.tar.gz. report.py draws one run.
"""

import csv
import subprocess
import sys
import textwrap
from bisect import bisect_left
from itertools import cycle
from pathlib import Path
from statistics import median

import matplotlib.style
import numpy as np
import tyro
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter
from PIL import Image
from tyro.conf import Positional, UseAppendAction

from errors import RunError, plain
from records import living_fitness, rank
from tables import Run, curve, final, group, noisy, scale, tables, write_logs

STYLE = Path(__file__).with_name("figures.mplstyle")
TABLES = "<!-- figures.py writes what follows and leaves what is above -->"
MACHINE = "nproc --all; echo cores,; sed -n 's/^model name.*: //p' /proc/cpuinfo | head -1"


def grid(rows, columns, size, title="", **options):
    """A figure of panels, and their axes of shape (rows, columns). size: of a panel in inches."""
    width = max(4.6, size[0] * columns + 0.6)
    figure = Figure((width, size[1] * rows + 0.6), layout="constrained")
    figure.suptitle(textwrap.fill(title, int(13 * width)))
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def add_legend(figure, drawn, title=None):
    """Add one legend for all axes. drawn: {label: artist}."""
    columns = int(figure.get_figwidth() / (0.6 + 0.065 * max(map(len, drawn)))) or 1
    figure.legend(drawn.values(), drawn, loc="outside lower center", ncols=columns, title=title)


def figure_lines(panels, xlabel, ylabel, note=None, zoomed=False):
    """Draw lines with error bars, a column for each panel; if zoomed, also a row above, zoomed in.
    panels: {title: {label: (x, y, error), or None for no line}}."""
    drawn, names = {}, dict.fromkeys(name for lines in panels.values() for name in lines)
    looks = dict(zip(names, cycle(matplotlib.rcParams["axes.prop_cycle"]), strict=False))
    size = (3.2, 2.6) if len(panels) > 1 else (4.6, 2.8)
    figure, axes = grid(1 + zoomed, len(panels), size, sharex="col")
    for column, (title, lines) in zip(axes.T, panels.items(), strict=True):
        lines = {name: line for name, line in lines.items() if line}
        for ax in column:
            for name, line in lines.items():
                drawn[name] = ax.errorbar(*line, **looks[name])
        column[0].set_title(textwrap.fill(title, int(13 * size[0])))
        column[-1].set_xlabel(xlabel)
        column[-1].xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))
        if max(max(y) for _, y, _ in lines.values()) <= 100:  # they may be percentages
            column[-1].set_ylim(top=min(101, column[-1].get_ylim()[1]))
        if zoomed:
            column[0].set_ylim(*zoom([y for _, y, _ in lines.values()]))
    for ax in axes[:, 0]:
        ax.set_ylabel(ylabel)
    add_legend(figure, drawn, note)
    return figure


def zoom(lines):
    """Limits of y that show the later part of the lines. Lines that end far below are left out."""
    ends, high = [line[-1] for line in lines], max(line.max() for line in lines)
    far_below = max(ends) - 3 * (max(ends) - median(ends))
    low = min(line[int(0.6 * len(line)):].min() for line in lines if line[-1] >= far_below)
    margin = 0.1 * (high - low) or 0.5
    return low - margin, high + margin


def over_noise(levels, name):
    """A row's shares of wrong labels, and the mean and standard error of its accuracy there."""
    points = [(100 * noise, np.mean(x), np.std(x, ddof=min(1, len(x) - 1)) / len(x) ** 0.5)
              for noise, rows in levels.items() if (x := [*final(rows.get(name, [])).values()])]
    return list(zip(*points, strict=True))


def binary_loss(theta, y):
    """Eq. 2 for two classes (Sec. 5.3): labels x = (1, 0), predictions (y, 1 - y), n = 2.
    theta: eight numbers; y: an array. Returns an array of its shape."""
    t, total = theta, 0
    for x, p in ((1, y), (0, 1 - y)):
        a, b = p - t[1], x - t[0]
        total += (t[2] * a + t[3] * a**2 / 2 + t[4] * a**3 / 6 + t[5] * b * a + t[6] * b * a**2 / 2
                  + t[7] * b**2 * a / 2)
    return -total / 2


def figure_losses(runs, title):
    """Figure 5: the losses of the final best individual's ancestry, early ones dark. A panel for
    each run, and one for cross-entropy. A curve is the loss minus its value at y = 1, as the
    constant part of Eq. 2 trains nothing and would hide the shapes."""
    if runs[0].config.get("add_cross_entropy"):
        title += "; Eq. 2 alone, to which cross-entropy is added"
    columns = min(3, len(runs) + 1)
    figure, axes = grid(-(-(len(runs) + 1) // columns), columns, (2.4, 2.1), title, sharex=True)
    colours = ListedColormap(matplotlib.colormaps["viridis"](np.linspace(0, 0.85, 256)))
    norm = Normalize(0, runs[0].total_epochs)
    y = np.linspace(0.01, 1, 100)
    panels = [*axes.flat]
    for ax, run in zip(panels, runs, strict=False):
        for ancestor in run.ancestry:
            loss = binary_loss(ancestor["applied"]["theta"], y)
            age = (ancestor["generation"] + 1) * run.config["epochs"]
            ax.plot(y, loss - loss[-1], marker="", color=colours(norm(age)))
        ax.set_title(f"seed {run.seed}")
    panels[len(runs)].plot(y, -np.log(y), marker="", color="black")
    panels[len(runs)].set_title("cross-entropy")
    for ax in panels[len(runs) + 1:]:
        ax.remove()
    figure.supxlabel("y, predicted probability of the true class")
    figure.supylabel("loss above that at y = 1")
    figure.colorbar(ScalarMappable(norm, colours), ax=panels[:len(runs) + 1], label="epochs")
    return figure


def applied(run, name):
    """What training applied to the best individual of each generation, by epoch. An elite keeps
    what it was trained with. NaN: it diverged before this epoch."""
    values = np.full((len(run.best), run.config["epochs"]), np.nan)
    for line, best in zip(values, run.best, strict=True):
        value = best["applied"][name]
        line[: len(value) if isinstance(value, list) else None] = value
    return values.ravel()


def figure_schedule(runs, title):
    """Figure 6: learning rate and momentum of the best individual of each generation, on a linear
    and on a logarithmic scale. Below them what else varies. A column for each run."""
    both = ("learning_rate", "momentum")
    panels = {"value": both, "log scale": both} | {
        name.replace("_", " "): (name,) for name in ("weight_decay", "cutout", "alpha")
        if any(np.ptp(applied(run, name)) for run in runs)}
    figure, axes = grid(len(panels), len(runs), (2.4, 1.7), title, sharex=True, sharey="row")
    for column, run in zip(axes.T, runs, strict=True):
        column[0].set_title(f"seed {run.seed}")
        column[1].set_yscale("log")
        column[1].yaxis.set_major_formatter("{x:g}")
        column[1].yaxis.set_minor_formatter(NullFormatter())
        column[-1].set_xlabel("epoch")
        for ax, names in zip(column, panels.values(), strict=True):
            lines = [ax.stairs(applied(run, name), baseline=None, color=f"C{i}", linewidth=1.4)
                     for i, name in enumerate(names)]
            if names == both:
                legend = dict(zip(("learning rate", "momentum"), lines, strict=True))
    for ax, name in zip(axes[:, 0], panels, strict=True):
        ax.set_ylabel(name)
    add_legend(figure, legend)
    return figure


def evolved_figures(runs, title):
    """Figures 5 and 6, if these values evolve. Old logs lack what training applied: none."""
    best, figures = runs[0].best[-1], {}
    if best.get("applied"):
        if any(name[:5] != "theta" for name in best["hyperparameters"]):
            figures["schedule"] = figure_schedule(runs, title)
        if best["applied"]["theta"]:
            figures["losses"] = figure_losses(runs, title)
    return figures


def figure_lineage(run):
    """Generations in columns, individuals by fitness, lines to parents. Each dot has a gid with
    its numbers, which report.py shows."""
    fitness = sorted(x for line in run.log for x in living_fitness(line["population"]))
    widest = max(len(line["population"]) for line in run.log)
    figure, ((ax,),) = grid(1, 1, (0.33 * len(run.log), 0.16 * widest + 0.4))
    before, winner = {}, []
    for g, line in enumerate(run.log):
        ranked = sorted(line["population"], key=rank, reverse=True)
        places = {m["id"]: (g, row) for row, m in enumerate(ranked)}
        for m in ranked:
            at, elite = places[m["id"]], m["generation"] < g
            if origin := before.get(m["id"] if elite else m["parent"]):
                ax.plot(*zip(origin, at, strict=True), "--" if elite else "-", marker="",
                        color="grey", linewidth=0.5)
            place = bisect_left(fitness, m["fitness"]) / len(fitness)  # fitness starts too low
            colour = "white" if m["diverged"] else matplotlib.colormaps["viridis"](place)
            ax.plot(*at, "o", color=colour, markersize=6, mec="grey", mew=0.5, zorder=3,
                    gid=f"individual {m['id']} of generation {m['generation']}: fitness "
                        f"{run.fitness_text(m['fitness'])}, test accuracy "
                        f"{m['test_accuracy']:.2%}")
        alive = [a["id"] for a in run.ancestry if a["generation"] <= g]
        winner += [places[id] for id in alive[-1:]]  # empty while everyone has diverged
        before = places
    ax.plot(*zip(*winner, strict=True), marker="", color="C2", linewidth=2.5, gid="ancestry")
    ax.set(xlabel="generation", ylim=(widest - 0.3, -0.7), yticks=[])
    ax.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    ax.grid(False)
    return figure


def compared_figures(problems):
    """{name: figure}: Figures 2 to 4; the share of wrong labels that networks reproduce, if the log
    has it; the accuracy over the share of wrong labels, if there are several shares."""
    panels = {problem + noisy(noise): rows for problem, levels in problems.items()
              for noise, rows in levels.items()}
    figures, note = {}, "mean and standard error of the fittest individual"
    if any(len({len(run.log) for run in runs}) > 1 for rows in panels.values()
           for runs in rows.values()):
        note += "; a replay that has ended counts with its end"
    for key, name, ylabel in (("test_accuracy", "accuracy", "test accuracy (%)"),
                              ("memorised", "memorisation", "wrong labels reproduced (%)")):
        lines = {title: {row: curve(runs, key) for row, runs in rows.items()}
                 for title, rows in panels.items()}
        if lines := {title: same for title, same in lines.items() if any(same.values())}:
            zoomed = key == "test_accuracy"
            figures[name] = figure_lines(lines, "epochs of training", ylabel, note, zoomed)
    lines = {problem: {row: over_noise(levels, row) for rows in levels.values() for row in rows}
             for problem, levels in problems.items() if len(levels) > 1}
    if lines:
        figures["noise"] = figure_lines(lines, "wrong labels (%)", "test accuracy (%)",
                                        "mean and standard error over the seeds")
    return figures


def row_figures(problems):
    """{name: figure}: Figures 5 and 6 of each row that evolves, for the most wrong labels."""
    figures = {}
    for i, (problem, levels) in enumerate(problems.items(), 1):
        noise, rows = list(levels.items())[-1]
        for row, runs in rows.items():
            if runs[0].config["method"] != "replay":
                found = evolved_figures(runs, f"{row}: {problem}{noisy(noise)}")
                more = f"-{i}" * (len(problems) > 1)
                figures |= {f"{kind}-{row}{more}": figure for kind, figure in found.items()}
    return figures


def save(figures, folder, svg=True):
    """Write each figure as PNG and SVG. The bytes are the same each time."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        if svg:
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
        figure.savefig(path := folder / f"{name}.png")
        # 256 colours look the same and need a third of the bytes.
        Image.open(path).convert("RGB").quantize().save(path, optimize=True)


@matplotlib.style.context(STYLE)
def draw_run(run):
    """Draw a run's curves, lineage and Figures 5 and 6 into its folder. Returns their names."""
    name = "best fitness" + f" ({run.metric})" * (run.metric != "accuracy")
    fitness, factor = {name: curve([run], "fitness")}, scale(run.metric)
    if several := len(run.log[0]["population"]) > 1:
        middle = [factor * median(living_fitness(line["population"])) for line in run.log]
        fitness["median fitness"] = run.epochs, np.array(middle), None
    accuracy = {"test accuracy of the fittest": curve([run]),
                "wrong labels that it reproduces": curve([run], "memorised")}
    panels, unit = {str(run): fitness | accuracy}, "%"
    if factor == 1:
        panels, unit = {f"{run}: fitness": fitness, "of the fittest, in %": accuracy}, ""
    figures = {"curves": figure_lines(panels, "epochs of training", unit)}
    if several:
        figures["lineage"] = figure_lineage(run)
    figures |= evolved_figures([run], str(run))
    save(figures, run.folder)
    return list(figures)


@matplotlib.style.context(STYLE)
def compare(folders: Positional[tuple[Path, ...]], out: Path,
            reference: UseAppendAction[tuple[str, ...]] = (), command: str = ""):
    """Write a results folder of several runs. Returns the tables. Raises RunError.

    Args:
        folders: the runs' folders; unfinished runs are left out.
        out: the folder to write.
        reference: a row to test the others against; repeat it for more. Default: the first row.
        command: the command that made the runs, for README.md."""
    runs = [Run(folder) for folder in dict.fromkeys(folders)]
    late = [f"{run} ({run.epochs[-1]} of {run.total_epochs} epochs)" for run in runs
            if not run.finished]
    if not (runs := [run for run in runs if run.finished]):
        raise RunError(f"no run is finished: {', '.join(late) or 'none was named'}")
    problems = group(runs)
    text = tables(problems, reference)
    if late:
        text += f"\nNot finished, so not in tables and pictures: {', '.join(late)}.\n"
    figures = compared_figures(problems)
    save(figures | row_figures(problems), out, svg=False)
    with open(out / "runs.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, runs[0].numbers, lineterminator="\n")
        writer.writeheader()
        writer.writerows(run.numbers for run in runs)
    write_logs(out / "logs.tar.gz", runs)
    readme = out / "README.md"
    if readme.exists():
        head = readme.read_text(encoding="utf-8").split(TABLES)[0]
    else:
        where = " ".join(subprocess.check_output(MACHINE, shell=True, text=True).split())
        command = plain(command or f"python figures.py --out {out}")
        head = f"# {plain(out.name)}\n\nCommand: `{command}`. Machine: {where}.\n\n"
    pictures = "".join(f"\n![{name}]({name}.png)\n" for name in figures)
    commits = ", ".join(dict.fromkeys(commit for run in runs for commit in run.commits))
    commits = f"Commits of the runs: {commits}.\n\n" * bool(commits)  # older runs have none
    readme.write_text(f"{head}{TABLES}\n\n{commits}{text}{pictures}", encoding="utf-8")
    return text


def main(arguments=None):
    try:
        print(tyro.cli(compare, args=arguments, description=__doc__))
    except (RunError, OSError) as error:
        print(f"figures.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
