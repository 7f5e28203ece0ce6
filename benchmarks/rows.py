"""The rows of a benchmark's table: printed, written and drawn."""

import os

import torch

from benchmarks.kernel import RESULTS, device_name, spread, write_csv

CORES = len(os.sched_getaffinity(0))
WIDTHS = dict(contender=34, model=10, networks=10, median_s=10, p10_s=10, p90_s=10)  # of columns
WIDTHS |= dict(images_per_s=14)


def record(contender, times, images, model, networks, workers):
    """One row: the seconds of `times`, each of which trains so many images."""
    seconds = spread(times) if len(times) > 1 else dict.fromkeys(("p10", "median", "p90"), times[0])
    return dict(
        contender=contender,
        model=model,
        networks=networks,
        workers=workers,
        **{f"{name}_s": float(f"{value:.4g}") for name, value in seconds.items()},
        samples=len(times),
        images_per_s=round(images / seconds["median"], 1),
    )


def print_and_write(rows, device, name, folder=None):
    """Print each row when it is there, and write all so far to folder/NAME.csv (default
    benchmarks/results); then draw them to NAME.png."""
    machine = dict(device=device_name(device), torch=torch.__version__, cores=CORES)
    path, records = (folder or RESULTS) / f"{name}.csv", []
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    print("".join(f"{name:{width}}" for name, width in WIDTHS.items()))
    for row in rows:
        records.append(machine | row)
        write_csv(path, tuple(dict.fromkeys(key for r in records for key in r)), records)
        cells = (f"{row.get(name, '')!s:{width}}" for name, width in WIDTHS.items())
        print("".join(cells), flush=True)
    plot(records, path.with_suffix(".png"))


def plot(records, path):
    """Images/s of each contender, a bar each with its 10th and 90th percentile."""
    from matplotlib.figure import Figure  # here, since workers import this file too

    figure = Figure(figsize=(8, 0.6 + 0.32 * len(records)), layout="constrained")
    names = [f"{r['contender']} ({r['networks']} × {r['model']})" for r in records][::-1]
    rates = [r["images_per_s"] for r in records][::-1]
    low = [
        rate * (1 - r["median_s"] / r["p90_s"])
        for rate, r in zip(rates, records[::-1], strict=True)
    ]
    high = [
        rate * (r["median_s"] / r["p10_s"] - 1)
        for rate, r in zip(rates, records[::-1], strict=True)
    ]
    axes = figure.subplots()
    axes.barh(names, rates, xerr=[low, high], color="#4878a8", ecolor="#333333", capsize=2)
    axes.set(
        xlabel="training images/s", title=f"{records[0]['device']}, PyTorch {records[0]['torch']}"
    )
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=80)
