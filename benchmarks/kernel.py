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

import itertools
import statistics
import time

import torch
import torch.nn.functional as F

from benchmarks.rows import RESULTS, command_line, device_name, spread, write_csv
from taylorglo_ext import load, loss_and_gradient, taylorglo_loss
from taylorglo_ext.reference import reference_loss

ROWS, CLASSES = (128, 1024, 8192, 65536), (10, 100, 1000)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
METHODS = ("fused", "operator", "reference", "compiled", "triton", "cross_entropy", "clone", "copy")
GRAPH_CALLS = 20


def methods(rows, classes, dtype, teacher, device):
    """{name: function without arguments} of what is timed for one cell."""
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

    def step(loss_function, *arguments):
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


def seconds(function, calls, device):
    """The wall time of one of `calls` calls, to the end of the device's work."""
    start = time.perf_counter()
    for _ in range(calls):
        function()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls


def sample(functions, device, budget, least):
    """{name: times} of functions, taken in turns until `budget` seconds have gone, but `least` of
    each."""
    calls = {}
    for name, function in functions.items():
        for _ in range(2):  # compiles, allocates
            seconds(function, 1, device)
        calls[name] = max(1, min(100, round(5e-4 / seconds(function, 1, device))))
        seconds(function, calls[name], device)
    times = {name: [] for name in functions}
    end = time.perf_counter() + budget
    while min(map(len, times.values())) < least or time.perf_counter() < end:
        for name, function in functions.items():
            seconds(function, 1, device)  # or it would pay for memory that others have given back
            times[name].append(seconds(function, calls[name], device))
    return times


def device_seconds(function, samples=9):
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


def measure(cell, device, budget, least):
    """The records of one cell, one for each method."""
    dtype, records = getattr(torch, cell["dtype"]), []
    functions = methods(cell["rows"], cell["classes"], dtype, bool(cell["teacher"]), device)
    for name, times in sample(functions, device, budget, least).items():
        wall = {f"{key}_us": round(1e6 * value, 2) for key, value in spread(times).items()}
        alone = round(1e6 * device_seconds(functions[name]), 2) if device == "cuda" else ""
        records.append(cell | dict(method=name, **wall, samples=len(times), device_us=alone))
    return records


def print_cell(cell, records):
    """One line of wall times, and on a GPU one of device times below it."""
    labels = "distilled" if cell["teacher"] else "hard"
    for kind, where in (("median_us", "wall"), ("device_us", "device")):
        times = {r["method"]: f"{r[kind]:.1f}" for r in records if r[kind] != ""}
        if times:
            columns = "".join(f"{times.get(name, '-'):>14}" for name in METHODS)
            print(f"{cell['dtype']:9}{labels:10}{cell['rows']:>6}{cell['classes']:>6} {where:7}"
                  f"{columns}", flush=True)


def plot(records, path):
    """Time against rows, in float32, one panel for each number of classes; hard labels above,
    distilled below."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6.5), layout="constrained")
    panels = figure.subplots(2, len(CLASSES), sharex=True)
    for line, teacher in zip(panels, (0, 1), strict=True):
        for panel, classes in zip(line, CLASSES, strict=True):
            for method in METHODS:
                cell = ("float32", teacher, classes, method)
                keys = ("dtype", "teacher", "classes", "method")
                points = [r for r in records if tuple(r[key] for key in keys) == cell]
                rows, median = [r["rows"] for r in points], [r["median_us"] for r in points]
                if not points:
                    continue
                (drawn,) = panel.plot(rows, median, marker="o", markersize=3, label=method,
                                      lw=2 if method == "fused" else 1)
                low, high = [r["p10_us"] for r in points], [r["p90_us"] for r in points]
                panel.fill_between(rows, low, high, color=drawn.get_color(), alpha=0.2, lw=0)
            panel.set(xscale="log", yscale="log",
                      title=f"{'distilled' if teacher else 'hard'} labels, C = {classes}")
            panel.set_xticks(rows, rows)
            panel.minorticks_off()
            panel.grid(alpha=0.3)
    for panel in panels[-1]:
        panel.set_xlabel("rows B")
    for panel in panels[:, 0]:
        panel.set_ylabel("forward + backward (µs)")
    handles = panels[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=len(METHODS))
    first = records[0]
    threads = f"{first['threads']} threads, " if first["threads"] else ""
    figure.suptitle(f"float32, {first['device']}, {threads}PyTorch {first['torch']}; "
                    "median, 10th and 90th percentile")
    figure.savefig(path, dpi=80)


def main():
    parser = command_line(__doc__)
    parser.add_argument("--quick", action="store_true",
                        help="small batches, float32 only; results/ stays as it is")
    parser.add_argument("--rows", type=int, nargs="+", help="numbers of rows, not the usual ones")
    parser.add_argument("--classes", type=int, nargs="+", default=CLASSES, help="their numbers")
    options = parser.parse_args()
    load("fused", options.device)
    budget, least = (0.3, 3) if options.quick else (3.0, 5)
    machine = {"device": device_name(options.device), "torch": torch.__version__,
               "threads": torch.get_num_threads() if options.device == "cpu" else ""}
    print(", ".join(f"{key} {value}" for key, value in machine.items() if value),
          "; median times in µs")
    print(f"{'dtype':9}{'labels':10}{'B':>6}{'C':>6}{'':8}"
          + "".join(f"{name:>14}" for name in METHODS))
    path, records = options.out / f"kernel-{options.device}.csv", []
    written = not (options.quick and options.out == RESULTS)
    for dtype, teacher in itertools.product(DTYPES[:1] if options.quick else DTYPES, (0, 1)):
        torch.compiler.reset()
        for classes, rows in itertools.product(
                options.classes, options.rows or (ROWS[:2] if options.quick else ROWS)):
            cell = machine | dict(dtype=str(dtype).removeprefix("torch."), teacher=teacher,
                                  rows=rows, classes=classes)
            new = measure(cell, options.device, budget, least)
            print_cell(cell, new)
            records += new
            if written:  # after each cell, so that it outlives an end in between
                write_csv(path, records)
    if written:
        plot(records, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
