"""Builds the fused operator just in time, once per machine, and loads it.

A build has a folder of its own and a lock that the operating system drops with its process, and the
library goes into the cache when it is complete. So a killed build leaves nothing to wait for.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

SOURCES = {"cpu": ("taylorglo.cpp",),
           "cuda": ("taylorglo_cuda.cpp", "taylorglo.cu", "norm_relu.cpp", "norm_relu.cu")}
HEADERS = ("taylorglo.h", "taylorglo_cuda.h", "operator.h", "norm_relu.h", "packed.h")
CXX_FLAGS = ("-O3", "-march=native", "-fopenmp", "-Wno-psabi")  # psabi: a note on vector arguments

_folder = Path(__file__).parent
_loaded: set[str] = set()


class BackendError(RuntimeError):
    """The fused loss cannot be had here; the message says what is missing and what to install."""


def load_library(device: str) -> None:
    """Register the operator for "cpu", or for "cpu" and "cuda", building what the cache lacks."""
    for target in ("cpu",) if device == "cpu" else ("cpu", "cuda"):
        if target in _loaded:
            continue
        try:
            _load_target(target)
        except BackendError:
            raise
        except (OSError, RuntimeError, subprocess.SubprocessError) as error:
            line = _first_error(error)
            raise BackendError(f"the fused {target} operator could not be built: {line}") from error
        _loaded.add(target)


def _load_target(target: str) -> None:
    if target == "cuda" and not torch.cuda.is_available():
        raise BackendError("PyTorch sees no CUDA device; check the driver and PyTorch's build")
    library = cached_library(target)
    if not _is_whole(library):
        require_compilers(target)
        with _only_builder(library):
            if not _is_whole(library):
                return build(target, library)  # which also loads it
    torch.ops.load_library(library)


def _is_whole(library: Path) -> bool:
    """Whether the library is as it was built: to load one that was cut off kills the process."""
    try:
        return library.with_suffix(".sha256").read_text(encoding="utf-8") == _seal(library)
    except OSError:
        return False


def _seal(library: Path) -> str:
    data = library.read_bytes()
    return f"{hashlib.sha256(data).hexdigest()} {len(data)}"


def cached_library(target: str) -> Path:
    """Where the library for this machine is, or will be: its name says what it depends on."""
    parts = [torch.__version__, str(torch.version.cuda), platform.machine()]
    parts += [os.environ.get("CXX", ""), _processor()]
    sources = (*HEADERS, *SOURCES[target], Path(__file__).name)
    parts += [(_folder / name).read_text(encoding="utf-8") for name in sources]
    parts += [_architectures() if target == "cuda" else ""]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or os.path.join(caches, "torch_extensions")
    return Path(root).expanduser() / "taylorglo" / f"taylorglo_{target}_{key}.so"


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    says = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(says)}))


def _architectures() -> str:
    """The compute capabilities to build for: TORCH_CUDA_ARCH_LIST, or the visible GPUs'."""
    visible = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    named = ";".join(f"{major}.{minor}" for major, minor in sorted(visible))
    return os.environ.get("TORCH_CUDA_ARCH_LIST") or named


def require_compilers(target: str) -> None:
    """Raise BackendError, saying what to install, unless the tools for `target` are there."""
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        raise BackendError(f"no C++ compiler ({compiler}); install one (Debian: apt install g++)")
    if shutil.which("ninja", path=_search_path()) is None:
        raise BackendError("no ninja; install it (pip install ninja)")
    if target == "cuda" and cuda_home() is None:
        toolkit = f"CUDA toolkit {torch.version.cuda}"
        raise BackendError(f"no CUDA compiler (nvcc); install the {toolkit} or set CUDA_HOME")


def _search_path() -> str:
    """PATH and the folder of this Python, where pip puts ninja, activated or not."""
    return os.pathsep.join([os.environ.get("PATH", os.defpath), os.path.dirname(sys.executable)])


def cuda_home() -> str | None:
    """The toolkit's folder, asked of nvcc: the one on the PATH may be a script outside of it."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    folders = (home and os.path.join(home, "bin"), "/usr/local/cuda/bin")
    nvcc = next(filter(None, (shutil.which("nvcc", path=folder) for folder in folders)), None)
    if nvcc is None:
        return None
    command = [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull]
    answer = subprocess.run(command, capture_output=True, text=True)
    top = re.search(r"^#\$ TOP=(.+)$", answer.stdout + answer.stderr, re.MULTILINE)
    return os.path.realpath(top[1].strip()) if top else None


def build(target: str, library: Path, extra_cuda_flags: tuple[str, ...] = ()) -> None:
    """Compile the sources for `target`, load the result, and put it at `library`."""
    folder = tempfile.mkdtemp(prefix=f"{library.stem}.building-", dir=library.parent)
    try:
        what = f"taylorglo_ext: building the fused {target} loss, once: about a minute"
        print(what, file=sys.stderr, flush=True)
        with _toolchain(target) as load:
            load(
                library.stem, [str(_folder / name) for name in SOURCES[target]],
                extra_cflags=[*CXX_FLAGS], extra_ldflags=["-fopenmp"],
                extra_cuda_cflags=["-O3", "--threads=2", *extra_cuda_flags],
                build_directory=folder, is_python_module=False,
            )  # fmt: skip
        os.rename(os.path.join(folder, library.name), library)
        library.with_suffix(".sha256").write_text(_seal(library), encoding="utf-8")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _only_builder(library: Path) -> Iterator[None]:
    """Hold the lock on `library`, and clear away what killed builds left."""
    library.parent.mkdir(parents=True, exist_ok=True)
    with open(library.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for leftover in library.parent.glob(f"{library.stem}.building-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        yield


@contextlib.contextmanager
def _toolchain(target: str) -> Iterator:
    """torch.utils.cpp_extension.load, with the right PATH and CUDA_HOME while it runs."""
    saved = dict(os.environ)
    os.environ["PATH"] = _search_path()
    if target == "cuda":
        os.environ |= {"CUDA_HOME": cuda_home(), "TORCH_CUDA_ARCH_LIST": _architectures()}
    try:
        # It would say where it guesses CUDA.
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        from torch.utils import cpp_extension

        cpp_extension.CUDA_HOME = os.environ.get("CUDA_HOME")
        yield cpp_extension.load
    finally:
        os.environ.clear()
        os.environ.update(saved)


def _first_error(error: Exception) -> str:
    """The first line of a compiler's output that says what is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [repr(error)]
    return next((line for line in lines if re.search(r"\berror\b", line)), lines[0])
