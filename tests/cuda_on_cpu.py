"""The CUDA sources, built for a CPU: torch.ops.emulated has the operators of torch.ops.taylorglo,
with the kernels for a GPU in the place of those for a CPU. See cuda_on_cpu.h."""

import re
import tempfile
from functools import cache
from pathlib import Path
from unittest import mock

from taylorglo_ext import build

FLAGS = ("-O1", "-march=native", "-fopenmp", "-Wno-psabi", "-Wno-unknown-pragmas",
         "-U_FORTIFY_SOURCE")  # which takes a jump to another stack for an error
SOURCES = [name for names in build.SOURCES.values() for name in names]


def shared(declaration):
    """The statements for "float a[2], b[kFew]" in shared memory."""
    names = [name.split()[-1] for name in re.sub(r"\[[^]]*\]", "", declaration).split(",")]
    calls = " ".join(f"cuda_on_cpu::declare({name});" for name in names)
    return f"static {declaration}; {calls}"


REPLACED = [
    (r"#include <(c10/cuda/|cuda_).*", '#include "cuda_on_cpu.h"'),
    (r"\btaylorglo\b(?!(_cuda)?\.(h|cpp|cu))", "emulated"),
    (r"(TORCH_LIBRARY_IMPL\(\w+, )CPU", r"\1XLA"),  # a device that nobody has
    (r"(TORCH_LIBRARY_IMPL\(\w+, )CUDA", r"\1CPU"),
    (r"extern __shared__ .* (\w+)\[\];",
     r"unsigned char* \1 = cuda_on_cpu::block.dynamic_shared.data();"),
    (r"__shared__ ([^;]*);", lambda found: shared(found[1])),
    (r"(\w+(?:<[\w, ]*>)?)\s*<<<([^;]*?)>>>(\([^;]*\));",
     r"cuda_on_cpu::launch(\2, [&] { \1\3; });"),
]


@cache
def load_emulated():
    """Build the library, unless the cache has it, and load it. Raises BackendError."""
    with tempfile.TemporaryDirectory() as folder:
        header = Path(__file__).with_suffix(".h")
        for path in [header, *filter(Path.is_file, build._folder.iterdir())]:
            text = path.read_text(encoding="utf-8")
            for pattern, replacement in REPLACED if path != header else ():
                text = re.sub(pattern, replacement, text)
            Path(folder, compiled(path.name)).write_text(text, encoding="utf-8")
        with mock.patch.multiple(
                build, _folder=Path(folder), _loaded=set(), CXX_FLAGS=FLAGS,
                SOURCES={"cpu": [compiled(name) for name in SOURCES]},
                HEADERS=(*build.HEADERS, header.name)):
            build.load_library("cpu")


def compiled(name):
    return name.replace(".cu", "_cu.cpp") if name.endswith(".cu") else name
