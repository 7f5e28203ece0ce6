"""Building the fused loss, and what happens where that fails."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from taylorglo_ext import BackendError, build, load, taylorglo_loss

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def backend_afterwards():
    yield
    load("auto")


def run_python(code, cache, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, start_new_session=True,
        stderr=subprocess.PIPE, text=True,
        env={**os.environ, "TORCH_EXTENSIONS_DIR": str(cache), **environment},
    )  # fmt: skip


def test_a_killed_build_does_not_block_the_next(tmp_path):
    code = "import taylorglo_ext; taylorglo_ext.load('fused')"
    killed = run_python(code, tmp_path)
    while not list(tmp_path.glob("taylorglo/*.building-*/*.ninja")):
        assert killed.poll() is None
        time.sleep(0.05)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    _, progress = run_python(code, tmp_path).communicate(timeout=120)
    assert "building" in progress
    (library,) = tmp_path.glob("taylorglo/*.so")
    assert not list(tmp_path.glob("taylorglo/*.building-*"))
    _, progress = run_python(code, tmp_path).communicate(timeout=60)
    assert "building" not in progress


@contextlib.contextmanager
def nothing_loaded(monkeypatch, cache, **environment):
    with monkeypatch.context() as patch:
        patch.setattr(build, "_loaded", set())
        patch.setenv("TORCH_EXTENSIONS_DIR", str(cache))
        for name, value in environment.items():
            patch.setenv(name, value)
        yield


def test_without_a_compiler(monkeypatch, tmp_path):
    with nothing_loaded(monkeypatch, tmp_path, CXX="no-such-compiler"):
        with pytest.raises(BackendError, match="no C.. compiler .*install"):
            load("fused")
        with pytest.warns(UserWarning, match="reference.* install"):
            assert load("auto") == "reference"
        taylorglo_loss(torch.zeros(3, 4), torch.tensor([0, 1, 2]), torch.zeros(8))
    for arguments, error, message in (
        (("fast",), ValueError, "backend"),
        (("auto", "tpu"), ValueError, "device"),
    ):
        with pytest.raises(error, match=message):
            load(*arguments)


@pytest.mark.parametrize(
    "damage", [lambda data: data[:20000], lambda data: data[:-1000] + bytes(1000), lambda data: b""]
)
def test_a_damaged_library_is_not_loaded(monkeypatch, tmp_path, damage):
    good = build.cached_library("cpu").read_bytes()
    with nothing_loaded(monkeypatch, tmp_path):
        library = build.cached_library("cpu")
        library.parent.mkdir()
        library.write_bytes(good)
        library.with_suffix(".sha256").write_text(build.checksum(library))
        assert build.is_whole(library)
        library.write_bytes(damage(good))
        monkeypatch.setattr(build, "build", lambda target, library: rebuilt.append(library))
        rebuilt = []
        build.load_library("cpu")
        assert rebuilt == [library]


def test_a_failed_build_says_so_in_one_line(monkeypatch, tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text(
        "#!/bin/sh\n"
        "case $1 in --version|-dumpversion|-dumpfullversion) exec c++ $@ ;; esac\n"
        "echo 'x.cpp:1: error: out of order' >&2; exit 1\n"
    )
    compiler.chmod(0o755)
    with nothing_loaded(monkeypatch, tmp_path / "cache", CXX=str(compiler)):
        with pytest.raises(BackendError, match="out of order") as caught:
            load("fused")
    assert "\n" not in str(caught.value) and caught.value.__cause__ is not None
    assert not list(tmp_path.glob("cache/taylorglo/*building*"))


@pytest.mark.skipif(build.cuda_home() is None, reason="needs nvcc")
def test_cuda_source_compiles_without_a_warning(tmp_path):
    code = (
        "import sys, pathlib; from taylorglo_ext import build; build.load_library('cpu');"
        "build.build('cuda', pathlib.Path(sys.argv[1]) / 'taylorglo_cuda.so',"
        " ('-Werror=all-warnings', '-Xcompiler=-Wall,-Werror'))"
    )
    environment = {**os.environ, "TORCH_CUDA_ARCH_LIST": "8.0;9.0"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "taylorglo_cuda.so").exists()
