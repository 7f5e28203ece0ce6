"""One page of a run, finished or not: report.html in its folder. Self-contained, no JavaScript.

    python report.py runs/NAME
"""

import os
import re
import sys
from bisect import bisect_left
from pathlib import Path

import matplotlib
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup
from matplotlib.colors import to_hex

from figures import draw_run
from records import RunError, ancestry, rank
from tables import load_run, printable


def report(folder):
    """Write a run's own figures and report.html into its folder, with what it has done so far.
    Returns the path of the page. Whatever goes wrong is a RunError of one line, so that a caller
    can say it and keep the result."""
    try:
        return write_report(load_run(folder))
    except RunError:
        raise
    except Exception as error:  # of matplotlib, of jinja2, of the disk
        text = f"cannot draw {folder}: {type(error).__name__}: {error}"
        raise RunError(printable(text.splitlines()[0])) from error


def write_report(run):
    drawings = {name: inline((run.folder / f"{name}.svg").read_text(encoding="utf-8"))
                for name in draw_run(run)}
    space = ", ".join("{} {:g} to {:g}".format(*v) for v in run.config.get("space", []))
    page = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    text = page.get_template("report.html.j2").render(
        run=run, title=str(run), drawings=drawings, outcome=outcome(run), lineage=lineage(run),
        settings=readable(run.config | {"space": space}))
    path, new = run.folder / "report.html", run.folder / "report.html.new"
    new.write_text(text, encoding="utf-8")
    os.replace(new, path)
    return path


def readable(items):
    return {printable(name).replace("_", " "): f"{value:.4g}" if isinstance(value, float)
            else "-" if value in (None, "") else printable(value) for name, value in items.items()}


def outcome(run):
    """The fittest individual, what training applied to it, and the accounting of Sec. 5.2."""
    best, numbers = run.best[-1], run.numbers()
    applied = {k: value for k, value in (best.get("applied") or {}).items() if k != "theta"}
    if rates := applied.pop("learning_rate", None):
        applied["learning rate, in its last epoch"] = rates[-1]
    full, trained = numbers["full_training"], numbers["epochs_trained"]
    return {
        f"fitness ({run.metric})": f"{best['fitness']:.2%}", "test accuracy": f"{best['test_accuracy']:.2%}",
        "individual": f"{best['id']} (generation {best['generation']})",
        "ancestors": len(ancestry(run.log)) - 1,
        **readable(best.get("scores", {}) | applied | best["hyperparameters"]),
        "losses or settings tried": f"{numbers['tried']:,}", "epochs trained": f"{trained:,}",
        "epochs to train one network in full under each": f"{full:,} ({full / trained:.1f} times)",
        "duration": f"{run.seconds / 60:.3g} minutes",
    }


def inline(drawing):
    """An SVG file as an element of a page, its text never below its own size. The names of its
    groups are left out: a page may hold each name once."""
    text = re.sub(r'<g id="[^"]*"', "<g", drawing[drawing.index("<svg"):])
    width = re.search(r'width="([\d.]+)pt"', text)[1]
    return Markup(text.replace("<svg", f'<svg style="min-width: {width}px"', 1))


def lineage(run):
    """What the page draws of the population's lineage: generations in columns, individuals by
    fitness; None of a network that stands alone."""
    if max(len(line["population"]) for line in run.log) == 1:
        return None
    fitness = sorted(m["fitness"] for line in run.log for m in line["population"])
    colours = matplotlib.colormaps["viridis"]  # by rank: the first generation is often far below
    dx, dy = 32, min(13, max(7, 260 // len(run.log[0]["population"])))
    places, links, dots = [], [], []  # places: for each generation {id: (x, y)}
    for column, line in enumerate(run.log):
        ranked = sorted(line["population"], key=rank, reverse=True)
        places.append({m["id"]: (24 + column * dx, 10 + row * dy) for row, m in enumerate(ranked)})
        for m in ranked:
            elite, at = m["generation"] < line["generation"], places[-1][m["id"]]
            if column and (origin := places[-2].get(m["id"] if elite else m["parent"])):
                links.append((origin, at, elite))
            colour = to_hex(colours(bisect_left(fitness, m["fitness"]) / len(fitness)))
            dots.append((at, None if m["diverged"] else colour,
                         f"individual {m['id']} of generation {m['generation']}: fitness "
                         f"{m['fitness']:.2%}, test accuracy {m['test_accuracy']:.2%}"))
    # In each generation, the ancestor that was trained last. A run in which a whole generation
    # diverged has its first ancestor in a later one.
    ancestors = ancestry(run.log)
    alive = [[a["id"] for a in ancestors if a["generation"] <= g][-1:] for g in range(len(places))]
    return dict(links=links, dots=dots, radius=round(0.32 * dy, 1), width=24 + len(places) * dx,
                height=30 + dy * max(map(len, places)),
                winner=[place[ids[0]] for place, ids in zip(places, alive, strict=True) if ids],
                labels=[(24 + g * dx, g) for g in range(0, len(places), 1 + len(places) // 20)])


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    try:
        print(printable(report(sys.argv[1])))
    except RunError as error:
        print(f"report.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
