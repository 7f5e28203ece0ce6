"""Builds the fused operator just in time, once per machine, and loads it.

A build has its own folder, its lock ends with its process, and only a complete library goes into
the cache. So nothing waits for a build that was killed.
"""

import fcntl
import hashlib
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import torch

SOURCES = {"cpu": ("taylorglo.cpp",),
           "cuda": ("taylorglo_cuda.cpp", "taylorglo.cu", "norm_relu.cpp", "norm_relu.cu")}
HEADERS = ("taylorglo.h", "taylorglo_cuda.h", "operator.h", "norm_relu.h", "packed.h")
CXX_FLAGS = ("-O3", "-march=native", "-fopenmp", "-Wno-psabi")  # no note on vector arguments

_folder = Path(__file__).parent
_loaded = set()


class BackendError(RuntimeError):
    """The fused loss does not work here. The message says what is missing and what to install."""


def load_library(device):
    """Register the operator for "cpu", for "cuda" on both; build what the cache lacks."""
    for target in ("cpu",) if device == "cpu" else ("cpu", "cuda"):
        if target in _loaded:
            continue
        if target == "cuda" and not torch.cuda.is_available():
            raise BackendError("PyTorch sees no CUDA device; check the driver and PyTorch's build")
        try:
            library = cached_library(target)
            if is_whole(library) or not build_alone(target, library):
                torch.ops.load_library(library)
        except (OSError, RuntimeError, subprocess.SubprocessError) as error:
            # Of a compiler's output, the first line of the most telling kind.
            lines = str(error).strip().splitlines() or [repr(error)]
            told = (line for kind in ("error: (?!ld)", "cannot find", r"\berror\b", "")
                    for line in lines if re.search(kind, line))
            said = next(told)
            raise BackendError(f"the fused {target} operator could not be built: {said.strip()}"
                               ) from error
        _loaded.add(target)


def cached_library(target):
    """The path of the library for this machine. Its name has a hash of all that it depends on."""
    parts = [torch.__version__, str(torch.version.cuda), os.environ.get("CXX", ""), processor(),
             architectures() if target == "cuda" else ""]
    sources = (*HEADERS, *SOURCES[target], Path(__file__).name)
    parts += [(_folder / name).read_text(encoding="utf-8") for name in sources]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or os.path.join(caches, "torch_extensions")
    return Path(root).expanduser() / "taylorglo" / f"taylorglo_{target}_{key}.so"


def processor():
    """What -march=native depends on."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    says = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(says)}))


def architectures():
    """The compute capabilities to build for: TORCH_CUDA_ARCH_LIST, or the visible GPUs'."""
    visible = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    named = ";".join(f"{major}.{minor}" for major, minor in sorted(visible))
    return os.environ.get("TORCH_CUDA_ARCH_LIST") or named


def checksum(library):
    return hashlib.sha256(library.read_bytes()).hexdigest()


def is_whole(library):
    """Whether the library has its checksum: loading one that was cut off kills the process."""
    try:
        return library.with_suffix(".sha256").read_text(encoding="utf-8") == checksum(library)
    except OSError:
        return False


def build_alone(target, library):
    """Build under a lock, unless another process has built it meanwhile. Returns whether it did."""
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        raise FileNotFoundError(f"no C++ compiler ({compiler}); install one (Debian: apt install "
                                "g++)")
    library.parent.mkdir(parents=True, exist_ok=True)
    with open(library.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for left_by_killed_builds in library.parent.glob(f"{library.stem}.building-*"):
            shutil.rmtree(left_by_killed_builds, ignore_errors=True)
        if is_whole(library):
            return False
        build(target, library)
        return True


def build(target, library, extra_cuda_flags=()):
    """Compile the sources for `target`, load the result, and put it at `library`."""
    print(f"taylorglo_ext: building the fused {target} loss, once: about a minute", file=sys.stderr,
          flush=True)
    with (tempfile.TemporaryDirectory(prefix=f"{library.stem}.building-", dir=library.parent,
                                      ignore_cleanup_errors=True) as folder,
          toolchain(target) as load):
        load(library.stem, [str(_folder / name) for name in SOURCES[target]],
             extra_cflags=[*CXX_FLAGS], extra_ldflags=["-fopenmp"],
             extra_cuda_cflags=["-O3", "--threads=2", *extra_cuda_flags],
             build_directory=folder, is_python_module=False)
        os.rename(os.path.join(folder, library.name), library)
        library.with_suffix(".sha256").write_text(checksum(library), encoding="utf-8")


@contextmanager
def toolchain(target):
    """Yields torch.utils.cpp_extension.load, which within it finds ninja and the CUDA toolkit."""
    before = dict(os.environ)
    # pip puts ninja beside this Python, also if the environment is not activated.
    os.environ["PATH"] = os.pathsep.join([before.get("PATH", os.defpath),
                                          os.path.dirname(sys.executable)])
    if target == "cuda":
        os.environ["TORCH_CUDA_ARCH_LIST"] = architectures()
    try:
        # Do not print where PyTorch guesses CUDA.
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        from torch.utils import cpp_extension

        cpp_extension.CUDA_HOME = cuda_home()  # for None, load raises an error
        if not cpp_extension.TORCH_LIB_PATH.startswith("'"):  # ninja's file names it without quotes
            cpp_extension.TORCH_LIB_PATH = shlex.quote(cpp_extension.TORCH_LIB_PATH)
        yield cpp_extension.load
    finally:
        os.environ.clear()
        os.environ.update(before)


def cuda_home():
    """The CUDA toolkit's folder, or None. The nvcc on the PATH may be a script elsewhere."""
    nvcc = os.path.realpath(shutil.which("nvcc") or "")
    homes = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"),
             os.path.dirname(os.path.dirname(nvcc)), "/usr/local/cuda")
    return next((os.path.realpath(home) for home in homes if home
                 and os.path.isfile(f"{home}/bin/nvcc")
                 and os.path.exists(f"{home}/include/cuda_runtime.h")), None)
