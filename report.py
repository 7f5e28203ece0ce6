"""One page of a run, finished or not: report.html in its folder. Self-contained, without JavaScript.

    python report.py runs/NAME
"""

import re
import sys
from bisect import bisect_left
from html import escape
from pathlib import Path

import matplotlib
from matplotlib.colors import to_hex

from config import SINGLE
from figures import accounting, draw_run, load_started
from records import RunError, rank, write_atomic

CAPTIONS = {
    "curves": "Accuracy by epochs of training. Only the fitness selects; the test accuracy is there to be compared.",
    "losses": "The losses of the fittest individual's ancestry, drawn for two classes (Figure 5 of the paper), each "
              "less its value at y = 1.",
    "schedule": "Learning rate, momentum and what else is evolved, of each generation's best individual (Figure 6 of the "
                "paper).",
}
PAGE = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --ink: #1b1b1b; --soft: #5c5c5c; --paper: #ffffff; --line: #d9d9d9; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #e6e6e6; --soft: #a3a3a3; --paper: #141414; --line: #3a3a3a; }}
  svg {{ filter: invert(0.92) hue-rotate(180deg); }}  /* black ink becomes white, and the hues stay */
  svg.lineage {{ filter: none; }}
}}
body {{ margin: 0 auto; padding: 1rem; max-width: 76rem; font: 1rem/1.5 system-ui, sans-serif;
       color: var(--ink); background: var(--paper); }}
h1 {{ font-size: 1.5rem; line-height: 1.25; margin: 0.5rem 0 0; overflow-wrap: anywhere; }}
h2 {{ font-size: 1.1rem; margin: 0 0 0.5rem; }}
p {{ margin: 0.25rem 0; color: var(--soft); }}
main {{ display: grid; gap: 2rem; margin-top: 1.5rem;
       grid-template-columns: repeat(auto-fit, minmax(min(100%, 28rem), 1fr)); }}
section {{ min-width: 0; }}
.wide {{ grid-column: 1 / -1; }}
.scroll {{ overflow-x: auto; }}
svg {{ display: block; width: 100%; height: auto; }}
table {{ border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }}
td {{ padding: 0.2rem 0.5rem 0.2rem 0; border-bottom: 1px solid var(--line); }}
td + td {{ text-align: right; padding-right: 0; white-space: nowrap; }}
details table {{ max-width: 40rem; }}
details td {{ white-space: nowrap; }}
details td + td {{ white-space: normal; overflow-wrap: anywhere; }}
summary {{ cursor: pointer; font-weight: 600; }}
</style>
<h1>{title}</h1>
<p>{state}</p>
<main>
{sections}
</main>
</html>
"""


def report(folder):
    """Write a run's own figures and report.html into its folder, with what it has done so far. Returns the path of the
    page. Raises RunError."""
    run = load_started(folder)
    figures = {path.stem: inline(path.with_suffix(".svg").read_text()) for path in draw_run(folder)}
    sections = [section("Learning curves", figures["curves"], CAPTIONS["curves"]), outcome(run)]
    if max(len(line["population"]) for line in run.log) > 1:
        sections.append(section(
            "Lineage of the population", lineage(run), "A column for each generation, the fittest on top: purple is "
            "unfit, yellow fit (by rank in the whole run), hollow diverged. Lines lead to parents, dashed ones to the same "
            "individual where it is an elite; the thick one is the ancestry of the fittest. Point at an individual for its "
            "numbers.",
            wide=True))
    if "losses" in figures:
        sections.append(section("Evolved losses", figures["losses"], CAPTIONS["losses"]))
    if "schedule" in figures:
        sections.append(section("Evolved schedule", figures["schedule"], CAPTIONS["schedule"]))
    sections.append(f"<details class=wide><summary>Settings</summary>{pairs(settings(run.config))}</details>")
    state = "Finished" if run.finished else "Running"
    state += f": {len(run.log)} of {run.config.generations} generations, {run.epochs[-1]} of {run.total_epochs} epochs."
    path = Path(folder) / "report.html"
    write_atomic(path, PAGE.format(title=escape(str(run)), state=state, sections="\n".join(sections)).encode())
    return path


def section(title, content, caption="", wide=False):
    return (f"<section{' class=wide' if wide else ''}><h2>{title}</h2><div class=scroll>{content}</div>"
            f"<p>{caption}</p></section>")


def settings(config):
    """As in config.json, the evolved variables with their ranges."""
    space = ", ".join("{} {:g} to {:g}".format(*variable) for variable in getattr(config, "space", []))
    return {**vars(config), "space": space or "-"}


def pairs(items):
    """A table of names and values."""
    rows = (f"<tr><td>{escape(str(name)).replace('_', ' ')}</td><td>{escape(number(value))}</td></tr>"
            for name, value in items.items())
    return f"<table>{''.join(rows)}</table>"


def number(value):
    return f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)


def outcome(run):
    """The fittest individual so far, and the accounting of Sec. 5.2."""
    best, (tried, trained, full) = run.best[-1], accounting(run)
    too = ", trained on too" if run.config.method in SINGLE else ""
    return section("Fittest individual", pairs({
        f"fitness (validation accuracy{too})": f"{100 * best['fitness']:.2f} %",
        "test accuracy": f"{100 * best['test_accuracy']:.2f} %",
        "individual": f"{best['id']} (generation {best['generation']})",
        "ancestors": len(run.ancestry) - 1,
        **best["hyperparameters"],
        "losses or settings tried": f"{tried:,}",
        "epochs trained": f"{trained:,}",
        "epochs to train one network in full under each": f"{full:,} ({full / trained:.1f} times)",
        "duration": duration(run.seconds),
    }))


def duration(seconds):
    return next(f"{seconds / size:.{digits}f} {unit}" for limit, size, digits, unit in (
        (100, 1, 0, "seconds"), (6_000, 60, 0, "minutes"), (float("inf"), 3600, 1, "hours")) if seconds < limit)


def inline(drawing):
    """An SVG file as an element of a page, its text never below 9 pixels. The names of its groups are left out: a page
    may hold each name once."""
    text = re.sub(r'<g id="[^"]*"', "<g", drawing[drawing.index("<svg"):])
    width = re.search(r'width="([\d.]+)pt"', text)[1]
    return text.replace("<svg", f"<svg style='min-width: {width}px'", 1)


def lineage(run):
    """The population's lineage as an <svg> element: generations in columns, individuals by fitness."""
    fitness = sorted(m["fitness"] for line in run.log for m in line["population"])
    colours = matplotlib.colormaps["viridis"]  # by rank: the first generation is often far below all others
    dx, dy = 32, min(13, max(7, 260 // len(run.log[0]["population"])))
    where, links, dots = [], [], []  # where: for each generation {id: (x, y)}
    for column, line in enumerate(run.log):
        ranked = sorted(line["population"], key=rank, reverse=True)
        where.append({m["id"]: (24 + column * dx, 10 + row * dy) for row, m in enumerate(ranked)})
        for m in ranked:
            elite = m["generation"] < line["generation"]
            x, y = where[column][m["id"]]
            if column and (origin := where[column - 1].get(m["id"] if elite else m["parent"])):
                dashes = " stroke-dasharray='2 2'" if elite else ""
                links.append(f"<path d='M{origin[0]} {origin[1]}L{x} {y}'{dashes}/>")
            colour = "var(--paper)" if m["diverged"] else to_hex(colours(bisect_left(fitness, m["fitness"]) / len(fitness)))
            dots.append(f"<circle cx='{x}' cy='{y}' r='{0.32 * dy:.1f}' fill='{colour}'><title>individual {m['id']}, "
                        f"trained in generation {m['generation']}: fitness {100 * m['fitness']:.2f} %, test accuracy "
                        f"{100 * m['test_accuracy']:.2f} %</title></circle>")
    # The ancestor that lived in each generation: the last that had been trained. The first is not of generation 0 where
    # a whole generation diverged.
    first = run.ancestry[0]["generation"]
    line = [max((a for a in run.ancestry if a["generation"] <= g), key=lambda a: a["generation"])["id"]
            for g in range(first, len(where))]
    path = "L".join("{} {}".format(*places[id]) for places, id in zip(where[first:], line, strict=True))
    width, height = 24 + len(where) * dx, 30 + dy * max(map(len, where))
    labels = "".join(f"<text x='{24 + g * dx}' y='{height - 4}'>{g}</text>"
                     for g in range(0, len(where), 1 + len(where) // 20))
    return (f"<svg class=lineage viewBox='0 0 {width} {height}' role=img aria-label='Lineage of the population' "
            f"style='min-width: {min(width, 600)}px; max-width: {2 * width}px'>"
            f"<g stroke='var(--soft)' stroke-width='0.5' fill='none'>{''.join(links)}</g>"
            f"<path d='M{path}' stroke='#D55E00' stroke-width='3' stroke-linejoin='round' fill='none'/>"
            f"<g stroke='var(--soft)' stroke-width='0.5'>{''.join(dots)}</g>"
            f"<g fill='var(--ink)' font-size='9' text-anchor='middle'>{labels}</g></svg>")


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    try:
        print(report(sys.argv[1]))
    except RunError as error:
        print(f"report.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
