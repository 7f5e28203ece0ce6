"""Where the time goes until a run's first generation begins, on a machine that has built the loss.

``python -m benchmarks.startup`` prints it, and writes ``benchmarks/results/startup-cpu.txt`` (with
a GPU, ``-cuda``): the line "ready in ..." of runs on the digits, one after the other. On a GPU the
first run searches the number of slots and the others remember it, and what its worker does after
its imports is timed apart.
"""

import os
import subprocess
import sys
import tempfile
from dataclasses import replace

import torch

from benchmarks.rows import command_line, device_name
from benchmarks.throughput import whole
from epbt import read_data
from settings import settings
from slots import make_slots, rehearse
from stopwatch import Stopwatch
from taylorglo_ext.build import cached_library

RUN = "epbt.py --dataset digits --generations 1 --population 2 --epochs 1 --overwrite".split()


def lines(device, runs):
    yield f"{device_name(device)}, PyTorch {torch.__version__}"
    config = whole(dataset="digits", device=device)  # builds the loss, if need be
    with tempfile.TemporaryDirectory() as folder:
        caches = {"XDG_CACHE_HOME": folder,
                  "TORCH_EXTENSIONS_DIR": str(cached_library("cpu").parents[1])}
        for i in range(runs):
            said = subprocess.check_output(
                [sys.executable, *RUN, "--device", device, "--out", f"{folder}/run"], text=True,
                env=os.environ | caches)
            ready = next(line for line in said.splitlines() if line.startswith("ready in"))
            yield f"run {i + 1}: {ready}"
        if device == "cuda":
            os.environ["XDG_CACHE_HOME"] = f"{folder}/worker"
            yield f"its worker, after its imports: {worker(replace(config, device='cuda:0'))}"


def worker(config):
    """A Stopwatch of what a GPU's worker does before it trains."""
    data, clock = read_data(config, None, None), Stopwatch()
    torch.zeros((), device=config.device)
    clock.lap("context")
    with settings(config):
        data = data.to(config.device)
        clock.lap("images")
        slots = len(make_slots(config, data, 0))
        clock.lap(f"search for {slots} slots")
        slots = make_slots(config, data, 0)
        clock.lap("as many, remembered")
        rehearse(slots, 1)
        clock.lap("their captures")
    return clock


def main():
    parser = command_line(__doc__)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with open(options.out / f"startup-{options.device}.txt", "w", encoding="utf-8") as file:
        for line in lines(options.device, options.runs):
            print(line, flush=True)
            print(line, file=file, flush=True)


if __name__ == "__main__":
    main()
