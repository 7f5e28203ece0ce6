"""Where evaluations run: in this process or in worker processes. cluster.py is for Ray.

"Since the evaluation of an individual does not depend on other individuals, the entire EPBT process
can be parallelized" (Sec. 3.1). So on a CPU a run gives the same bits for any number of workers.
Workers read weights from the run's folder and images from shared memory, into which PyTorch moves
tensors for another process. Tasks and scores go through a pipe.

A worker on a CPU is a process; a single worker is this process. A GPU has one process with several
slots (slots.py).
"""

import ctypes
import os
import signal
import sys
import threading
from collections import Counter, deque
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import connection, parent_process

import numpy as np
import torch

from errors import ConfigError, DataError, RunError, message
from records import RunFolder
from server import UNGUARDED, start_server
from settings import settings
from taylorglo_ext import BackendError
from training import Task, Trainer

KNOWN = ConfigError, DataError, RunError, BackendError  # errors that a user can mend
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
ATTEMPTS = 3  # how often a task is tried if its worker dies
OUT_OF_MEMORY = 75  # the exit code of a worker whose GPU had no memory left
PATIENCE = 10  # seconds for a worker to exit after it has closed its pipe


@dataclass
class Workers:
    """Evaluates individuals, but those that an interrupted run has in its folder."""

    pool: object  # a ThisProcess, Processes or cluster.RayPool
    folder: RunFolder
    progress: object  # has tqdm's update(n)

    def evaluate(self, individuals, teacher=None, alpha=0.0):
        """Alg. 1, step 3a: train and score individuals. Returns them in the same order."""
        evaluated = {m.id: found for m in individuals if (found := self.folder.recall(m))}
        self.progress.update(len(evaluated))
        path = self.folder.individual_path
        tasks = [Task(m, path(m.id), None if m.parent is None else path(m.parent),
                      teacher and path(teacher.id), alpha)
                 for m in individuals if m.id not in evaluated]
        for individual in self.pool.run(tasks):
            evaluated[individual.id] = individual
            self.progress.update(1)
        return [evaluated[m.id] for m in individuals]


class ThisProcess:
    """The pool of this process: one worker on the CPU, or the slots of the first GPU."""

    def __init__(self, config, data):
        keep_freed_memory()
        config = replace(config, device=config.device.replace("cuda", "cuda:0"))
        with ExitStack() as stack:
            stack.enter_context(settings(config))
            if config.device == "cpu":
                self.run = partial(map, Trainer(config, data).evaluate)
            else:
                from slots import discard, in_turns, make_slots  # here, as only a GPU needs it

                slots = make_slots(config, data.to(config.device), config.workers)
                stack.callback(discard, slots)
                self.run = partial(in_turns, slots)
            self.close = stack.pop_all().close


class Processes:
    """A pool of worker processes, started once a run."""

    def __init__(self, config, data, count):
        """count: of individuals evaluated at once; 0: each GPU finds its best number."""
        self.context, self.data, self.workers = start_server(), data, []
        if config.device == "cpu":
            places = [("cpu", 1)] * count
        else:
            parts = map(len, np.array_split(range(count), torch.cuda.device_count()))
            places = [(f"cuda:{i}", slots) for i, slots in enumerate(parts) if slots or count == 0]
        with ExitStack() as stack:
            stack.callback(self.close)
            for device, slots in places:
                own = replace(config, device=device)
                self.workers.append(WorkerProcess(self.context, own, data, slots))
            for worker in self.workers:  # 1 if it died: run() replaces it
                worker.slots = worker.slots or worker.answer() or 1
            stack.pop_all()

    def run(self, tasks):
        """Yields each task's individual when it is done, in any order."""
        waiting, attempts = deque(tasks), Counter()
        while waiting or any(worker.tasks for worker in self.workers):
            # The next task goes to the worker with the fewest, so that all GPUs share the work.
            while waiting and (free := [w for w in self.workers if len(w.tasks) < w.slots]):
                min(free, key=lambda worker: len(worker.tasks)).give(waiting.popleft())
            busy = {worker.pipe: worker for worker in self.workers if worker.tasks}
            for pipe in connection.wait(list(busy)):
                worker = busy[pipe]
                if (individual := worker.answer()) is None:
                    waiting.extendleft(worker.tasks.values())
                    self.replace(worker, attempts)
                else:
                    del worker.tasks[individual.id]
                    yield individual

    def replace(self, worker, attempts):
        """Start a worker in the place of one that died; with one slot less if the GPU's memory was
        too small."""
        self.workers.remove(worker)
        slots, ids, code = worker.slots, sorted(worker.tasks), worker.process.exitcode
        if code == UNGUARDED:
            raise RunError("worker processes import the script that calls evolve(): the call must "
                           'stand under if __name__ == "__main__":')
        if code == OUT_OF_MEMORY:
            slots -= 1
            if slots == 0 and not self.workers:
                raise RunError(f"individual {ids[0]} does not fit the GPU's memory, even alone: "
                               "use a smaller --batch-size or --model, or free the GPU")
            print(f"out of memory on {worker.config.device}: going on with {slots or 'no'} of its "
                  "slots", file=sys.stderr)
            if slots == 0:
                return
        else:
            how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            attempts.update(ids)
            worst = max(ids, key=attempts.get)
            if attempts[worst] == ATTEMPTS:
                raise RunError(f"individual {worst} could not be evaluated: its worker died "
                               f"{ATTEMPTS} times, the last time with {how}")
            print(f"a worker died with {how}; individual {', '.join(map(str, ids))} is evaluated "
                  "again", file=sys.stderr)
        self.workers.append(WorkerProcess(self.context, worker.config, self.data, slots))

    def close(self):
        for worker in self.workers:
            worker.process.kill()
            worker.process.join()


class WorkerProcess:
    """One process of the pool, seen from the parent."""

    def __init__(self, context, config, data, slots):
        """slots: how many tasks it has at once; 0: it finds the best number and answers it."""
        self.config, self.tasks, self.slots = config, {}, slots
        self.pipe, theirs = context.Pipe()
        arguments = config, data, slots, theirs
        self.process = context.Process(target=serve, args=arguments, daemon=True)
        try:
            self.process.start()
        except (OSError, EOFError, AssertionError, RuntimeError) as error:
            reason = message(error) or "the server that forks them is gone"
            raise RunError(f"cannot start a worker process: {reason}; use --workers 1, or where "
                           "/dev/shm is too small docker run --shm-size") from error
        theirs.close()  # now the worker's death closes the pipe

    def give(self, task):
        self.tasks[task.individual.id] = task
        try:
            self.pipe.send(task)
        except OSError:
            pass  # it died while idle, and answer() will return None

    def answer(self):
        """What the worker sends: an evaluated individual, or its number of slots; None if it died.
        Raises the worker's error if it is one of KNOWN."""
        try:
            answer = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join(PATIENCE)
            self.process.kill()  # a worker can hang in its exit if its GPU has failed
            self.process.join()
            return None
        if isinstance(answer, Exception):
            raise answer
        return answer


def serve(config, data, slots, pipe):
    """The worker process: evaluate the tasks that come through the pipe until the parent ends."""
    threading.Thread(target=exit_with_parent, daemon=True).start()
    keep_freed_memory()
    try:
        with settings(config):
            data = data.to(config.device)
            if config.device == "cpu":
                trainer = Trainer(config, data)
                while True:
                    pipe.send(trainer.evaluate(pipe.recv()))
            from slots import serve_slots  # here, as only a GPU needs it

            serve_slots(config, data, slots, pipe)
    except (EOFError, ConnectionError):
        pass  # the parent is gone
    except KNOWN as error:
        pipe.send(error)
    except Exception as error:
        from slots import out_of_memory

        if out_of_memory(error):
            print(message(error), file=sys.stderr)
            sys.exit(OUT_OF_MEMORY)
        raise


def keep_freed_memory():
    """Make glibc keep freed memory for the next training step. By default it returns the memory to
    the system, which costs up to 15% of a step's time."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_MMAP_THRESHOLD, 2**25)  # the largest that glibc takes


def exit_with_parent():
    connection.wait([parent_process().sentinel])
    os._exit(1)
