"""What the benchmarks reckon, and what the start of a run leaves out; what they measure is in
benchmarks/results/."""

import csv
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from benchmarks import gpu
from benchmarks.rows import print_and_write, record
from benchmarks.throughput import random_cifar10, steps, whole
from slots import Slot
from training import Trainer

ROOT = Path(__file__).parents[1]
LATER = "torch._dynamo sympy torchvision sklearn scipy matplotlib jinja2".split()
START = f"""
import sys, epbt
from config import Config
def report(line):
    if line.startswith("ready in"):
        print(line, [name for name in {LATER} if name in sys.modules])
        raise KeyboardInterrupt
config = Config(dataset="digits", device="cpu", workers=1, out=sys.argv[1])
try:
    epbt.evolve(config, report=report)
except KeyboardInterrupt:
    pass
"""


def test_rows_are_written_one_by_one_with_all_their_columns(tmp_path):
    written = tmp_path / "some.csv"

    def rows():
        yield record("one", [2.0], 100, "resnet8", 4, 1)
        assert written.read_text(encoding="utf-8").count("\n") == 2
        yield record("two", [1.0, 2.0, 9.0], 100, "resnet8", 4, 2) | {"more": 0.5}

    print_and_write(rows(), "cpu", "some", tmp_path)
    with open(written, encoding="utf-8") as file:
        one, two = csv.DictReader(file)
    assert [one["images_per_s"], one["p90_s"], one["more"]] == ["50.0", "2.0", ""]
    assert [two["median_s"], two["samples"], two["more"]] == ["2.0", "3", "0.5"]
    assert written.with_suffix(".png").stat().st_size > 0


class OnCPU(Trainer):
    """Stands in for a slot."""

    network, rehearse = None, Slot.rehearse


@pytest.mark.parametrize("flag", ["plain", "deterministic", "compile"])
def test_the_rows_of_a_gpu_are_in_both_precisions_and_rehearse_the_run(monkeypatch, flag):
    seen = []

    def rehearse(slots, count):
        for slot in slots:
            slot.rehearse(min(count, 1))
            seen.append((slot.distilled, slot.has_theta, slot.config.layout))

    monkeypatch.setattr(gpu, "whole", lambda **fields: whole(**fields | {"device": "cpu"}))
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    monkeypatch.setattr(gpu, "rehearse", rehearse)
    monkeypatch.setattr(gpu, "Slot", OnCPU)
    monkeypatch.setattr(gpu, "Compiled", OnCPU)
    flags = {name: name == flag for name in ("deterministic", "compile")}
    rows = list(gpu.on_gpu(Namespace(tiny=True, rounds=1, **flags)))
    assert {row["contender"].split(", ")[-1 if flag == "plain" else -2] for row in rows} == {
        "float32", "bfloat16"}
    assert all(row["images_per_s"] > 0 for row in rows)
    assert {s[:2] for s in seen} == {(True, True)}
    assert ("contiguous" in {s[2] for s in seen}) == (flag == "plain")


def test_a_step_of_one_worker_is_timed():
    config = whole(dataset="cifar10", model="resnet8", device="cpu", threads=1, batch_size=16)
    assert all(0 < t < 60 for t in steps(config, random_cifar10(1300), 2))


def test_a_run_starts_without_what_it_needs_later(tmp_path):
    said = subprocess.run([sys.executable, "-c", START, tmp_path / "run"], cwd=ROOT, check=True,
                          capture_output=True, text=True).stdout
    assert said.startswith("ready in ") and said.endswith(" []\n")
    parts = said.partition(" s: ")[2].partition(" [")[0].split(", ")
    assert [part.split()[0] for part in parts] == ["import", "loss", "data", "trial", "workers"]
