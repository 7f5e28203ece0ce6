"""Building the fused loss, and what happens where that fails."""

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


def run_python(code, *arguments, **environment):
    return subprocess.Popen([sys.executable, "-c", code, *arguments], cwd=ROOT, text=True,
                            start_new_session=True, stderr=subprocess.PIPE,
                            env={**os.environ, **environment})


def test_a_killed_build_does_not_block_the_next(tmp_path):
    def load_fused():
        return run_python("import taylorglo_ext; taylorglo_ext.load('fused')",
                          TORCH_EXTENSIONS_DIR=str(tmp_path))

    killed = load_fused()
    while not list(tmp_path.glob("taylorglo/*.building-*/*.ninja")):
        assert killed.poll() is None
        time.sleep(0.05)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert "building" in load_fused().communicate(timeout=120)[1]
    (library,) = tmp_path.glob("taylorglo/*.so")
    assert not list(tmp_path.glob("taylorglo/*.building-*"))
    assert "building" not in load_fused().communicate(timeout=60)[1]


@pytest.fixture
def nothing_loaded(monkeypatch, tmp_path):
    """As in a new process with an empty cache."""
    monkeypatch.setattr(build, "_loaded", set())
    with monkeypatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
        yield patch


def test_without_a_compiler(nothing_loaded):
    nothing_loaded.setenv("CXX", "no-such-compiler")
    with pytest.raises(BackendError, match="no C.. compiler .*install"):
        load("fused")
    with pytest.warns(UserWarning, match="reference.* install"):
        assert load("auto") == "reference"
    taylorglo_loss(torch.zeros(3, 4), torch.tensor([0, 1, 2]), torch.zeros(8))


@pytest.mark.parametrize("arguments, name", [(("fast",), "backend"), (("auto", "tpu"), "device")])
def test_what_load_does_not_take_is_named(arguments, name):
    with pytest.raises(ValueError, match=f"{name}: expected .* got '{arguments[-1]}'"):
        load(*arguments)


good = build.cached_library("cpu")


@pytest.mark.parametrize("damage", [
    lambda data: data[:20000], lambda data: data[:-1000] + bytes(1000), lambda data: b""])
def test_a_damaged_library_is_not_loaded(nothing_loaded, damage):
    rebuilt, library = [], build.cached_library("cpu")
    library.parent.mkdir(parents=True)
    library.write_bytes(good.read_bytes())
    library.with_suffix(".sha256").write_text(build.checksum(library))
    assert build.is_whole(library)
    library.write_bytes(damage(good.read_bytes()))
    nothing_loaded.setattr(build, "build", lambda target, library: rebuilt.append(library))
    build.load_library("cpu")
    assert rebuilt == [library]


def test_a_failed_build_says_so_in_one_line(nothing_loaded, tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\n"
                        "case $1 in --version|-dumpversion|-dumpfullversion) exec c++ $@ ;; esac\n"
                        "echo 'x.cpp:1: error: out of order' >&2; exit 1\n")
    compiler.chmod(0o755)
    nothing_loaded.setenv("CXX", str(compiler))
    with pytest.raises(BackendError, match="out of order") as caught:
        load("fused")
    assert "\n" not in str(caught.value) and caught.value.__cause__ is not None
    assert not list(tmp_path.glob("cache/taylorglo/*building*"))


def test_pytorchs_folder_may_have_a_space_in_its_name(monkeypatch):
    monkeypatch.setattr(torch.utils.cpp_extension, "TORCH_LIB_PATH", "/a b/torch/lib")
    for _ in range(2):
        with build.toolchain("cpu"):
            assert torch.utils.cpp_extension.TORCH_LIB_PATH == "'/a b/torch/lib'"


@pytest.mark.skipif(build.cuda_home() is None, reason="needs nvcc")
def test_cuda_source_compiles_without_a_warning(tmp_path):
    code = ("import sys, pathlib; from taylorglo_ext import build; build.load_library('cpu');"
            "build.build('cuda', pathlib.Path(sys.argv[1]) / 'taylorglo_cuda.so',"
            " ('-Werror=all-warnings', '-Xcompiler=-Wall,-Werror'))")
    building = run_python(code, str(tmp_path), TORCH_CUDA_ARCH_LIST="8.0;9.0")
    said = building.communicate()[1]
    assert building.returncode == 0, said[-3000:]
    assert (tmp_path / "taylorglo_cuda.so").exists()
