"""Times the TaylorGLO loss, forward and backward, against its reference and what PyTorch has.

``python -m benchmarks.kernel`` prints a table, and writes ``benchmarks/results/kernel-cpu.csv`` and
``.png`` (with a GPU, ``kernel-cuda``), the table anew after each cell. Methods take turns, so that
whatever else the machine does falls on all of them alike. Beside the wall time of a call stands, on
a GPU, its device time: replays of a captured graph of 20 calls.

- fused: ``taylorglo_loss``
- operator: ``loss_and_gradient``, as training calls it; autograd gets the gradient as it is
- reference: the plain PyTorch formula, and compiled: the same under torch.compile
- triton: ``benchmarks/triton_loss.py``, on a GPU
- cross_entropy: F.cross_entropy on hard labels, in arithmetic a lower bound
- clone: a copy of the logits in fresh memory, and copy: into existing memory; each reads and writes
  as many bytes as fused
"""

import argparse
import csv
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from taylorglo_ext import load, loss_and_gradient, taylorglo_loss
from taylorglo_ext.reference import reference_loss

ROWS, CLASSES = (128, 1024, 8192, 65536), (10, 100, 1000)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
METHODS = ("fused", "operator", "reference", "compiled", "triton", "cross_entropy", "clone", "copy")
GRAPH_CALLS = 20
FIELDS = (
    "device", "torch", "threads", "dtype", "teacher", "rows", "classes",
    "method", "p10_us", "median_us", "p90_us", "samples", "device_us",
)  # fmt: skip
RESULTS = Path(__file__).parent / "results"


def methods(
    rows: int, classes: int, dtype: torch.dtype, teacher: bool, device: str
) -> dict[str, Callable[[], object]]:
    """What is timed for one cell, by name."""
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, classes, generator=rng).to(device, dtype).requires_grad_()
    labels = torch.randint(classes, (rows,), generator=rng).to(device)
    theta = (20 * torch.rand(8, generator=rng) - 10).to(device)
    distillation = ()
    if teacher:
        teacher_logits = torch.randn(rows, classes, generator=rng).to(device, dtype)
        distillation = (teacher_logits, torch.tensor(0.3, device=device))
    compiled_loss = torch.compile(reference_loss, dynamic=True)  # for all sizes
    source, target = logits.detach(), torch.zeros_like(logits.detach())

    def step(loss_function: Callable[..., Tensor], *arguments) -> None:
        torch.autograd.grad(loss_function(logits, labels, *arguments), logits)

    contenders = {
        "fused": lambda: step(taylorglo_loss, theta, *distillation),
        "operator": lambda: loss_and_gradient(source, labels, theta, *distillation),
        "reference": lambda: step(reference_loss, theta, *distillation),
        "compiled": lambda: step(compiled_loss, theta, *distillation),
        "cross_entropy": lambda: step(F.cross_entropy),
        "clone": source.clone,
        "copy": lambda: target.copy_(source),
    }
    if device == "cuda" and dtype != torch.float16:
        from benchmarks.triton_loss import triton_loss

        contenders["triton"] = lambda: triton_loss(source, labels, theta, *distillation)
    return contenders


def seconds(function: Callable[[], object], calls: int, device: str) -> float:
    """The wall time of one of `calls` calls, to the end of the device's work."""
    start = time.perf_counter()
    for _ in range(calls):
        function()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls


def sample(
    functions: dict[str, Callable], device: str, budget: float, least: int
) -> dict[str, list[float]]:
    """Times of each function, taken in turns until `budget` seconds have gone, but `least` of
    each."""
    calls = {}
    for name, function in functions.items():
        for _ in range(2):  # compiles, allocates
            seconds(function, 1, device)
        calls[name] = max(1, min(100, round(5e-4 / seconds(function, 1, device))))
        seconds(function, calls[name], device)
    times: dict[str, list[float]] = {name: [] for name in functions}
    end = time.perf_counter() + budget
    while min(map(len, times.values())) < least or time.perf_counter() < end:
        for name, function in functions.items():
            seconds(function, 1, device)  # or it would pay for memory that others have given back
            times[name].append(seconds(function, calls[name], device))
    return times


def device_seconds(function: Callable[[], object], samples: int = 9) -> float:
    """The GPU's median time for one call, of replays of a captured graph of GRAPH_CALLS."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        function()  # what is made at the first call on a stream, outside the capture
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(GRAPH_CALLS):
                function()
        times = []
        for _ in range(samples + 1):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record(stream)
            graph.replay()
            end.record(stream)
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3 / GRAPH_CALLS)
    return statistics.median(times[1:])


def device_name(device: str) -> str:
    """The model of the processor, without the host's name."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")), "CPU"
    )


def spread(values: list[float]) -> dict[str, float]:
    """The median, and the deciles around it."""
    deciles = statistics.quantiles(values, n=10, method="inclusive")
    return {"p10": deciles[0], "median": statistics.median(values), "p90": deciles[-1]}


def write_csv(path: Path, fields: tuple[str, ...], records: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fields, lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)


def describe(
    cell: dict, times: dict[str, list[float]], device_times: dict[str, float]
) -> list[dict]:
    """One record for each method."""
    records = []
    for name, values in times.items():
        quantiles = {f"{key}_us": round(1e6 * value, 2) for key, value in spread(values).items()}
        on_device = round(1e6 * device_times[name], 2) if name in device_times else ""
        records.append(
            {**cell, "method": name, **quantiles, "samples": len(values), "device_us": on_device}
        )
    return records


def print_cell(cell: dict, records: list[dict]) -> None:
    """One line of wall times, and on a GPU one of device times below it."""
    labels = "distilled" if cell["teacher"] else "hard"
    for kind in ("median_us", "device_us"):
        times = {record["method"]: record[kind] for record in records if record[kind] != ""}
        if times:
            columns = "".join(
                f"{times[name]:>14.1f}" if name in times else f"{'-':>14}" for name in METHODS
            )
            where = "wall" if kind == "median_us" else "device"
            print(
                f"{cell['dtype']:9}{labels:10}{cell['rows']:>6}{cell['classes']:>6} {where:7}"
                f"{columns}",
                flush=True,
            )


def measure(cell: dict, device: str, budget: float, least: int) -> list[dict]:
    """The records of one cell."""
    dtype = getattr(torch, cell["dtype"])
    functions = methods(cell["rows"], cell["classes"], dtype, bool(cell["teacher"]), device)
    times = sample(functions, device, budget, least)
    return describe(
        cell,
        times,
        {n: device_seconds(f) for n, f in functions.items()} if device == "cuda" else {},
    )


def plot(records: list[dict], path: Path) -> None:
    """Time against rows, in float32, one panel for each number of classes; hard labels above,
    distilled below."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(
        2, len(CLASSES), figsize=(11, 6.5), sharex=True, layout="constrained"
    )
    for line, teacher in zip(panels, (0, 1), strict=True):
        for panel, classes in zip(line, CLASSES, strict=True):
            for method in METHODS:
                cell = ("float32", teacher, classes, method)
                keys = ("dtype", "teacher", "classes", "method")
                points = [r for r in records if tuple(r[key] for key in keys) == cell]
                rows, median = [r["rows"] for r in points], [r["median_us"] for r in points]
                if not points:
                    continue
                drawn = panel.plot(
                    rows,
                    median,
                    marker="o",
                    markersize=3,
                    label=method,
                    lw=2 if method == "fused" else 1,
                )
                low, high = [r["p10_us"] for r in points], [r["p90_us"] for r in points]
                panel.fill_between(rows, low, high, color=drawn[0].get_color(), alpha=0.2, lw=0)
            panel.set(
                xscale="log",
                yscale="log",
                title=f"{'distilled' if teacher else 'hard'} labels, C = {classes}",
            )
            panel.set_xticks(rows, rows)
            panel.minorticks_off()
            panel.grid(alpha=0.3)
    for panel in panels[-1]:
        panel.set_xlabel("rows B")
    for panel in panels[:, 0]:
        panel.set_ylabel("forward + backward (µs)")
    figure.legend(
        *panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(METHODS)
    )
    first = records[0]
    threads = f"{first['threads']} threads, " if first["threads"] else ""
    figure.suptitle(
        f"float32, {first['device']}, {threads}PyTorch {first['torch']}; "
        "median, 10th and 90th percentile"
    )
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="small batches, float32 only; without --out nothing is written",
    )
    parser.add_argument(
        "--rows", type=int, nargs="+", help="numbers of rows in place of the usual ones"
    )
    parser.add_argument(
        "--classes", type=int, nargs="+", default=CLASSES, help="numbers of classes"
    )
    parser.add_argument(
        "--out", type=Path, help="the folder for the results (default benchmarks/results)"
    )
    options = parser.parse_args()
    load("fused", options.device)
    budget, least = (0.3, 3) if options.quick else (3.0, 5)
    machine = {"device": device_name(options.device), "torch": torch.__version__}
    machine["threads"] = torch.get_num_threads() if options.device == "cpu" else ""
    print(
        ", ".join(f"{key} {value}" for key, value in machine.items() if value),
        "; median times in µs",
    )
    print(
        f"{'dtype':9}{'labels':10}{'B':>6}{'C':>6}{'':8}"
        + "".join(f"{name:>14}" for name in METHODS)
    )
    folder = options.out or (None if options.quick else RESULTS)
    records = []
    for dtype in DTYPES[:1] if options.quick else DTYPES:
        for teacher in (0, 1):
            torch.compiler.reset()
            for classes in options.classes:
                for rows in options.rows or (ROWS[:2] if options.quick else ROWS):
                    cell = {
                        **machine,
                        "dtype": str(dtype).removeprefix("torch."),
                        "teacher": teacher,
                    }
                    cell |= {"rows": rows, "classes": classes}
                    new = measure(cell, options.device, budget, least)
                    print_cell(cell, new)
                    records += new
                    if folder:  # after each cell, so that it outlives an end in between
                        write_csv(folder / f"kernel-{options.device}.csv", FIELDS, records)
    if folder:
        plot(records, folder / f"kernel-{options.device}.png")


if __name__ == "__main__":
    main()
