"""What the benchmarks share: the command line, the machine, and the rows of a table, which are
printed, written and drawn."""

import argparse
import csv
import os
import statistics
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"
CORES = len(os.sched_getaffinity(0))
WIDTHS = dict(contender=34, model=10, networks=10, median_s=10, p10_s=10, p90_s=10)  # of columns
WIDTHS |= dict(images_per_s=14)


def command_line(description, devices=("cpu", "cuda")):
    """A parser with --out and, if there are several devices, --device."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if len(devices) > 1:
        found = "cuda" if torch.cuda.is_available() else "cpu"
        parser.add_argument("--device", choices=devices, default=found)
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder for the results")
    return parser


def device_name(device):
    """The model of the processor, without the host's name."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    named = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return next(named, "CPU")


def spread(values):
    """The median, and the deciles around it."""
    if len(values) == 1:
        return dict.fromkeys(("p10", "median", "p90"), values[0])
    deciles = statistics.quantiles(values, n=10, method="inclusive")
    return {"p10": deciles[0], "median": statistics.median(values), "p90": deciles[-1]}


def record(contender, times, images, model, networks, workers):
    """One row: the seconds of `times`, each of which trains so many images."""
    seconds = spread(times)
    return dict(contender=contender, model=model, networks=networks, workers=workers,
                **{f"{name}_s": float(f"{value:.4g}") for name, value in seconds.items()},
                samples=len(times), images_per_s=round(images / seconds["median"], 1))


def write_csv(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        names = dict.fromkeys(key for record in records for key in record)
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)


def print_and_write(rows, device, name, folder):
    """Print each row when it is there, and write all so far to folder/NAME.csv; then draw them to
    NAME.png."""
    machine = dict(device=device_name(device), torch=torch.__version__, cores=CORES)
    path, records = folder / f"{name}.csv", []
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    print("".join(f"{name:{width}}" for name, width in WIDTHS.items()))
    for row in rows:
        records.append(machine | row)
        write_csv(path, records)
        cells = (f"{row.get(name, '')!s:{width}}" for name, width in WIDTHS.items())
        print("".join(cells), flush=True)
    plot(records, path.with_suffix(".png"))


def plot(records, path):
    """Images/s of each contender, a bar each with its 10th and 90th percentile."""
    from matplotlib.figure import Figure  # here, since workers import this file too

    figure = Figure(figsize=(8, 0.6 + 0.32 * len(records)), layout="constrained")
    records = records[::-1]
    names = [f"{r['contender']} ({r['networks']} × {r['model']})" for r in records]
    rates = [r["images_per_s"] for r in records]
    low = [r["images_per_s"] * (1 - r["median_s"] / r["p90_s"]) for r in records]
    high = [r["images_per_s"] * (r["median_s"] / r["p10_s"] - 1) for r in records]
    axes = figure.subplots()
    axes.barh(names, rates, xerr=[low, high], color="#4878a8", ecolor="#333333", capsize=2)
    title = f"{records[0]['device']}, PyTorch {records[0]['torch']}"
    axes.set(xlabel="training images/s", title=title)
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=80)
