"""A run's folder: every kill, every damaged file, whatever a file system refuses. The long form is tests/soak.py."""

import errno
import fcntl
import hashlib
import io
import json
import os
import shutil
import signal
from functools import partial
from multiprocessing import forkserver

import numpy as np
import pytest

import records
from records import (
    DamagedFile,
    Individual,
    RunError,
    RunFolder,
    checkpoints,
    load_individual,
    read_checked,
    read_config,
    read_log,
    save_individual,
    write_atomic,
    write_checked,
)
from tests import soak
from tests.soak import TINY, Run, begun, complete, die_at, hostile, result, stopped, undisturbed

forkserver.ensure_running()  # soak's, before the workers of some test start one that imports less
CONFIG = {"seed": 0, "learning_rate": 0.1}


# A stand-in for a run: three individuals a generation, one of them an elite, whose "weights" follow from the parent's.


def play(path, generations=4, config=CONFIG, **options):
    """Start or resume a run; returns its log and the states of its last population."""
    run = RunFolder(path, config, **options)
    for g in range(run.generations, generations):
        elites = sorted(run.population, key=lambda m: (-m.fitness, m.id))[:1]
        parents = run.population[: 3 - len(elites)] or [None] * 3
        children = [Individual(run.evaluated() + i, g, {"h": 0.1 * g}, parent=parent and parent.id)
                    for i, parent in enumerate(parents)]
        run.record(g, elites + [run.recall(child) or evaluate(run, child) for child in children], elites)
    states = [load_individual(run.individual_path(m.id))[1].tolist() for m in run.population]
    return (run.path / "log.jsonl").read_text(), states


def evaluate(run, child):
    state = np.zeros(8) if child.parent is None else load_individual(run.individual_path(child.parent))[1]
    rng = np.random.default_rng(child.id)
    child.correct = rng.random(30) < 0.5
    child.fitness = float(child.correct.mean())
    save_individual(run.individual_path(child.id), child, state + rng.random(8))
    return child


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    return play(tmp_path_factory.mktemp("play") / "run")


def play_until(path, call, after, **options):
    """Play in another process, which kills itself at a call that changes the folder; returns whether it did."""
    if (pid := os.fork()) == 0:
        die_at(call, after)
        play(path, **options)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    assert status == 0 or os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    return status != 0


# Kills


def test_a_run_killed_at_any_of_its_calls_resumes_to_the_same_bytes(expected, tmp_path):
    call = 0
    while play_until(tmp_path / "run", call, after=call % 2):
        assert play(tmp_path / "run", resume=begun(tmp_path / "run")) == expected, call
        shutil.rmtree(tmp_path / "run")
        call += 1
    assert call > 60  # three calls for each of 9 individuals, 3 mirrors, 6 checkpoints, ...


def test_a_run_killed_while_it_replaces_another_resumes_as_one_of_the_two(expected, tmp_path):
    other = {**CONFIG, "learning_rate": 0.2}
    play(tmp_path / "other", generations=2, config=other)
    outcomes = set()
    for call in range(30):
        shutil.copytree(tmp_path / "other", tmp_path / "run")
        assert play_until(tmp_path / "run", call, True, overwrite=True)
        try:
            assert play(tmp_path / "run", resume=begun(tmp_path / "run")) == expected, call
            outcomes.add("resumed")
        except RunError as error:
            assert "learning_rate is 0.2 there and 0.1 now" in str(error)
            outcomes.add("refused")
        shutil.rmtree(tmp_path / "run")
    assert outcomes == {"resumed", "refused"}


def test_a_kill_loses_only_what_is_being_evaluated(tmp_path):
    assert play_until(tmp_path, 32, False)  # the third individual is being written
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("individuals/*.ckpt")}
    assert len(before) >= 2
    play(tmp_path, generations=1, resume=True)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_the_remains_of_a_killed_write_are_removed(tmp_path):
    play(tmp_path / "run")
    for folder in (tmp_path / "run", tmp_path / "run" / "individuals"):
        (folder / ".file.1234.tmp").write_bytes(b"half")
    play(tmp_path / "run", resume=True)
    assert not list((tmp_path / "run").rglob("*.tmp"))


def test_the_last_two_checkpoints_are_kept_with_all_that_they_need(tmp_path):
    run = RunFolder(tmp_path, CONFIG)
    for generations in range(1, 6):
        del run  # and its lock
        play(tmp_path, generations, resume=True)
        run = RunFolder(tmp_path, CONFIG, resume=True)
        assert [int(path.name[11:16]) for path in checkpoints(tmp_path)] == [generations, generations - 1]
        needed = {member["id"] for line in run.read_log()[-2:] for member in line["population"]}
        assert {int(path.name[:6]) for path in run.individuals.iterdir()} == needed


# Damaged and hostile files


def flip(data, at=0.5):
    data = bytearray(data)
    data[int(at * len(data))] ^= 4
    return bytes(data)


DAMAGES = {"flipped": flip, "flipped at its end": partial(flip, at=0.999), "zeroed": lambda data: bytes(len(data)),
           "emptied": lambda data: b"", "cut": lambda data: data[:len(data) // 2], "deleted": None}


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("calls", [32, 60, 999], ids=["first generation", "third generation", "finished"])
def test_whatever_single_file_is_damaged_the_run_resumes_to_the_same_bytes(calls, how, expected, tmp_path, capfd):
    assert play_until(tmp_path / "base", calls, True) == (calls < 999)
    files = sorted(path.relative_to(tmp_path / "base") for path in (tmp_path / "base").rglob("*") if path.is_file())
    assert len(files) >= 6
    for file in files:
        path = tmp_path / "run" / file
        shutil.copytree(tmp_path / "base", tmp_path / "run")
        data = path.read_bytes()
        path.unlink()
        if how != "deleted" and data:
            path.write_bytes(DAMAGES[how](data))
        assert play(tmp_path / "run", resume=True) == expected, file
        said = capfd.readouterr().err
        if file.name in ("config.json", "log.jsonl", "timing.jsonl") and data and how in ("flipped", "zeroed"):
            assert str(path) in said
        if file.name == checkpoints(tmp_path / "base")[0].name:
            assert str(path) in said or how == "deleted"
        shutil.rmtree(tmp_path / "run")


def test_every_byte_and_every_length_of_a_checkpoint_counts(tmp_path):
    path = tmp_path / "a.ckpt"
    write_checked(path, a=np.arange(3))
    data = path.read_bytes()
    damaged = [data[:n] for n in range(len(data))] + [data + b"\0"]
    for i in range(len(data)):
        damaged.append(data[:i] + bytes([data[i] ^ 1 << i % 8]) + data[i + 1:])
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(DamagedFile, match="a.ckpt"):
            read_checked(path)


def test_a_folder_in_the_place_of_a_checkpoint_is_named(expected, tmp_path):
    play(tmp_path)
    newest = checkpoints(tmp_path)[0]
    newest.unlink()
    newest.mkdir()
    with pytest.raises(RunError, match=newest.name):
        play(tmp_path, resume=True)
    newest.rmdir()
    assert play(tmp_path, resume=True) == expected


def test_if_nothing_intact_is_left_every_damaged_file_is_named(tmp_path):
    play(tmp_path)
    for path in checkpoints(tmp_path):
        path.write_bytes(flip(path.read_bytes()))
    with pytest.raises(RunError) as error:
        play(tmp_path, resume=True)
    assert all(path.name in str(error.value) for path in checkpoints(tmp_path))


def test_going_back_a_generation_is_said(tmp_path, capfd):
    play(tmp_path)
    newest, before = checkpoints(tmp_path)
    newest.unlink()
    newest.write_bytes(before.read_bytes()[:-1])
    play(tmp_path, resume=True)
    assert f"{newest} is damaged: its checksum does not match; going back to the end of generation 3" in \
        capfd.readouterr().err


def test_another_individuals_file_is_not_taken_for_the_own(expected, tmp_path, capfd):
    play(tmp_path)
    new, other = (m["id"] for m in read_log(tmp_path)[-1]["population"][1:])
    shutil.copy(tmp_path / f"individuals/{new:06d}.ckpt", tmp_path / f"individuals/{other:06d}.ckpt")
    assert play(tmp_path, resume=True) == expected
    assert f"{other:06d}.ckpt is not the individual that the log has" in capfd.readouterr().err


def test_a_parent_that_is_damaged_during_the_run_is_not_copied(tmp_path):
    play(tmp_path, generations=1)
    run = RunFolder(tmp_path, CONFIG, resume=True)
    path = run.individual_path(run.population[0].id)
    path.write_bytes(flip(path.read_bytes()))
    with pytest.raises(DamagedFile, match=path.name):
        run.record(1, run.population, run.population[:1])


def checked(payload):
    return hashlib.sha256(payload).digest() + payload


def npz(**arrays):
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return checked(buffer.getvalue())


def test_a_checkpoint_that_carries_code_is_refused_and_the_code_is_not_run(expected, tmp_path, capfd):
    play(tmp_path / "run")
    newest = checkpoints(tmp_path / "run")[0]
    newest.write_bytes(hostile(tmp_path / "ran"))
    assert play(tmp_path / "run", resume=True) == expected
    assert f"{newest} is refused" in capfd.readouterr().err
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [
    checked(b""), checked(b"no archive"), checked(b"PK\3\4 half an archive"), npz(), npz(other=np.zeros(2)),
    npz(record=np.frombuffer(b"[1", np.uint8)), npz(record=np.frombuffer(b'{"id": 1, "wings": 2}', np.uint8)),
    npz(record=np.frombuffer(b"[" * 100_000, np.uint8)), npz(record=np.frombuffer(b"\xff\xfe", np.uint8))])
def test_a_right_checksum_over_something_else_is_refused(content, tmp_path):
    path = tmp_path / "a.ckpt"
    path.write_bytes(content)
    with pytest.raises(DamagedFile, match="a.ckpt is refused"):
        load_individual(path)
    with pytest.raises(DamagedFile, match="a.ckpt is refused"):
        records.load_checkpoint(path)


@pytest.mark.parametrize("how, said", [
    (flip, True), (lambda log: log[:len(log) // 3], True), (lambda log: b"", True),
    (lambda log: log[:-5], False), (lambda log: log[:log.rfind(b"\n", 0, -1) + 1], False),
    (lambda log: log + b'{"generation": 4}\n', False)])
def test_the_log_is_put_back_and_damage_is_told_from_an_interruption(how, said, expected, tmp_path, capfd):
    play(tmp_path)
    log = tmp_path / "log.jsonl"
    log.write_bytes(how(log.read_bytes()))
    assert read_log(tmp_path) == [json.loads(line) for line in expected[0].splitlines()]  # as the checkpoint has it
    assert play(tmp_path, resume=True) == expected
    assert (f"{log} is damaged" in capfd.readouterr().err) == said


def test_an_individual_comes_back_as_it_was_written(tmp_path):
    written = Individual(7, 3, {"theta0": 0.1 + 0.2, "momentum": -1e-300}, parent=4, mate=None, teacher=2,
                         fitness=1 / 3, test_accuracy=0.5, loss=None, diverged=True, correct=np.arange(13) % 3 == 0)
    state = np.frombuffer(np.random.default_rng(0).bytes(1000), dtype=np.uint8)
    save_individual(tmp_path / "a.ckpt", written, state)
    read, found = load_individual(tmp_path / "a.ckpt")
    assert read.record() == written.record()
    assert read.correct.dtype == bool and read.correct.tolist() == written.correct.tolist()
    assert found.dtype == np.uint8 and found.tobytes() == state.tobytes()


# What is recalled


def test_only_the_same_individual_is_recalled(tmp_path):
    run = RunFolder(tmp_path, CONFIG)
    child = evaluate(run, Individual(0, 0, {"h": 0.5}))
    same = run.recall(Individual(0, 0, {"h": 0.5}))
    assert same.record() == child.record() and same.correct.tolist() == child.correct.tolist()
    assert run.recall(Individual(1, 0, {"h": 0.5})) is None
    for other in (Individual(0, 0, {"h": 0.6}), Individual(0, 1, {"h": 0.5}), Individual(0, 0, {"h": 0.5}, mate=3),
                  Individual(0, 0, {"h": 0.5}, parent=3), Individual(0, 0, {"h": 0.5}, teacher=3)):
        assert run.recall(other) is None


def test_the_second_copy_of_an_individual_that_is_no_more_is_forgotten(tmp_path):
    run = RunFolder(tmp_path, CONFIG)
    child = evaluate(run, Individual(0, 0, {"h": 0.5}))
    run.record(0, [child])
    run.record(1, [child], [child])
    mirror = tmp_path / "individuals/000000.mirror.ckpt"
    assert mirror.exists()
    assert run.recall(Individual(0, 0, {"h": 0.6})) is None
    assert not mirror.exists()


def test_starting_over_recalls_nothing(tmp_path):
    play(tmp_path)
    other = {**CONFIG, "learning_rate": 9.0}
    run = RunFolder(tmp_path, other, overwrite=True)
    assert run.generations == 0 and run.population == [] and not list(run.individuals.iterdir())
    assert read_config(tmp_path) == other and read_log(tmp_path) == []


# What is refused


def test_two_processes_cannot_use_a_folder(tmp_path):
    run = RunFolder(tmp_path, CONFIG)
    with pytest.raises(RunError, match="in use by another process"):
        RunFolder(tmp_path, CONFIG, resume=True)
    with pytest.raises(RunError, match="in use by another process"):
        RunFolder(tmp_path, CONFIG, overwrite=True)
    assert run.evaluated() == 0


def test_a_folder_that_holds_a_run_is_refused_without_a_word_for_it(expected, tmp_path):
    play(tmp_path)
    with pytest.raises(RunError, match="already holds a run.*--resume.*--overwrite"):
        RunFolder(tmp_path, CONFIG)
    assert play(tmp_path, resume=True) == expected


def test_what_is_not_of_a_run_is_left_alone(tmp_path):
    foreign = [tmp_path / name for name in ("holiday.png", "log.jsonl.old", "individuals/notes.txt")]
    (tmp_path / "individuals").mkdir()
    for path in foreign:
        path.write_text("precious")
    play(tmp_path)
    RunFolder(tmp_path, CONFIG, overwrite=True)
    assert all(path.read_text() == "precious" for path in foreign)


@pytest.mark.parametrize("name", ["best.pt", "summary.json", "curves.png"])
def test_a_file_that_a_run_would_write_over_is_refused_where_no_run_is(name, tmp_path):
    (tmp_path / name).write_text("precious")
    with pytest.raises(RunError, match=f"holds {name}, and no run: choose another --out"):
        play(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    play(tmp_path, overwrite=True)


def test_a_published_log_is_neither_written_over_nor_begun_again(tmp_path):
    play(tmp_path)
    log = (tmp_path / "log.jsonl").read_bytes()
    for path in [*tmp_path.glob("*.ckpt"), *tmp_path.glob("individuals/*")]:
        path.unlink()
    with pytest.raises(RunError, match="already holds a run"):
        RunFolder(tmp_path, CONFIG)
    with pytest.raises(RunError, match="without its weights"):
        RunFolder(tmp_path, CONFIG, resume=True)
    assert (tmp_path / "log.jsonl").read_bytes() == log


def test_every_difference_of_config_is_named(tmp_path):
    play(tmp_path)
    with pytest.raises(RunError) as error:
        RunFolder(tmp_path, {"seed": 1, "learning_rate": 0.1, "epochs": 3}, resume=True)
    assert str(error.value).endswith("another config: epochs is None there and 3 now, seed is 0 there and 1 now")


def test_an_empty_folder_cannot_be_resumed(tmp_path):
    with pytest.raises(RunError, match="holds no run"):
        RunFolder(tmp_path, CONFIG, resume=True)


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_one_line(name, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    write_atomic(tmp_path / "a", b"old")
    monkeypatch.setattr(os, name, full)
    with pytest.raises(RunError) as error:
        write_atomic(tmp_path / "a", b"new")
    assert str(error.value) == f"cannot write {tmp_path / 'a'}: No space left on device"
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


@pytest.mark.skipif(not soak.can_mount(), reason="this user cannot mount a small file system")
def test_a_full_disk_ends_in_one_line_and_the_run_resumes_once_there_is_room(expected, tmp_path):
    endings = set()
    for size in (4, 8, 16, 24, 32, 40, 48):
        with soak.small_disk(tmp_path, size) as remount:
            with pytest.raises(RunError, match="No space left on device") as error:
                play(tmp_path)
            endings.add(str(error.value).split("/")[-1].rstrip("0123456789"))
            del error  # its traceback holds the folder's lock
            remount("size=100m")
            assert play(tmp_path, resume=begun(tmp_path)) == expected
    assert len(endings) > 2  # it was full at different times


@pytest.mark.skipif(not soak.can_mount(), reason="this user cannot mount a small file system")
def test_a_read_only_folder_is_refused_in_one_line(expected, tmp_path):
    with soak.small_disk(tmp_path, 1000) as remount:
        play(tmp_path / "run", generations=2)
        remount("ro")
        for path, options in ((tmp_path / "run", dict(resume=True)), (tmp_path / "new", {})):
            with pytest.raises(RunError, match=f"cannot write.*{path.name}.*Read-only file system"):
                play(path, **options)
        remount("rw")
        assert play(tmp_path / "run", resume=True) == expected


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="file/run: Not a directory"):
        play(tmp_path / "file" / "run")


# Real runs


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """What undisturbed runs give."""
    place = tmp_path_factory.mktemp("real")
    return {name: undisturbed(job, place / name) for name, job in (("tiny", TINY), ("resnet", soak.RESNET))}


def test_runs_killed_at_random_resume_to_the_same_bytes(real, tmp_path):
    outcomes = soak.kills(tmp_path, np.random.default_rng(2), real, 6)
    assert outcomes["SIGKILL"] == 6 and 0 < outcomes["of them inside a write, a rename or a removal"] < 6


def test_runs_with_damaged_files_resume_to_the_same_bytes_or_name_the_file(real, tmp_path):
    bases = [stopped(tmp_path / f"stopped-{call}", call) for call in (30, 70)]
    assert sum(soak.damages(tmp_path, np.random.default_rng(0), real, 8, bases=bases).values()) == 8


@pytest.mark.parametrize("method", ["pbt", "random", "baseline"])
def test_every_method_resumes_to_the_same_bytes(method, tmp_path):
    job = [*TINY, "--method", method]
    expected = undisturbed(job, tmp_path / "whole")
    for call in (15, 45):
        assert Run(job, tmp_path / str(call), before=partial(die_at, call, True)).end() == -signal.SIGKILL
        complete(job, tmp_path / str(call), expected)
    newest = checkpoints(tmp_path / "whole")[0]  # and goes back a generation
    newest.write_bytes(flip(newest.read_bytes()))
    complete(job, tmp_path / "whole", expected)


def test_a_finished_run_is_resumed_as_it_is_but_not_extended_or_changed(real, tmp_path):
    assert Run(TINY, tmp_path / "run").end() == 0
    (tmp_path / "run" / "best.pt").write_bytes(b"damaged")
    complete(TINY, tmp_path / "run", real["tiny"])
    for option, value in (("generations", 5), ("epochs", 2), ("seed", 1), ("limit", 210)):
        run = Run(TINY, tmp_path / "run", "--resume", f"--{option}", str(value))
        assert run.end() == 2 and f"{option} is " in run.said() and len(run.said().splitlines()) == 1
    assert result(tmp_path / "run") == real["tiny"]


def test_a_run_in_use_is_refused_in_one_line(tmp_path):
    assert Run(TINY, tmp_path / "run").end() == 0
    with open(tmp_path / "run" / ".lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for options in (["--resume"], ["--overwrite"]):
            run = Run(TINY, tmp_path / "run", *options)
            assert run.end() == 2
            assert run.said() == f"epbt.py: {tmp_path / 'run'} is in use by another process\n"


def test_a_run_whose_every_individual_diverges_goes_on_and_ends(tmp_path):
    job = [*TINY, "--learning-rate", "1e300", "--novelty", "always"]
    assert Run(job, tmp_path / "run", before=partial(die_at, 60, True)).end() == -signal.SIGKILL
    run = Run(job, tmp_path / "run", "--resume")
    assert run.end() == 0, run.said()
    assert "NaN" not in (tmp_path / "run" / "log.jsonl").read_text()
    log = read_log(tmp_path / "run")
    everyone = [member for line in log for member in line["population"]]
    assert len(log) == 4 and len({member["id"] for member in everyone}) == len(everyone) == 16
    for member in everyone:  # each generation starts afresh
        assert member["diverged"] and member["fitness"] == 0
        assert member["parent"] is member["mate"] is member["teacher"] is None and not member["elite"]
