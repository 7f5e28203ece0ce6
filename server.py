"""Starts the server that forks worker processes. The server has imported PyTorch, but has no thread
and no CUDA context. This file imports no PyTorch, so epbt.py can start the server first of all.
"""

import multiprocessing
import os
import signal
import sys
import tempfile
import threading
from contextlib import suppress
from multiprocessing import forkserver

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
    # torch too: before Python 3.13 the server searches only the working directory for modules, so
    # it may not find ours.
    context.set_forkserver_preload(["torch", "training"])
    main = sys.modules["__main__"]
    if not os.path.isfile(getattr(main, "__file__", None) or ""):
        vars(main).pop("__file__", None)  # "<stdin>", which workers would try to import
    if threading.current_thread() is not threading.main_thread():
        return context  # only the main thread may change signal handlers
    # Ctrl-C reaches every process of a terminal, but only the parent should handle it. The server
    # and its workers inherit that it is ignored.
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        forkserver.ensure_running()
    except OSError as error:
        raise RunError("cannot start worker processes, whose socket cannot be made in TMPDIR, "
                       f"{tempfile.gettempdir()}: {error}; use a shorter one, or --workers 1"
                       ) from error
    finally:
        signal.signal(signal.SIGINT, handler)
    return context
