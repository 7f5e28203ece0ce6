"""Kills and damages real runs, resumes them, and compares every byte of log.jsonl and best.pt with an undisturbed run.

    python -m tests.soak [--kills 50 --worker-kills 50 --damages 500 --seed 0]

The long form of test_records.py and test_workers.py, which share its tools. A run is a process of its own that carries
out `epbt.main`, forked from a server that has imported it, so that starting one takes no time. What is drawn at random
derives from the seed; what the operating system makes of a kill does not. Writes results/soak.txt.
"""

import argparse
import hashlib
import io
import itertools
import multiprocessing
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

import epbt
import report
from records import checkpoints, write_atomic

ROOT = Path(__file__).resolve().parent.parent
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["epbt", "report", "sklearn.datasets"])
TIMEOUT = 180  # seconds, after which a run counts as hanging

TINY = ("--dataset digits --model tests.soak:network --population 4 --generations 4 --epochs 1 --limit 200 "
        "--validation 40 --learning-rate 0.02 --loss-backend reference --workers 1 --device cpu").split()
RESNET = ("--dataset digits --model resnet8 --population 6 --generations 4 --epochs 1 --limit 400 "
          "--validation 40 --loss-backend reference --workers 2 --device cpu").split()
OPERATIONS = 90  # about as many calls of fsync, replace, unlink and mkdir as a run of TINY makes


def network(num_classes, in_channels):
    """So small that a run's time goes to its files."""
    return nn.Sequential(nn.Conv2d(in_channels, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
                         nn.Linear(36, num_classes))


# A run as a process


class Run:
    """A process that carries out `epbt.main`; before: called in it first, to prepare its end."""

    def __init__(self, job, folder, *options, before=None):
        self.folder, self.output = folder, folder.with_suffix(".out")
        self.output.unlink(missing_ok=True)
        self.process = SERVER.Process(target=_main, args=([*job, "--out", str(folder), *options], self.output, before))
        self.process.start()
        wait_for(self.output.exists)
        self.pid = self.process.pid

    def end(self):
        """Wait for it and return its exit code; negative: the signal that killed it."""
        self.process.join(TIMEOUT)
        if self.process.is_alive():
            for pid in [self.pid, *descendants(self.pid)]:
                kill(pid)
            raise AssertionError(f"hangs: {self.said()}")
        assert "Traceback" not in self.said(), self.said()
        return self.process.exitcode

    def said(self):
        return self.output.read_text()


def _main(arguments, output, before):
    os.setpgid(0, 0)  # as a shell does: Ctrl-C goes to the group
    file = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    report.report = lambda folder: None  # the pictures take longer than such a run, and no resumed run reads them
    if before is not None:
        before()
    epbt.main(arguments)


def kill(pid, how=os.kill, number=signal.SIGKILL):
    """Send a signal; False if the process has ended."""
    try:
        how(pid, number)
    except ProcessLookupError:
        return False
    return True


def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"did not come true within {seconds} s"
        time.sleep(0.005)


def parents():
    """The parent of each living process."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended since
        if state != "Z":
            found[int(stat.parent.name)] = int(parent)
    return found


def descendants(ancestor):
    """Living processes below one, and the parent of each."""
    found, all = {}, parents()
    while new := {pid: parent for pid, parent in all.items()
                  if pid not in found and (parent == ancestor or parent in found)}:
        found |= new
    return found


def workers_of(pid):
    """Its children's children: a worker's parent is the server that forked it."""
    return sorted(child for child, parent in descendants(pid).items() if parent != pid)


def die_at(call, after):
    """Kill this process before or after the numbered one of the calls by which a run changes its folder."""
    numbers = itertools.count()

    def deadly(function):
        def wrapped(*args, **kwargs):
            fatal = next(numbers) == call
            if fatal and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                return function(*args, **kwargs)
            finally:
                if fatal:
                    os.kill(os.getpid(), signal.SIGKILL)
        return wrapped

    for name in ("fsync", "replace", "unlink", "mkdir"):
        setattr(os, name, deadly(getattr(os, name)))


# What must be so


def result(folder):
    return (folder / "log.jsonl").read_bytes(), (folder / "best.pt").read_bytes()


def complete(job, folder, expected, *options):
    """Resume a run, or start one that was killed before it began. Its result must be the expected one."""
    before = {path: path.stat().st_mtime_ns for path in folder.glob("individuals/*.ckpt")}
    run = Run(job, folder, *options, *(["--resume"] if begun(folder) else []))
    assert run.end() == 0, run.said()
    assert result(folder) == expected, f"another result: {run.said()}"
    again = [path.name for path, written in before.items() if path.exists() and path.stat().st_mtime_ns != written]
    assert not again, f"evaluated again: {again}"
    return run


def begun(folder):
    return bool((folder / "config.json").exists() or checkpoints(folder))


# Categories. Each is a function of (an empty place, a random generator, the expected results by job, a number of
# things to do) that raises AssertionError or returns a Counter of what happened.


def kills(place, rng, expected, count):
    """SIGKILL a run, up to several times, and resume it: at a random instant, or at one of its changes to a file."""
    folder, outcomes = place / "run", Counter()
    while outcomes["SIGKILL"] < count:
        inside = rng.random() < 0.5
        job, name = (TINY, "tiny") if inside else ([*RESNET, "--workers", "1"], "resnet")
        while outcomes["SIGKILL"] < count and killed(job, folder, rng, inside):
            outcomes["SIGKILL"] += 1
            outcomes["of them inside a write, a rename or a removal"] += inside
            if rng.random() < 0.5:
                break
        complete(job, folder, expected[name])
        outcomes["runs resumed to identical bytes"] += 1
        shutil.rmtree(folder)
    return outcomes


def killed(job, folder, rng, inside):
    """Start or resume a run and kill it; False if it ended first."""
    before = partial(die_at, int(rng.integers(OPERATIONS)), bool(rng.random() < 0.5)) if inside else None
    run = Run(job, folder, *(["--resume"] if begun(folder) else []), before=before)
    if not inside:
        run.process.join(rng.uniform(0, 4))
        kill(run.pid)
    code = run.end()
    assert code in (0, -signal.SIGKILL), run.said()
    return code != 0


def worker_kills(place, rng, expected, count):
    """SIGKILL the workers of a run, up to several a second."""
    folder, outcomes = place / "run", Counter()
    while outcomes["SIGKILL"] < count:
        run = Run(RESNET, folder)
        while run.process.is_alive() and outcomes["SIGKILL"] < count:
            time.sleep(rng.uniform(0, 1))
            if victims := workers_of(run.pid):
                outcomes["SIGKILL"] += kill(victims[rng.integers(len(victims))])
        if code := run.end():
            assert code == 2 and "its worker died 3 times" in run.said().splitlines()[-1], run.said()
            outcomes["runs given up after 3 attempts, in one line"] += 1
            complete(RESNET, folder, expected["resnet"])
        assert result(folder) == expected["resnet"], run.said()
        outcomes["runs completed with identical bytes"] += 1
        shutil.rmtree(folder)
    return outcomes


def signals_to_runs_with_workers(place, rng, expected, count):
    """Ctrl-C and SIGKILL for runs with worker processes: none may be left."""
    outcomes = Counter()
    for i in range(count):
        folder = place / str(i)
        run = Run(RESNET, folder)
        time.sleep(rng.uniform(0, 4))
        family = {run.pid, *descendants(run.pid)}
        if rng.random() < 0.5:
            kill(run.pid)
            assert (code := run.end()) in (0, -signal.SIGKILL), run.said()
        else:
            kill(run.pid, os.killpg, signal.SIGINT)
            assert (code := run.end()) in (0, 130), run.said()
            assert code == 0 or "interrupted" in run.said().splitlines()[-1], run.said()
        wait_for(lambda family=family: not parents().keys() & family)  # the forking server may be importing torch
        outcomes["Ctrl-C" if code == 130 else "SIGKILL" if code else "had ended already"] += 1
        complete(RESNET, folder, expected["resnet"])
        outcomes["no process left, resumed to identical bytes"] += 1
    return outcomes


def damages(place, rng, expected, count, bases=(), files=1):
    """Damage files of a folder whose run was killed or has ended, then resume it."""
    outcomes = Counter()
    for i in range(count):
        base, folder = bases[rng.integers(len(bases))], place / str(i)
        shutil.copytree(base, folder)
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        damaged = {path: damage(path, place / f"{i}.ran", rng) for path in rng.permutation(paths)[:files]}
        what = ", ".join(f"{path.relative_to(folder)} {how}" for path, how in damaged.items()) + f" ({base.name})"
        run = Run(TINY, folder, "--resume")
        code, said = run.end(), run.said()
        assert not (place / f"{i}.ran").exists(), f"code was run: {what}"
        if code == 0:
            assert result(folder) == expected["tiny"], f"another result: {what}\n{said}"
            named = any(path.name in said for path in damaged)
            outcomes["resumed to identical bytes, " + ("saying what is damaged" if named else "not needing it")] += 1
        else:
            last = said.splitlines()[-1]
            assert code == 2 and any(path.name in last for path in damaged), f"{what}: exit code {code}\n{said}"
            outcomes["refused in one line that names the file"] += 1
        shutil.rmtree(folder)
    return outcomes


DAMAGES = {"flipped": 0.4, "cut": 0.3, "deleted": 0.1, "zeroed": 0.1, "hostile": 0.08, "made a directory": 0.02}


def damage(path, marker, rng):
    """Damage one file at random; returns how."""
    data, how = bytearray(path.read_bytes()), rng.choice(list(DAMAGES), p=list(DAMAGES.values()))
    if how in ("deleted", "made a directory"):
        path.unlink()
    if how == "made a directory":
        path.mkdir()
    elif how == "flipped" and data:
        bit = int(rng.integers(8 * len(data)))
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
    elif how == "zeroed":
        path.write_bytes(bytes(len(data)))
    elif how == "hostile":
        path.write_bytes(hostile(marker))
    elif how == "cut":
        path.write_bytes(data[:int(rng.integers(len(data) + 1))])
    return how


class Hostile:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def hostile(marker):
    """The bytes of a .ckpt file whose checksum is right, and which makes a directory if it is unpickled."""
    buffer = io.BytesIO()
    np.savez(buffer, log=np.array([Hostile(marker)], dtype=object), record=np.array([Hostile(marker)], dtype=object))
    return hashlib.sha256(buffer.getvalue()).digest() + buffer.getvalue()


def full_disks(place, rng, expected, count):
    """Run on a file system that is too small, enlarge it, resume."""
    outcomes = Counter()
    for i in range(count):
        disk = place / str(i)
        disk.mkdir()
        with small_disk(disk, int(rng.integers(4, 100))) as remount:
            run = Run(TINY, disk)
            assert run.end() == 2 and "No space left on device" in run.said().splitlines()[-1], run.said()
            remount("size=100m")
            complete(TINY, disk, expected["tiny"])
        outcomes["ended in one line, resumed to identical bytes"] += 1
    return outcomes


@contextmanager
def small_disk(folder, size):
    """A file system in memory of so many KiB, mounted on a folder; gives a function that changes its options."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", folder], check=True)
    try:
        yield lambda options: subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def can_mount():
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], capture_output=True)
        return done.returncode == 0 and not subprocess.run(["umount", folder]).returncode


# The whole


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, count in (("kills", 50), ("worker-kills", 50), ("damages", 500), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=count)
    asked = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job and its children ignore Ctrl-C
    report = Report()
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        expected = {name: undisturbed(job, place / name) for name, job in (("tiny", TINY), ("resnet", RESNET))}
        bases = [place / "tiny", *(stopped(place / f"stopped-{call}", call) for call in (10, 25, 40, 56, 72))]
        many = partial(report.category, place, asked.seed, expected)
        many("runs killed", kills, asked.kills)
        many("workers killed", worker_kills, asked.worker_kills)
        many("runs with workers, Ctrl-C or killed", signals_to_runs_with_workers, asked.kills // 5)
        many("one damaged file", partial(damages, bases=bases), asked.damages)
        many("two damaged files", partial(damages, bases=bases, files=2), asked.damages // 5)
        if can_mount():
            many("full disks", full_disks, asked.kills // 5)
        else:
            report.line("full disks: skipped, this user cannot mount a file system")
    report.write(f"--kills {asked.kills} --worker-kills {asked.worker_kills} --damages {asked.damages} "
                 f"--seed {asked.seed}")
    sys.exit(bool(report.failures))


def undisturbed(job, folder):
    run = Run(job, folder)
    assert run.end() == 0, run.said()
    return result(folder)


def stopped(folder, call):
    run = Run(TINY, folder, before=partial(die_at, call, False))
    assert run.end() == -signal.SIGKILL, run.said()
    return folder


class Report:
    def __init__(self):
        self.lines, self.failures, self.start = [], 0, time.monotonic()

    def line(self, text):
        print(text, flush=True)
        self.lines.append(text)

    def category(self, place, seed, expected, name, function, count):
        """Do it, a tenth of the count at a time, so that a failure does not end it all; report what happened."""
        start, outcomes = time.monotonic(), Counter()
        for i, part in enumerate(np.array_split(np.arange(count), min(count, 10))):
            folder = place / f"{name} {i}".replace(" ", "-")
            folder.mkdir()
            try:
                outcomes += function(folder, np.random.default_rng((seed, *name.encode(), i)), expected, len(part))
            except AssertionError as error:
                outcomes[f"FAILED: {error}"] += 1
        self.line(f"{name}: {count} ({time.monotonic() - start:.0f} s)")
        for outcome, times in sorted(outcomes.items()):
            self.line(f"    {times:4} {outcome}")
            self.failures += times if outcome.startswith("FAILED") else 0

    def write(self, options):
        cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                    if line.startswith("model name")), platform.machine())
        self.line(f"{self.failures} failures: wrong results, hangs, tracebacks, processes left, unclear refusals"
                  f" ({time.monotonic() - self.start:.0f} s in all)")
        head = (f"python -m tests.soak {options}\nPython {platform.python_version()}, PyTorch {torch.__version__}, "
                f"NumPy {np.__version__}; {len(os.sched_getaffinity(0))} cores of {cpu}\n\n")
        (ROOT / "results").mkdir(exist_ok=True)
        write_atomic(ROOT / "results" / "soak.txt", (head + "\n".join(self.lines) + "\n").encode())


if __name__ == "__main__":
    main()
