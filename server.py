"""Starts the server that forks worker processes. The server has imported PyTorch, but runs nothing
and has no CUDA context. This file imports no PyTorch, so epbt.py can start the server first of all.
"""

import multiprocessing
import os
import signal
import sys
import tempfile
import threading
from contextlib import contextmanager, suppress
from multiprocessing import forkserver
from pathlib import Path

from errors import RunError

UNGUARDED = 76  # the exit code of a worker that met evolve() while it imported the user's script


def start_early():
    """Start the server if possible. If not, start_server raises when workers are needed."""
    with suppress(RunError):
        start_server()


def start_server():
    """Start the server if there is none; it imports PyTorch in the background. Returns
    multiprocessing's context. Raises RunError."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):  # in a starting worker
        os._exit(UNGUARDED)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["training"])
    main = sys.modules["__main__"]
    if not os.path.isfile(getattr(main, "__file__", None) or ""):
        vars(main).pop("__file__", None)  # "<stdin>", which workers would try to import
    if threading.current_thread() is not threading.main_thread():
        return context  # only the main thread may change signal handlers
    # Ctrl-C reaches every process of a terminal, but only the parent should handle it. The server
    # and its workers inherit that it is ignored.
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with our_files_first():
            forkserver.ensure_running()
    except OSError as error:
        raise RunError("cannot start worker processes, whose socket cannot be made in TMPDIR, "
                       f"{tempfile.gettempdir()}: {error}; use a shorter one, or --workers 1"
                       ) from error
    finally:
        signal.signal(signal.SIGINT, handler)
    return context


@contextmanager
def our_files_first():
    """Within it, a new process finds our modules, from any working directory, and not files there
    that are called alike. Before Python 3.13 the server does not get this process's sys.path."""
    names = "PYTHONPATH", "PYTHONSAFEPATH"
    before = [os.environ.get(name, "") for name in names]
    path = os.pathsep.join(filter(None, (str(Path(__file__).parent), before[0])))
    os.environ.update(zip(names, (path, "1"), strict=True))
    try:
        yield
    finally:
        os.environ.update(zip(names, before, strict=True))  # Python takes "" as not set
