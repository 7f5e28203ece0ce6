"""Pools of workers, and what becomes of a run when one of them dies. The long form is tests/soak.py."""

import contextlib
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import workers
from config import Config
from data import make_data
from epbt import make_job
from records import Individual, RunError, load_individual
from tests.soak import ROOT, TINY, Run, complete, kill, parents, result, undisturbed, wait_for, workers_of
from training import Task, Trainer
from workers import Processes, ThisProcess

THETA = {f"theta{i}": 10.0 * (i == 5) for i in range(8)}


@pytest.fixture(scope="module")
def job():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (600, 1, 8, 8), dtype=np.uint8), rng.integers(0, 10, 600)
    data = make_data(images, images, validation=100)
    config = Config(dataset="digits", epochs=1, batch_size=50, loss_backend="reference", device="cpu").resolved()
    return make_job(config, data)


@pytest.fixture
def pool(job):
    pool = Processes(job, 2)
    yield pool
    pool.close()


def tasks(folder, n=4):
    folder.mkdir(exist_ok=True)
    return [Task(Individual(i, 0, {**THETA, "momentum": 0.1 * i}), folder / f"{i}.ckpt", None, None, 0.0)
            for i in range(n)]


@pytest.fixture(scope="module")
def expected(job, tmp_path_factory):
    """The files that one undisturbed process writes."""
    folder = tmp_path_factory.mktemp("expected")
    pool = ThisProcess(job)
    list(pool.run(tasks(folder)))
    pool.close()
    return files(folder)


def files(folder):
    """What is written whole: a worker that dies within a write leaves a file whose name begins with a dot."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


class Trap:
    """Stands in for an individual until a worker receives it: then it does something, once, or always if no file
    remembers that it did."""

    def __init__(self, individual, act, *arguments, memory=None):
        self.id, self.state = individual.id, (individual, act, arguments, memory)

    def __reduce__(self):
        return spring, self.state


def spring(individual, act, arguments, memory):
    if memory is None or not memory.exists():
        if memory is not None:
            memory.touch()
        act(*arguments)
    return individual


def die(number):
    os.kill(os.getpid(), number)


def fail(error):
    raise error


def with_trap(some, i, *act, **memory):
    some[i] = replace(some[i], individual=Trap(some[i].individual, *act, **memory))
    return some


# Any number of workers


@pytest.mark.parametrize("count", [2, 3])
def test_any_number_of_workers_writes_the_same_bytes(count, job, expected, tmp_path):
    pool = Processes(job, count)
    done = list(pool.run(tasks(tmp_path / "run")))
    pool.close()
    assert files(tmp_path / "run") == expected
    for individual in done:
        written, _ = load_individual(tmp_path / "run" / f"{individual.id}.ckpt")
        assert individual.record() == written.record() and (individual.correct == written.correct).all()


class Noisy(torch.nn.Sequential):
    """Draws from the global generators of PyTorch, NumPy and Python in every step."""

    def __init__(self, num_classes, in_channels):
        super().__init__(torch.nn.Flatten(), torch.nn.Linear(64 * in_channels, 16), torch.nn.Dropout(0.5),
                         torch.nn.Linear(16, num_classes))

    def forward(self, x):
        return super().forward(x) * ((random.random() + np.random.rand()) if self.training else 1)


def test_slots_that_take_turns_in_one_thread_write_the_same_bytes(job, tmp_path):
    """As on a GPU, where each also has a stream and graphs."""
    noisy = replace(job, model="tests.test_workers:Noisy", epochs=3)
    list(ThisProcess(noisy).run(tasks(tmp_path / "alone")))
    ours, theirs = multiprocessing.Pipe()
    slots = [Trainer(noisy) for _ in range(3)]

    def serve():
        with contextlib.suppress(EOFError):
            workers._take_turns(slots, theirs)
    thread = threading.Thread(target=serve)
    thread.start()
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    some = tasks(tmp_path / "turns")
    for task in some:
        ours.send(task)
    assert sorted(ours.recv().id for _ in some) == [0, 1, 2, 3]
    ours.close()
    thread.join()
    assert files(tmp_path / "turns") == files(tmp_path / "alone")
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (np.random.get_state()[1].tolist(), random.getstate())


def test_as_many_slots_are_kept_as_raise_the_throughput(job, monkeypatch):
    told = []
    pipe = SimpleNamespace(send=told.append)
    images = iter([100.0, 180.0, 200.0, 205.0])
    monkeypatch.setattr(workers, "throughput", lambda trainers: next(images))
    assert len(workers.worthwhile_trainers(job, pipe)) == 3

    def too_large(trainers):
        if len(trainers) > 1:
            raise error
        return 100.0
    monkeypatch.setattr(workers, "throughput", too_large)
    error = torch.OutOfMemoryError("CUDA out of memory")
    assert len(workers.worthwhile_trainers(job, pipe)) == 1
    error = RuntimeError("GET was unable to find an engine to execute this computation")
    with pytest.raises(RuntimeError, match="unable to find an engine"):
        workers.worthwhile_trainers(job, pipe)
    assert told == [3, 1, 2]  # the last of which takes one away when it ends


def test_throughput_is_measured_without_a_trace(job, expected, tmp_path):
    slots = [Trainer(job) for _ in range(2)]
    assert workers.throughput(slots) > 0
    (tmp_path / "run").mkdir()
    for task in tasks(tmp_path / "run"):
        slots[task.individual.id % 2].evaluate(task)
    assert files(tmp_path / "run") == expected


# Workers that die


@pytest.mark.parametrize("act, how", [((die, signal.SIGKILL), "signal SIGKILL"), ((os._exit, 3), "exit code 3"),
                                      ((fail, ValueError("of this")), "exit code 1")])
def test_a_worker_that_dies_is_replaced_and_its_individual_evaluated_again(act, how, pool, expected, tmp_path, capfd):
    done = list(pool.run(with_trap(tasks(tmp_path / "run"), 1, *act, memory=tmp_path / "memory")))
    assert sorted(individual.id for individual in done) == [0, 1, 2, 3]
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
    assert str(error.value) == ("individual 0 could not be evaluated: its worker died 3 times, the last time with "
                                "signal SIGSEGV")
    assert expected.items() >= files(tmp_path / "run").items()


def test_an_error_that_the_user_can_mend_is_told_as_it_is(pool, tmp_path):
    some = tasks(tmp_path / "run")
    some[2] = replace(some[2], path=tmp_path / "nowhere" / "2.ckpt")
    with pytest.raises(RunError) as error:
        list(pool.run(some))
    assert str(error.value) == f"cannot write {tmp_path / 'nowhere' / '2.ckpt'}: No such file or directory"


# A GPU whose memory is too small


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), torch.AcceleratorError("out of memory"),
                                   RuntimeError("CUDNN_STATUS_ALLOC_FAILED")])
def test_out_of_memory_lowers_the_number_of_workers(error, pool, expected, tmp_path, capfd):
    list(pool.run(with_trap(tasks(tmp_path / "run"), 0, fail, error, memory=tmp_path / "memory")))
    assert files(tmp_path / "run") == expected
    assert len(pool.workers) == 1
    assert capfd.readouterr().err == "out of memory on cpu: going on with no of its slots\n"


def test_out_of_memory_with_the_last_worker_ends_in_one_error(pool, tmp_path):
    with pytest.raises(RunError, match="individual 3 does not fit the GPU's memory.*--batch-size"):
        list(pool.run(with_trap(tasks(tmp_path / "run"), 3, fail, torch.OutOfMemoryError("CUDA out of memory"))))
    assert pool.workers == []


def test_every_gpu_gets_its_share_of_the_slots():
    assert workers._shares(5, 2) == [3, 2] and workers._shares(1, 2) == [1]
    assert workers._shares(None, 2) == [None, None]  # each finds its own number


def test_the_images_lie_in_memory_that_the_workers_share(job, pool):
    assert all(part.images.is_shared() for part in (job.data.train, job.data.validation, job.data.test))


def test_too_little_shared_memory_is_told_before_a_process_dies_of_it(job, monkeypatch):
    monkeypatch.setattr(workers.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(RunError, match="/dev/shm has 0 MiB free: use --workers 1"):
        workers._refuse_small_shared_memory(job.data)


# Whole runs


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one undisturbed process makes of TINY."""
    return undisturbed(TINY, tmp_path_factory.mktemp("alone") / "run")


def test_a_run_with_workers_is_the_run_without(alone, tmp_path):
    run = Run([*TINY, "--workers", "3"], tmp_path / "run")
    assert run.end() == 0, run.said()
    assert result(tmp_path / "run") == alone


def test_ctrl_c_ends_a_run_within_seconds_and_says_how_to_go_on(alone, tmp_path):
    folder = tmp_path / "a run"
    process = subprocess.Popen([sys.executable, "epbt.py", *TINY, "--workers", "2", "--out", str(folder)], cwd=ROOT,
                               stderr=subprocess.PIPE, text=True, start_new_session=True,
                               preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL))  # not so in background
    wait_for(lambda: (folder / "individuals" / "000001.ckpt").exists(), 120)
    family = {process.pid, *workers_of(process.pid)}
    assert len(family) == 3
    start = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    said = process.communicate(timeout=60)[1]
    assert time.monotonic() - start < 10
    assert process.returncode == 130
    assert re.fullmatch(r"\s*interrupted; go on with: python epbt.py --resume --out '.*/a run'\s*", said)
    wait_for(lambda: not parents().keys() & family)
    complete(TINY, folder, alone)


def test_a_run_that_is_killed_leaves_no_worker_behind(alone, tmp_path):
    run = Run([*TINY, "--workers", "2"], tmp_path / "run")
    wait_for(lambda: (tmp_path / "run" / "individuals" / "000001.ckpt").exists(), 120)
    family = {run.pid, *workers_of(run.pid)}
    assert len(family) == 3
    kill(run.pid)
    assert run.end() == -signal.SIGKILL
    wait_for(lambda: not parents().keys() & family)
    complete(TINY, tmp_path / "run", alone)


def test_memory_is_flat_over_200_generations_in_parent_and_workers(tmp_path):
    run = Run([*TINY, "--generations", "200", "--workers", "2"], tmp_path / "run")
    log = tmp_path / "run" / "log.jsonl"

    def memory_after(generations):
        """Bytes of private memory of the run and of each worker: what they share is not theirs to leak."""
        wait_for(lambda: log.exists() and log.read_text().count("\n") >= generations, 120)
        return [sum(int(line.split()[1]) for line in open(f"/proc/{pid}/smaps_rollup") if line.startswith("Private_"))
                << 10 for pid in (run.pid, *workers_of(run.pid))]

    early, late = memory_after(40), memory_after(190)
    assert run.end() == 0, run.said()
    assert len(early) == len(late) == 3
    assert all(after - before < 4 << 20 for before, after in zip(early, late, strict=True)), (early, late)
