"""Kills and damages whole runs and resumes them. Their log.jsonl and best.pt must have the same
bytes as those of an undisturbed run.

    python -m tests.soak [--kills 50 --worker-kills 50 --damages 300 --seed 0]

A run is a process that carries out `epbt.main`. It is forked from a server that has imported epbt,
so it starts at once. Other tests share these tools.
"""

import argparse
import itertools
import multiprocessing
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
from torch import nn

from records import begun

ROOT = Path(__file__).resolve().parent.parent
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["epbt", "report", "sklearn.datasets"])
TIMEOUT = 180  # seconds after which a run counts as hanging
CALLS = 75  # about how often a run of TINY changes its folder
TINY = ("--dataset digits --model tests.soak:network --population 4 --generations 4 --epochs 1 "
        "--limit 200 --validation 40 --learning-rate 0.02 --loss-backend reference --workers 1 "
        "--device cpu").split()
PAIR = [*TINY, "--workers", "2"]


def network(num_classes, in_channels):
    """So small that a run spends its time on its files."""
    return nn.Sequential(nn.Conv2d(in_channels, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(),
                         nn.Flatten(), nn.Linear(36, num_classes))


class Run:
    """A process that carries out `epbt.main`. It calls `before` first, which can prepare a kill."""

    def __init__(self, job, folder, *options, before=None):
        self.output = folder.with_suffix(".out")
        self.output.unlink(missing_ok=True)
        arguments = [*job, "--out", str(folder), *options]
        self.process = SERVER.Process(target=_main, args=(arguments, self.output, before))
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
        return self.output.read_text(encoding="utf-8")


def _main(arguments, output, before):
    import epbt
    import report

    os.setpgid(0, 0)  # as a shell does: Ctrl-C goes to the group
    file = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    report.report = lambda folder: None  # the pictures take longer than such a run
    if before is not None:
        before()
    epbt.main(arguments)


def kill(pid):
    """Send SIGKILL; False if the process has ended."""
    try:
        os.kill(pid, signal.SIGKILL)
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
    found, living = {}, parents()
    while new := {pid: parent for pid, parent in living.items()
                  if pid not in found and (parent == ancestor or parent in found)}:
        found |= new
    return found


def workers_of(pid):
    """The workers of a run: they are its children's children, since a server forks them."""
    return sorted(child for child, parent in descendants(pid).items() if parent != pid)


def die_at(call, after):
    """Kill this process before or after the call, by number, of those that change its folder."""
    numbers = itertools.count()

    def deadly(function):
        def wrapped(*args, **kwargs):
            fatal = next(numbers) == call
            if fatal and not after:
                kill(os.getpid())
            try:
                return function(*args, **kwargs)
            finally:
                if fatal:
                    kill(os.getpid())
        return wrapped

    for name in ("fsync", "replace", "unlink", "mkdir"):
        setattr(os, name, deadly(getattr(os, name)))


def result(folder):
    return (folder / "log.jsonl").read_bytes(), (folder / "best.pt").read_bytes()


def resuming(folder):
    return ["--resume"] if begun(folder) else []


def undisturbed(job, folder):
    run = Run(job, folder)
    assert run.end() == 0, run.said()
    return result(folder)


def complete(job, folder, expected):
    """Resume a run, or start it again if it was killed before it began. The result must be the
    expected one, and no individual may be evaluated twice."""
    before = {p: p.stat().st_mtime_ns for p in folder.glob("individuals/*.safetensors")}
    run = Run(job, folder, *resuming(folder))
    assert run.end() == 0, run.said()
    assert result(folder) == expected, f"another result: {run.said()}"
    again = [p.name for p, t in before.items() if p.exists() and p.stat().st_mtime_ns != t]
    assert not again, f"evaluated again: {again}"


# Each test takes an empty folder, a random generator, the expected result, and how often to do
# it. It raises AssertionError or returns a Counter of what happened.


def kills(place, rng, expected, count):
    """SIGKILL runs, some repeatedly: at random moments, or when they change a file."""
    folder, outcomes = place / "run", Counter()
    while outcomes["SIGKILL"] < count:
        inside = rng.random() < 0.5
        before = partial(die_at, int(rng.integers(CALLS)), bool(rng.random() < 0.5))
        run = Run(TINY if inside else PAIR, folder, *resuming(folder),
                  before=before if inside else None)
        if not inside:
            run.process.join(rng.uniform(0, 2))
            kill(run.pid)
        assert (code := run.end()) in (0, -signal.SIGKILL), run.said()
        outcomes["SIGKILL"] += code != 0
        outcomes["SIGKILL at a change of a file"] += inside and code != 0
        if code == 0 or rng.random() < 0.5:
            complete(PAIR, folder, expected)
            outcomes["resumed to identical bytes"] += 1
            shutil.rmtree(folder)
    return outcomes


def worker_kills(place, rng, expected, count):
    """SIGKILL the workers of runs."""
    outcomes = Counter()
    while outcomes["SIGKILL of a worker"] < count:
        run = Run(PAIR, place / "run")
        while run.process.is_alive():
            time.sleep(rng.uniform(0, 0.5))
            if victims := workers_of(run.pid):
                outcomes["SIGKILL of a worker"] += kill(victims[rng.integers(len(victims))])
        if code := run.end():
            assert code == 2 and "died 3 times" in run.said().splitlines()[-1], run.said()
            outcomes["given up in one line"] += 1
        complete(PAIR, place / "run", expected)
        outcomes["completed with identical bytes"] += 1
        shutil.rmtree(place / "run")
    return outcomes


def damages(place, rng, expected, count):
    """Damage one file of a run that was killed or has ended, then resume the run."""
    outcomes = Counter()
    for i in range(count):
        folder = place / str(i)
        Run(TINY, folder, before=partial(die_at, int(rng.integers(20, CALLS + 20)), True)).end()
        path = rng.choice(sorted(folder.rglob("*.[!l]*")))
        data = bytearray(path.read_bytes() or b"x")
        at = int(rng.integers(len(data)))
        data[at] ^= 1 << rng.integers(8)
        path.write_bytes(data[:None if rng.random() < 0.6 else at])
        run = Run(TINY, folder, "--resume")
        if code := run.end():
            assert code == 2 and path.name in run.said().splitlines()[-1], f"{path}: {run.said()}"
        else:
            assert (folder / "log.jsonl").read_bytes() == expected[0], f"{path}: {run.said()}"
        outcomes["refused, naming the file" if code else "resumed to an identical log"] += 1
        shutil.rmtree(folder)
    return outcomes


@contextmanager
def small_disk(folder, size):
    """Mount a file system of so many KiB on a folder; yields a function that remounts it."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", folder], check=True)
    try:
        yield lambda options: subprocess.run(["mount", "-o", f"remount,{options}", folder],
                                             check=True)
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def can_mount():
    with tempfile.TemporaryDirectory() as folder:
        mount = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], capture_output=True)
        return mount.returncode == 0 and not subprocess.run(["umount", folder]).returncode


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, count in (("kills", 50), ("worker-kills", 50), ("damages", 300), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=count)
    asked = vars(parser.parse_args())
    with tempfile.TemporaryDirectory() as place:
        expected = undisturbed(TINY, Path(place) / "undisturbed")
        for number, category in enumerate((kills, worker_kills, damages)):
            (folder := Path(place) / category.__name__).mkdir()
            rng, count = np.random.default_rng((asked["seed"], number)), asked[category.__name__]
            print(category.__name__, dict(category(folder, rng, expected, count)), flush=True)


if __name__ == "__main__":
    main()
