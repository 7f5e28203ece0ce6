"""The server from which worker processes are forked: it has imported PyTorch, but has no thread and
no CUDA context. It imports nothing of PyTorch itself, so that epbt.py can start it first.
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

UNGUARDED = 76  # the exit code of a worker that came upon evolve() as it imported the user's script


def start_early():
    """Start the server if that can be done. If not, start_server tells once workers are needed."""
    with suppress(RunError):
        start_server()


def start_server():
    """Start the server, which then imports PyTorch in the background; once more does nothing.
    Returns multiprocessing's context. Raises RunError."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):  # as multiprocessing asks
        os._exit(UNGUARDED)
    context = multiprocessing.get_context("forkserver")
    # torch by its own name too: before Python 3.13 the server looks for modules in the working
    # directory only, and so may not find ours.
    context.set_forkserver_preload(["torch", "training"])
    main = sys.modules["__main__"]
    if not os.path.isfile(getattr(main, "__file__", None) or ""):
        vars(main).pop("__file__", None)  # "<stdin>", which workers would try to import
    if threading.current_thread() is not threading.main_thread():
        return context  # signals are not its business
    # Ctrl-C reaches every process of a terminal, and is the parent's to handle. The server and its
    # workers ignore it from their first instruction, as they inherit it.
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        forkserver.ensure_running()
    except OSError as error:
        raise RunError(f"cannot start worker processes, whose socket cannot be made in TMPDIR, "
                       f"{tempfile.gettempdir()}: {error}; use a shorter one, or --workers 1"
                       ) from error
    finally:
        signal.signal(signal.SIGINT, handler)
    return context
