"""Writes report.html, a page about a run, into its folder. It needs no other file, no JavaScript.

    python report.py runs/NAME ...
"""

import re
import sys
from pathlib import Path

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from errors import RunError, plain
from figures import draw_run
from records import write_atomic
from tables import Run


def report(folder):
    """Write the figures and report.html of a run, finished or not, into its folder. Returns the
    path of the page. Raises RunError."""
    run = Run(folder)
    drawings = {name: inline((run.folder / f"{name}.svg").read_text(encoding="utf-8"))
                for name in draw_run(run)}
    space = ", ".join("{} {:g} to {:g}".format(*v) for v in run.config.get("space", []))
    page = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    text = page.get_template("report.html.j2").render(
        run=run, drawings=drawings, outcome=outcome(run),
        settings=readable(run.config | {"space": space}))
    write_atomic(path := run.folder / "report.html", text.encode())
    return path


def readable(items):
    return {name.replace("_", " "): f"{value:.4g}" if isinstance(value, float)
            else "-" if value in (None, "") else plain(value) for name, value in items.items()}


def outcome(run):
    """The fittest individual, what training applied to it, and the costs as in Sec. 5.2."""
    best, numbers = run.best[-1], run.numbers
    applied = {k: value for k, value in (best.get("applied") or {}).items() if k != "theta"}
    if rates := applied.pop("learning_rate", None):
        applied["learning rate, in its last epoch"] = rates[-1]
    full, trained = numbers["full_training"], numbers["epochs_trained"]
    return {
        f"fitness ({run.metric})": run.fitness_text(best["fitness"]),
        "test accuracy": f"{best['test_accuracy']:.2%}",
        "individual": f"{best['id']} (generation {best['generation']})",
        "ancestors": len(run.ancestry) - 1,
        **readable(best.get("scores", {}) | applied | best["hyperparameters"]),
        "losses or settings tried": f"{numbers['tried']:,}", "epochs trained": f"{trained:,}",
        "epochs to train one network in full under each": f"{full:,} ({full / trained:.1f} times)",
        "duration, without generations that were interrupted": f"{60 * run.hours:.3g} minutes",
    }


def inline(drawing):
    """Turn an SVG file into an element of a page, never drawn smaller than its own width. The ids
    of its groups go, as an id may be only once in a page; those of individuals become tooltips."""
    text = drawing[drawing.index("<svg"):]
    text = re.sub(r'<g id="(individual [^"]*)">', r"<g><title>\1</title>", text)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    width = re.search(r'width="([\d.]+)pt"', text)[1]
    return Markup(text.replace("<svg", f'<svg style="min-width: {width}px"', 1))


def main():
    if len(sys.argv) == 1:
        sys.exit(__doc__)
    try:
        for folder in sys.argv[1:]:
            print(plain(report(folder)))
    except (RunError, OSError) as error:
        print(f"report.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
