"""Pools of workers, and what becomes of a run when one dies. The long form is tests/soak.py."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_slots import MEMORY

import tests.soak as soak
import workers
from config import Config
from data import make_data
from errors import RunError
from records import Individual, load_individual
from tests.soak import ROOT, TINY, Run, complete, kill, parents, wait_for, workers_of
from training import Task
from workers import Processes, ThisProcess

THETA = {f"theta{i}": 10.0 * (i == 5) for i in range(8)}
CONFIG = Config(dataset="digits", epochs=1, batch_size=50, loss_backend="reference", device="cpu",
                layout="channels-last", threads=1)


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (600, 1, 8, 8), dtype=np.uint8), rng.integers(0, 10, 600)
    return make_data(images, images, validation=100)


@pytest.fixture
def pool(data):
    with contextlib.closing(Processes(CONFIG, data, 2)) as pool:
        yield pool


def tasks(folder, n=4):
    folder.mkdir(exist_ok=True)
    return [Task(Individual(i, 0, {**THETA, "momentum": 0.1 * i}), folder / f"{i}.safetensors")
            for i in range(n)]


@pytest.fixture(scope="module")
def expected(data, tmp_path_factory):
    """The files that one undisturbed process writes."""
    folder = tmp_path_factory.mktemp("expected")
    with contextlib.closing(ThisProcess(CONFIG, data)) as pool:
        list(pool.run(tasks(folder)))
    return files(folder)


def files(folder):
    """What is written whole: a worker that dies within a write leaves a name with a dot first."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.startswith(".")}


class Trap:
    """Stands in for an individual until a worker receives it: then it acts, each time or, with a
    file as memory, once."""

    def __init__(self, *state):
        self.id, self.state = state[0].id, state

    def __reduce__(self):
        return spring, self.state


def spring(individual, memory, act, *arguments):
    if memory is None or not memory.exists():
        if memory is not None:
            memory.touch()
        act(*arguments)
    return individual


def die(number):
    os.kill(os.getpid(), number)


def fail(error, context=None):
    try:
        if context is not None:
            raise context
    finally:
        raise error


def with_trap(some, i, *act, memory=None):
    some[i] = replace(some[i], individual=Trap(some[i].individual, memory, *act))
    return some


@pytest.mark.parametrize("count", [2, 3])
def test_any_number_of_workers_writes_the_same_bytes(count, data, expected, tmp_path):
    with contextlib.closing(Processes(CONFIG, data, count)) as pool:
        done = list(pool.run(tasks(tmp_path / "run")))
    assert files(tmp_path / "run") == expected
    for individual in done:
        written, _ = load_individual(tmp_path / "run" / f"{individual.id}.safetensors")
        assert individual.record() == written.record()
        assert (individual.correct == written.correct).all()
    assert all(s.images.is_shared() for s in (data.train, data.validation, data.test))


# Workers that die


@pytest.mark.parametrize("act, how", [
    ((die, signal.SIGKILL), "signal SIGKILL"), ((os._exit, 3), "exit code 3"),
    ((fail, ValueError("of this")), "exit code 1")])
def test_a_worker_that_dies_is_replaced_and_its_individual_evaluated_again(
        act, how, pool, expected, tmp_path, capfd):
    trapped = with_trap(tasks(tmp_path / "run"), 1, *act, memory=tmp_path / "memory")
    assert sorted(individual.id for individual in pool.run(trapped)) == [0, 1, 2, 3]
    assert files(tmp_path / "run") == expected
    assert f"a worker died with {how}; individual 1 is evaluated again" in capfd.readouterr().err
    assert len(pool.workers) == 2 and all(worker.process.is_alive() for worker in pool.workers)


def test_workers_killed_while_they_train_and_while_they_are_idle(pool, expected, tmp_path):
    def kill_one():
        kill(pool.workers[0].process.pid)
    timers = [threading.Timer(seconds, kill_one) for seconds in (0.1, 0.4, 0.7)]
    for timer in timers:
        timer.start()
    list(pool.run(tasks(tmp_path / "run")))
    for timer in timers:
        timer.join()
    assert files(tmp_path / "run") == expected
    for worker in pool.workers:  # idle now
        kill(worker.process.pid)
        worker.process.join()
    list(pool.run(tasks(tmp_path / "again")))
    assert files(tmp_path / "again") == expected


def test_a_worker_that_always_dies_ends_in_one_error(pool, expected, tmp_path):
    with pytest.raises(RunError) as error:
        list(pool.run(with_trap(tasks(tmp_path / "run"), 0, die, signal.SIGSEGV)))
    assert str(error.value) == ("individual 0 could not be evaluated: its worker died 3 times, the "
                                "last time with signal SIGSEGV")
    assert expected.items() >= files(tmp_path / "run").items()


def test_an_error_that_the_user_can_mend_is_told_as_it_is(pool, tmp_path):
    some = tasks(tmp_path / "run")
    some[2] = replace(some[2], path=tmp_path / "nowhere" / "2.safetensors")
    with pytest.raises(RunError) as error:
        list(pool.run(some))
    assert str(error.value) == f"cannot write {some[2].path}: No such file or directory"


# A GPU whose memory is too small


@pytest.mark.parametrize("error", [*zip(MEMORY[:4]), (RuntimeError("x"), MEMORY[0])])
def test_out_of_memory_lowers_the_number_of_workers(error, pool, expected, tmp_path, capfd):
    trapped = with_trap(tasks(tmp_path / "run"), 0, fail, *error, memory=tmp_path / "memory")
    list(pool.run(trapped))
    assert files(tmp_path / "run") == expected and len(pool.workers) == 1
    assert capfd.readouterr().err == "out of memory on cpu: going on with no of its slots\n"


def test_out_of_memory_with_the_last_worker_ends_in_one_error(pool, tmp_path):
    with pytest.raises(RunError, match="individual 3 does not fit the GPU's memory.*--batch-size"):
        list(pool.run(with_trap(tasks(tmp_path / "run"), 3, fail, MEMORY[0])))
    assert pool.workers == []


@pytest.mark.parametrize("count, slots", [(5, [3, 2]), (1, [1]), (0, [1, 1])])
def test_every_gpu_gets_its_share_of_the_slots_or_finds_its_own_number(count, slots, monkeypatch):
    class Stub(SimpleNamespace):
        def answer(self):
            return None

    monkeypatch.setattr(workers, "WorkerProcess",
                        lambda _, config, data, slots: Stub(device=config.device, slots=slots))
    monkeypatch.setattr(workers.torch.cuda, "device_count", lambda: 2)
    pool = Processes(replace(CONFIG, device="cuda"), None, count)
    assert [(w.device, w.slots) for w in pool.workers] == [
        (f"cuda:{i}", n) for i, n in enumerate(slots)]


def test_a_pool_that_cannot_start_leaves_no_process_and_no_setting_behind(data, monkeypatch):
    def refuse(*_):
        raise RunError("its training step cannot be captured")

    threads = torch.get_num_threads()
    monkeypatch.setattr(workers.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(workers.WorkerProcess, "answer", refuse)
    monkeypatch.setattr(workers, "Trainer", refuse)
    for start in (lambda: Processes(replace(CONFIG, device="cuda"), data, 0),
                  lambda: ThisProcess(replace(CONFIG, threads=threads + 1), data)):
        with pytest.raises(RunError, match="captured"):
            start()
    wait_for(lambda: not workers_of(os.getpid()))
    assert torch.get_num_threads() == threads


# Whole runs


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one undisturbed process makes of TINY."""
    return soak.undisturbed(TINY, tmp_path_factory.mktemp("alone") / "run")


def training_family(pid, folder):
    """The processes of a run with two workers, once it has trained an individual."""
    wait_for((folder / "individuals" / "000001.safetensors").exists, 120)
    family = {pid, *workers_of(pid)}
    assert len(family) == 3
    return family


def test_a_run_with_workers_is_the_run_without(alone, tmp_path):
    run = Run([*TINY, "--workers", "3"], tmp_path / "run")
    assert run.end() == 0, run.said()
    assert soak.result(tmp_path / "run") == alone


def test_ctrl_c_ends_a_run_within_seconds_and_says_how_to_go_on(alone, tmp_path):
    folder = tmp_path / "a run"
    process = subprocess.Popen(
        [sys.executable, "epbt.py", *TINY, "--workers", "2", "--out", str(folder)], cwd=ROOT,
        stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL))  # not so in background
    family = training_family(process.pid, folder)
    start = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    said = process.communicate(timeout=60)[1]
    assert time.monotonic() - start < 10 and process.returncode == 130
    how = r"\s*interrupted; go on with: python epbt.py --resume --out '.*/a run'\s*"
    assert re.fullmatch(how, said)
    wait_for(lambda: not parents().keys() & family)
    complete(TINY, folder, alone)


def test_a_run_that_is_killed_leaves_no_worker_behind(alone, tmp_path):
    run = Run([*TINY, "--workers", "2"], tmp_path / "run")
    family = training_family(run.pid, tmp_path / "run")
    kill(run.pid)
    assert run.end() == -signal.SIGKILL
    wait_for(lambda: not parents().keys() & family)
    complete(TINY, tmp_path / "run", alone)


def test_memory_is_flat_over_200_generations_in_parent_and_workers(tmp_path):
    run = Run([*TINY, "--generations", "200", "--workers", "2"], tmp_path / "run")
    log = tmp_path / "run" / "log.jsonl"

    def memory_after(generations):
        """Bytes of private memory of the run and of each worker: what they share cannot leak."""
        wait_for(lambda: log.exists() and log.read_bytes().count(b"\n") >= generations, 240)
        family = run.pid, *workers_of(run.pid)
        maps = [Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8") for pid in family]
        return [sum(map(int, re.findall(r"^Private_\w+: +(\d+) kB", m, re.M))) << 10 for m in maps]

    early, late = memory_after(40), memory_after(190)
    assert run.end() == 0, run.said()
    assert len(early) == len(late) == 3
    assert all(b - a < 4 << 20 for a, b in zip(early, late, strict=True)), (early, late)


@pytest.mark.cuda
def test_a_step_that_cannot_be_captured_is_told_in_one_line(tmp_path):
    """In a process of its own, since CUDA does not recover from it."""
    options = "--model test_slots:Peeking --dataset digits --limit 200 --validation 50 --epochs 1"
    command = [sys.executable, "epbt.py", *options.split(), "--out", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    said = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and "Peeking: its training step cannot be captured" in said
    assert "--no-graphs" in said
