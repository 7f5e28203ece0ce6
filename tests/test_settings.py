"""A run depends on its config alone, whatever its caller and its surroundings have set."""

import contextlib
import functools
import multiprocessing
import os
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
import torch

from epbt import Config, evolve
from errors import RunError
from settings import settings
from tests.soak import ROOT, can_mount

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIG = dict(dataset="digits", model="resnet8", population=2, generations=2, epochs=1, limit=200,
              validation=50, enlarge=1, threads=1, workers=1, device="cpu",
              loss_backend="reference")


def log_of(folder, **given):
    evolve(Config(**{**CONFIG, **given}, out=str(folder)), report=lambda line: None)
    return (folder / "log.jsonl").read_bytes()


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    return log_of(tmp_path_factory.mktemp("expected") / "run")


@contextlib.contextmanager
def called(function, value, afterwards):
    function(value)
    try:
        yield
    finally:
        function(afterwards)


def setting(owner, name, value):
    return called(functools.partial(setattr, owner, name), value, getattr(owner, name))


backends = torch.backends
CALLERS = {
    "matmul": lambda: [called(torch.set_float32_matmul_precision, "medium", "highest")],
    "convolutions": lambda: [setting(backends.mkldnn.conv, "fp32_precision", "bf16")],
    "oneDNN's precision": lambda: [setting(backends.mkldnn, "fp32_precision", "bf16")],
    "PyTorch's precision": lambda: [setting(backends, "fp32_precision", "tf32")],
    "device": lambda: [called(torch.set_default_device, "meta", None)],
    "a device around it": lambda: [torch.device("meta")],
    "no gradients": lambda: [torch.no_grad()],
    "all others": lambda: [
        setting(backends.mkldnn, "enabled", False), torch.inference_mode(),
        called(torch.set_flush_denormal, True, False), np.errstate(all="raise"),
        called(torch.set_default_dtype, torch.float64, torch.float32),
        torch.autocast("cpu", dtype=torch.bfloat16), called(torch.set_num_threads, 2, 1),
        called(torch.use_deterministic_algorithms, True, False)],
}


def seen():
    """What a caller sees of the settings."""
    with contextlib.suppress(RuntimeError):  # where it has mixed the old with the new
        yield torch.get_float32_matmul_precision()
    for part in (backends, backends.mkldnn, backends.mkldnn.conv, backends.mkldnn.matmul,
                 backends.cudnn.conv, backends.cuda.matmul):
        yield part.fp32_precision
    yield from (backends.mkldnn.enabled, backends.cudnn.benchmark, backends.cudnn.deterministic)
    yield from (torch.zeros(1).device, torch.zeros(1).dtype, torch.get_num_threads(), np.geterr())
    yield from (torch.is_autocast_enabled("cpu"), torch.is_grad_enabled())
    yield torch.is_inference_mode_enabled()
    yield torch.are_deterministic_algorithms_enabled()
    yield (torch.full((1,), 1e-40, dtype=torch.float32, device="cpu") * 1).item()


@pytest.mark.parametrize("caller", CALLERS)
def test_what_the_caller_has_set_changes_no_byte_and_is_kept(caller, expected, tmp_path):
    with contextlib.ExitStack() as stack:
        for context in CALLERS[caller]():
            stack.enter_context(context)
        before = list(seen())
        assert log_of(tmp_path / "run") == expected
        assert list(seen()) == before


def test_deterministic_is_a_setting_of_the_run():
    with settings(Config(device="cpu", threads=1, deterministic=True, loss_backend="reference")):
        assert torch.are_deterministic_algorithms_enabled() and not backends.cudnn.benchmark
    assert not torch.are_deterministic_algorithms_enabled()


# The surroundings of a process.


def command(folder, *options):
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in CONFIG.items()]
    return shlex.join([sys.executable, "epbt.py", *arguments, f"--out={folder}", *options])


def carried_out(script, **environment):
    return subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, **environment})


READ_ONLY = "mount -t tmpfs -o ro none /dev/shm && "
SMALL = "mount -t tmpfs -o size=8k none /dev/shm && "
ABSENT = ("n=$(mktemp -d) && mount -t tmpfs none $n && for d in null zero urandom random; do "
          "touch $n/$d && mount --bind /dev/$d $n/$d; done; mount --rbind $n /dev && ")


@pytest.mark.parametrize("before, said", [
    (READ_ONLY, "Read-only"), (ABSENT, "No such file"), (SMALL, "unable to allocate shared memory"),
], ids=["read-only", "absent", "small"])
def test_without_shared_memory_workers_are_refused_in_one_line(before, said, tmp_path):
    if os.geteuid() or not can_mount():
        pytest.skip("needs the right to mount")
    script = before + "exec " + command(tmp_path / "run", "--workers=2")
    done = carried_out(f"unshare -m bash -c {shlex.quote(script)}")
    last = done.stderr.splitlines()[-1]  # after a warning of joblib's
    assert done.returncode == 2 and re.fullmatch(
        f"epbt.py: cannot start a worker process: .*{said}.*; use --workers 1, or .* "
        "docker run --shm-size", last)


def test_a_long_tmpdir_is_named_where_workers_need_it_and_no_matter_elsewhere(expected, tmp_path):
    long = tmp_path / ("x" * 100)
    long.mkdir()
    done = carried_out(command(tmp_path / "two", "--workers=2"), TMPDIR=str(long))
    said = rf"epbt.py: cannot start worker processes, .* TMPDIR, {long}: .*, or --workers 1\n"
    assert done.returncode == 2 and re.fullmatch(said, done.stderr)
    done = carried_out(command(tmp_path / "one"), TMPDIR=str(long))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "one" / "log.jsonl").read_bytes() == expected


def within_a_pool(workers, folder):
    try:
        return log_of(folder, workers=workers)
    except RunError as error:
        return str(error)


def test_a_daemon_trains_by_itself_and_is_told_that_it_can_have_no_workers(expected, tmp_path):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        alone = pool.apply(within_a_pool, (1, tmp_path / "1"))
        said = pool.apply(within_a_pool, (2, tmp_path / "2"))
    assert alone == expected
    assert re.fullmatch("cannot start a worker process: daemonic .*; use --workers 1.*", said)


@pytest.mark.parametrize("name, after, environment", [
    ("é", "2>&-", {"PYTHONIOENCODING": "ascii"}),
    ("run", "", {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"})],
    ids=["stderr is closed and stdout is ASCII", "a locale without UTF-8"])
def test_a_run_goes_on_where_it_cannot_say_all(name, after, environment, expected, tmp_path):
    done = carried_out(f"{command(tmp_path / name)} {after}", **environment)
    assert done.returncode == 0 and "evaluations" in done.stdout, done.stdout + done.stderr
    assert (tmp_path / name / "log.jsonl").read_bytes() == expected
    page = (tmp_path / name / "report.html").read_text(encoding="utf-8")
    assert f"<title>{name}, seed 0" in page and "<svg" in page
