"""A run's folder: kills, damaged bytes, a full disk. tests/soak.py does this to whole runs."""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import records
from records import Individual, RunError, RunFolder, begun, load_individual, read_log
from tests.soak import can_mount, die_at, small_disk

CONFIG = {"seed": 0, "learning_rate": 0.1, "milestones": (0.3, 0.6), "generations": 4}


def play(path, config=CONFIG, stop=4, **options):
    """Start or resume a stand-in for a run: three individuals a generation, one of them an elite;
    their "weights" follow from their parents'. Returns its log and its last population's weights.
    """
    run = RunFolder(path, config, **options)
    try:
        if not run.finished:
            run.begin()
        for g in range(run.generations, stop):
            elites = [records.fittest(run.population)] if run.population else []
            parents = run.population[: 3 - len(elites)] or [None] * 3
            children = [Individual(run.evaluated() + i, g, {"h": 0.1 * g}, parent and parent.id)
                        for i, parent in enumerate(parents)]
            children = [run.recall(child) or evaluate(run, child) for child in children]
            run.record(g, elites + children, elites)
        if run.generations == config["generations"] and not run.finished:
            records.write_atomic(run.path / "best.pt", b"weights")
            records.write_atomic(run.path / "summary.json", b"{}")
        states = [load_individual(run.individual_path(m.id))[1]["w"] for m in run.population]
        return (run.path / "log.jsonl").read_bytes(), torch.stack(states).tolist()
    finally:
        run.close()


def evaluate(run, child):
    w = torch.zeros(8, dtype=torch.float64)
    if child.parent is not None:
        w = load_individual(run.individual_path(child.parent))[1]["w"]
    rng = np.random.default_rng(child.id)
    child.correct = rng.random(30) < 0.5
    child.fitness = float(child.correct.mean())
    child.applied = {"learning_rate": [0.1, 0.1 / 3], "theta": None, "momentum": np.float64(0.9)}
    child.scores = {"memorised": float("nan")}
    state = {"w": w + torch.from_numpy(rng.random(8))}
    records.save_individual(run.individual_path(child.id), child, state)
    return child


@pytest.fixture
def tmp_path():
    """A folder in memory, if possible: to fsync thousands of files on a disk takes minutes."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as path:
        yield Path(path)


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    return play(tmp_path_factory.mktemp("play") / "run")


def in_another_process(action):
    """Calls action in a fork of this process; returns its process id."""
    if (pid := os.fork()) == 0:
        try:
            action()
        finally:
            os._exit(0)
    return pid


def play_until(call, after, *arguments, **options):
    """Play in a fork, and die before or after the numbered call that changes a folder. Returns
    whether there was such a call."""
    pid = in_another_process(lambda: (die_at(call, after), play(*arguments, **options)))
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


def flip(data, at, by=4):
    return data[:at] + bytes([data[at] ^ by]) + data[at + 1:]


def test_a_run_killed_at_any_of_its_calls_resumes_to_the_same_bytes(expected, tmp_path):
    """It is killed again while it resumes, at another call each time."""
    call, path = 0, tmp_path / "run"
    while play_until(call, call % 2, path):
        before = {p: p.stat().st_mtime_ns for p in path.glob("individuals/0*")}
        play_until(7 * call % 17, call % 3 == 0, path, resume=begun(path))
        assert play(path, resume=begun(path)) == expected, call
        assert all(p.stat().st_mtime_ns == t for p, t in before.items() if p.exists()), call
        assert not list(tmp_path.rglob("*.tmp"))
        shutil.rmtree(path)
        call += 1
    assert call > 50


def test_a_run_killed_at_random_instants_ends_in_the_same_bytes(expected, tmp_path):
    rng, kills, path, begin = np.random.default_rng(0), 0, tmp_path / "run", time.perf_counter()
    play(tmp_path / "timed")
    took = time.perf_counter() - begin
    while kills < 30:
        pid = in_another_process(lambda: play(path, resume=begun(path)))
        time.sleep(rng.uniform(0, took))
        os.kill(pid, signal.SIGKILL)
        kills += os.WIFSIGNALED(os.waitpid(pid, 0)[1])
        if rng.random() < 0.3:
            assert play(path, resume=begun(path)) == expected
            shutil.rmtree(path)


def test_a_run_killed_while_it_replaces_another_goes_on_as_one_of_the_two(expected, tmp_path):
    other = {**CONFIG, "learning_rate": 0.2}
    play(tmp_path / "other", other)
    resumed, killed = [], True
    while killed:
        shutil.copytree(tmp_path / "other", tmp_path / "run")
        killed = play_until(len(resumed), True, tmp_path / "run", overwrite=True)
        config = records.read_config(tmp_path / "run")
        resumed.append(config["learning_rate"])
        assert play(tmp_path / "run", config, resume=True) == expected
        shutil.rmtree(tmp_path / "run")
    assert set(resumed) == {0.1, 0.2} and resumed == sorted(resumed, reverse=True)


def contents(folder):
    return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("*")
            if p.is_file() and p.name != ".lock"}


def test_a_start_that_fails_and_a_finished_run_change_nothing(expected, tmp_path):
    run, new = tmp_path / "run", tmp_path / "new"
    play(run)
    before = contents(run)
    failed = RunFolder(run, {**CONFIG, "seed": 1}, overwrite=True)
    assert (failed.generations, failed.population, failed.finished) == (0, [], False)
    failed.close()
    assert play(run, resume=True) == expected
    finished = RunFolder(run, CONFIG, resume=True)
    assert finished.finished and finished.evaluated() == 9 and finished.log == read_log(run)
    finished.close()
    assert before == contents(run)
    RunFolder(new, CONFIG).close()
    assert play(new) == expected
    started = RunFolder(run, {**CONFIG, "seed": 1}, overwrite=True)
    started.begin()  # clears the old run
    assert {p.name for p in run.rglob("*")} == {".lock", "config.json", "individuals", "log.jsonl",
                                                "timing.jsonl"}
    assert records.read_config(run)["seed"] == 1 and read_log(run) == started.log == []
    started.close()
    log = new / "log.jsonl"
    log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:3]))
    shorter = RunFolder(new, CONFIG, resume=True)
    shorter.begin()
    assert not shorter.finished and not (new / "summary.json").exists()
    shorter.close()


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A run that was killed in its last generation, one of whose children it had evaluated."""
    path = tmp_path_factory.mktemp("interrupted") / "run"
    play(path, stop=3)
    run = RunFolder(path, CONFIG, resume=True)
    evaluate(run, Individual(7, 3, {"h": 0.1 * 3}, run.population[0].id))
    run.close()
    return path


def test_any_wrong_byte_and_any_length_is_seen(interrupted, tmp_path):
    shutil.copytree(interrupted, tmp_path, dirs_exist_ok=True)
    for path, read, argument in [
            (tmp_path / "log.jsonl", read_log, tmp_path),
            (tmp_path / "config.json", records.read_config, tmp_path),
            *((path, load_individual, path) for path in tmp_path.glob("individuals/*"))]:
        data, intact = path.read_bytes(), read(argument)
        bad = [data[:n] for n in range(len(data))] + [data + b"x"] * (path.name != "log.jsonl")
        bad += [flip(data, i, by) for i in range(len(data)) for by in (1 << i % 8, 7, 32)]
        for content in bad:
            path.write_bytes(content)
            try:
                found = read(argument)
            except RunError as error:
                assert path.name in str(error)
            else:  # a log that was cut, or whose last line is no longer closed, is a shorter log
                assert path.name == "log.jsonl" and found == intact[:len(found)] != intact
        path.write_bytes(data)
    log, config = read_log(tmp_path), records.read_config(tmp_path)
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    (tmp_path / "config.json").write_text(json.dumps(config))  # as before checksums
    assert read_log(tmp_path) == log and records.read_config(tmp_path) == config


DAMAGES = {"flipped": lambda data: flip(data, len(data) // 2), "cut": lambda data: data[:-9],
           "emptied": lambda data: b"", "zeroed": lambda data: bytes(len(data)), "lost": None}


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_file_is_mended_or_named(how, interrupted, expected, tmp_path, capfd):
    mended, named = set(), set()
    for file in [p.relative_to(interrupted) for p in interrupted.rglob("*.*[!k]")]:
        path = tmp_path / "run" / file
        shutil.copytree(interrupted, tmp_path / "run")
        data = path.read_bytes()
        path.unlink()
        if how != "lost":
            path.write_bytes(DAMAGES[how](data))
        try:
            assert play(tmp_path / "run", resume=True) == expected, file
            mended.add(file.name)
        except RunError as error:
            assert file.name in str(error) or str(error).endswith("holds no run")
            named.add(file.name)
        shutil.rmtree(tmp_path / "run")
    lost = {"000005.safetensors", "000006.safetensors"}
    assert named >= {"000001.safetensors", "config.json"}  # an elite: its parents are gone
    assert mended >= {*lost, "000003.safetensors", "000007.safetensors", "timing.jsonl"}
    assert ("log.jsonl" in mended) == (how != "flipped")
    said = capfd.readouterr().err
    assert said.count("; going back to the end of generation 2\n") >= 2
    why = "No such file or directory" if how == "lost" else "its checksum does not match"
    assert all(f"{name} is damaged or missing: {why}; going" in said for name in lost)
    assert ("000007.safetensors is damaged or missing: its checksum does not match; evaluating it "
            "again" in said) == (how != "lost")


def test_a_torn_line_is_dropped_and_a_wrong_generation_made_again(expected, tmp_path, capfd):
    play(tmp_path)
    log = tmp_path / "log.jsonl"
    whole = log.read_bytes()
    last = whole.rfind(b"\n", 0, -1) + 1
    for content, said in ((whole + b'{"generation": 4', ""), (whole[:-1], ""), (whole[:last], ""),
                          (whole[:last] + b"x\n", "line 4 of"),
                          (flip(whole, last + 200, 1), "its checksum does not match; going back")):
        log.write_bytes(content)
        (tmp_path / "summary.json").unlink(missing_ok=True)
        assert play(tmp_path, resume=True) == expected
        err = capfd.readouterr().err
        assert said in err and bool(err) == bool(said)
    individuals = tmp_path / "individuals"
    shutil.copy(individuals / "000007.safetensors", individuals / "000008.safetensors")
    assert play(tmp_path, resume=True) == expected
    assert "000008.safetensors is not the individual that the log has" in capfd.readouterr().err
    log.write_bytes(flip(whole, 200, 1))
    with pytest.raises(RunError, match="resumed: line 1 of .*log.jsonl is damaged: [^;]*$"):
        play(tmp_path, resume=True)


@pytest.mark.parametrize("payload", [b"", b"no tensors", b"cos\nmkdir\n(S'code-was-run'\ntR.",
                                     b"[" * 100_000, b"\xff" * 8 + b"{}"])
def test_a_right_checksum_over_something_else_is_refused(payload, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    start = len(payload).to_bytes(8, "little") + b"sha256:"
    digest = hashlib.sha256(start + payload).hexdigest().encode()
    (tmp_path / "a").write_bytes(start + digest + payload)
    with pytest.raises(records.DamagedFile, match="a is damaged"):
        load_individual(tmp_path / "a")
    assert not (tmp_path / "code-was-run").exists()


def test_every_kind_of_tensor_comes_back_as_it_was(tmp_path):
    bits = torch.randint(256, (4, 16), dtype=torch.uint8, generator=torch.manual_seed(0))
    state = {str(dtype): bits.clone().view(dtype) for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int8,
        torch.complex64, torch.complex128, torch.uint16, torch.float8_e4m3fn)}
    state |= {"bool": bits > 99, "scalar": torch.tensor(3), "complex scalar": torch.tensor(1 + 2j),
              "empty": torch.zeros(0, 4), "five": torch.ones(1, 2, 1, 2, 1)}
    written = Individual(7, 3, {"theta0": 0.1 + 0.2, "momentum": -1e-300}, parent=4, teacher=2,
                         fitness=1 / 3, diverged=True, correct=np.arange(13) % 3 == 0,
                         applied={"theta": [float("inf")] * 8}, scores={"memorised": 0.5})
    records.save_individual(tmp_path / "a", written, state)
    read, found = load_individual(tmp_path / "a")
    assert read.record() == written.record() and read.applied == {"theta": [None] * 8}
    assert read.correct.dtype == bool and read.correct.tolist() == written.correct.tolist()
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        assert torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (found[name], tensor))), name


def test_only_the_same_individual_is_recalled(tmp_path):
    run = RunFolder(tmp_path, CONFIG)
    run.begin()
    assert run.recall(Individual(0, 0, {"h": 0.5})) is None
    child = evaluate(run, Individual(0, 0, {"h": 0.5}))
    same = run.recall(Individual(0, 0, {"h": 0.5}))
    assert same.record() == child.record() and same.correct.tolist() == child.correct.tolist()
    for other in (Individual(0, 0, {"h": 0.6}), Individual(0, 1, {"h": 0.5}),
                  Individual(0, 0, {"h": 0.5}, mate=3), Individual(0, 0, {"h": 0.5}, parent=3),
                  Individual(0, 0, {"h": 0.5}, teacher=3), Individual(1, 0, {"h": 0.5})):
        assert run.recall(other) is None
    run.close()


def test_the_individuals_of_the_last_two_generations_are_kept_and_all_that_is_not_ours(tmp_path):
    foreign = [tmp_path / name for name in ("holiday.png", "log.jsonl.old", "individuals/notes.txt",
                                            "individuals/mine.safetensors",
                                            "individuals/000001 (copy).safetensors")]
    (tmp_path / "individuals").mkdir()
    for path in foreign:
        path.write_text("precious")
    play(tmp_path)
    needed = {member["id"] for line in read_log(tmp_path)[-2:] for member in line["population"]}
    assert {int(p.stem) for p in tmp_path.glob("individuals/0?????.safetensors")} == needed
    play(tmp_path, {**CONFIG, "seed": 1}, overwrite=True)
    assert all(path.read_text() == "precious" for path in foreign)


def test_a_file_system_without_locks_is_one_line_and_a_run_names_its_commit(tmp_path, monkeypatch):
    play(tmp_path / "run")
    commits = {line["commit"] for line in records.read_timing(tmp_path / "run")}
    found = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True,
                           text=True, cwd=Path(records.__file__).parent).stdout.strip()
    assert commits == {found}

    def flock(file, how):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(records.fcntl, "flock", flock)
    with pytest.raises(RunError, match="cannot lock .*new: Function not implemented"):
        RunFolder(tmp_path / "new", CONFIG)


def test_what_a_folder_holds_decides_what_may_be_done_with_it(tmp_path):
    with pytest.raises(RunError, match="holds no run"):
        RunFolder(tmp_path / "new", CONFIG, resume=True)
    assert not (tmp_path / "new").exists()
    for name in ("best.pt", "summary.json", "log.jsonl", "curves.png"):
        (tmp_path / name).write_text("precious")
        said = f"already holds a run, or at least {name}: .*another --"
        with pytest.raises(RunError, match=said):
            RunFolder(tmp_path, CONFIG)
        assert [path.name for path in tmp_path.iterdir()] == [name]
        (tmp_path / name).unlink()
    play(tmp_path)
    with pytest.raises(RunError, match="already holds a run.*--resume.*--overwrite"):
        RunFolder(tmp_path, CONFIG)
    with pytest.raises(RunError) as error:
        RunFolder(tmp_path, {**CONFIG, "epochs": 3, "seed": 1}, resume=True)
    assert str(error.value).endswith("epochs is None there and 3 now, seed is 0 there and 1 now")
    with open(tmp_path / ".lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for options in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(RunError, match="in use by another process"):
                RunFolder(tmp_path, CONFIG, **options)
    shutil.rmtree(tmp_path / "individuals")
    with pytest.raises(RunError, match="cannot be resumed: .*[0-9].safetensors is damaged or"):
        RunFolder(tmp_path, CONFIG, resume=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot write to .*file/run: Not a directory"):
        play(tmp_path / "file" / "run")


@pytest.mark.skipif(not can_mount(), reason="this user cannot mount a small file system")
def test_a_full_or_read_only_disk_ends_in_one_line_and_loses_nothing(expected, tmp_path):
    endings = set()
    for size in (4, 8, 16, 24, 28, 32, 40):
        with small_disk(tmp_path, size) as remount:
            with pytest.raises(RunError, match="cannot write .*: No space left on device") as error:
                play(tmp_path)
            endings.add(str(error.value).split("/")[-1])
            remount("size=100m,ro")
            with pytest.raises(RunError, match="cannot write .*: Read-only file system"):
                play(tmp_path, resume=begun(tmp_path))
            remount("rw")
            assert play(tmp_path, resume=begun(tmp_path)) == expected
    assert len(endings) > 2  # it was full at different times
