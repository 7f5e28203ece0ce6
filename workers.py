"""Where evaluations run: in this process, or on a pool of processes, each with one CPU thread or on one GPU.

"Since the evaluation of an individual does not depend on other individuals, the entire EPBT process can be
parallelized" (Sec. 3.1). An evaluation is a function of its task alone, so a run gives the same bits for any number
of workers. Weights travel through the run's folder (written once, read from the page cache), images through shared
memory; only the task and the scores go through a pipe.
"""

import ctypes
import os
import shutil
import signal
import sys
import threading
import traceback
from collections import Counter, deque
from dataclasses import replace
from multiprocessing import connection, forkserver, parent_process

import torch
import torch.multiprocessing as multiprocessing

from records import RunError
from taylorglo_ext import BackendError
from training import Task, Trainer

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
ATTEMPTS = 3  # a worker that dies is started again and its task given out again, this many times in all
OUT_OF_MEMORY = 75  # the exit code of a worker whose GPU had no memory left
PATIENCE = 10  # seconds for a worker to exit after it has closed its pipe


class Workers:
    """Evaluates individuals; what an interrupted run has already evaluated is taken from its folder."""

    def __init__(self, job, folder, count, progress):
        """progress: something with tqdm's update(n), called once for each individual."""
        self.folder, self.progress = folder, progress
        # A GPU always has a process of its own: after a CUDA error only a new process can use it again.
        self.pool = ThisProcess(job) if count == 1 and job.device == "cpu" else Processes(job, count)

    def evaluate(self, individuals, teacher=None, alpha=0.0):
        """Alg. 1, step 3a: the same individuals, trained and scored, in the same order."""
        evaluated = {}
        tasks = []
        for individual in individuals:
            found = self.folder.recall(individual)
            if found is None:
                tasks.append(self._task(individual, teacher, alpha))
            else:
                evaluated[found.id] = found
        self.progress.update(len(evaluated))
        for individual in self.pool.run(tasks):
            evaluated[individual.id] = individual
            self.progress.update(1)
        return [evaluated[individual.id] for individual in individuals]

    def _task(self, individual, teacher, alpha):
        path = self.folder.individual_path
        return Task(individual, path(individual.id), None if individual.parent is None else path(individual.parent),
                    None if teacher is None else path(teacher.id), alpha)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.pool.close()


class ThisProcess:
    """The pool of one worker on the CPU."""

    def __init__(self, job):
        keep_freed_memory()
        self.threads = torch.get_num_threads()
        torch.set_num_threads(job.threads)
        self.trainer = Trainer(job)

    def run(self, tasks):
        yield from map(self.trainer.evaluate, tasks)

    def close(self):
        torch.set_num_threads(self.threads)


class Processes:
    """A pool of worker processes, started once a run."""

    def __init__(self, job, count):
        self.context = _forkserver()
        if job.device == "cpu":
            _share(job.data)
        self.workers = [_Worker(self.context, replace(job, device=device)) for device in _devices(job.device, count)]

    def run(self, tasks):
        """Yields each task's individual as it is done, in no particular order."""
        waiting, attempts = deque(tasks), Counter()
        while waiting or any(worker.task for worker in self.workers):
            for worker in self.workers:
                if waiting and worker.task is None:
                    worker.give(waiting.popleft())
            for worker in self._ready():
                task, answer = worker.task, worker.take()
                if answer is not None:
                    yield answer
                else:
                    waiting.appendleft(task)
                    self._replace(worker, task.individual.id, attempts)

    def _ready(self):
        """The busy workers that have answered or died; waits for the first."""
        busy = {worker.pipe: worker for worker in self.workers if worker.task is not None}
        return [busy[pipe] for pipe in connection.wait(list(busy))]

    def _replace(self, worker, id, attempts):
        """Start another worker in the place of one that died over the individual id; where the GPU's memory is
        too small for all of them, do with one less."""
        self.workers.remove(worker)
        if worker.process.exitcode == OUT_OF_MEMORY:
            if not self.workers:
                raise RunError(f"individual {id} does not fit the GPU's memory, even with one worker: use a smaller "
                               "--batch-size or --model, or free the GPU")
            print(f"out of GPU memory: going on with {len(self.workers)} of the workers", file=sys.stderr)
            return
        attempts[id] += 1
        if attempts[id] == ATTEMPTS:
            raise RunError(f"individual {id} could not be evaluated: its worker died {ATTEMPTS} times, the last time "
                           f"with {worker.died_of()}")
        print(f"a worker died with {worker.died_of()}; individual {id} is evaluated again", file=sys.stderr)
        self.workers.append(_Worker(self.context, worker.job))

    def close(self):
        for worker in self.workers:
            worker.process.kill()
        for worker in self.workers:
            worker.process.join()


def _forkserver():
    """Workers are forked from a server that has imported torch but started no thread and no CUDA context."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["training"])
    if threading.current_thread() is not threading.main_thread():
        return context  # signals are not its business
    # Ctrl-C reaches every process of a terminal, and is the parent's to handle. The server and its workers ignore it
    # from their first instruction, since they inherit what the server was started with.
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        forkserver.ensure_running()
    finally:
        signal.signal(signal.SIGINT, handler)
    return context


class _Worker:
    """One process of the pool, seen from the parent."""

    def __init__(self, context, job):
        self.job, self.task = job, None
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(job, theirs), daemon=True)
        try:
            self.process.start()
        except (OSError, EOFError) as error:
            raise RunError(f"cannot start a worker process: {error or 'the server that forks them is gone'}") from error
        theirs.close()  # so that its death closes the pipe

    def give(self, task):
        self.task = task
        try:
            self.pipe.send(task)
        except OSError:
            pass  # it died while idle: take() finds out

    def take(self):
        """The answer to the task, or None if the process died; an error that is the user's to mend is raised."""
        self.task = None
        try:
            answer = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join(PATIENCE)
            self.process.kill()  # if it hangs in its exit, as it can over a GPU that failed
            self.process.join()
            return None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def died_of(self):
        code = self.process.exitcode
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _serve(job, pipe):
    """The worker process: answers tasks until its parent is gone or it cannot."""
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    keep_freed_memory()
    torch.set_num_threads(job.threads)
    try:
        trainer = Trainer(job)
        while True:
            pipe.send(trainer.evaluate(pipe.recv()))
    except (EOFError, ConnectionError):
        pass  # the parent is gone
    except (RunError, BackendError) as error:
        pipe.send(error)
    except torch.OutOfMemoryError:
        sys.exit(OUT_OF_MEMORY)
    except Exception:
        traceback.print_exc()
        sys.exit(1)


def keep_freed_memory():
    """Have glibc keep what a training step frees for the next one. By default it is given back to the system and
    faulted in again in every step, about 10,000 pages for ResNet-8 on 32x32 images: up to 15% of a step's time."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_MMAP_THRESHOLD, 2**25)  # the largest that glibc takes


def _exit_with_parent():
    connection.wait([parent_process().sentinel])
    os._exit(1)


def _devices(device, count):
    """A device for each of count workers; every GPU gets its share (Sec. 3.1)."""
    if device == "cpu":
        return ["cpu"] * count
    return [f"cuda:{i % torch.cuda.device_count()}" for i in range(count)]


def _share(data):
    """Move the images into shared memory; says so if it is too small, since writing past its end kills a process."""
    need = sum(s.images.nbytes + s.labels.nbytes for s in (data.train, data.validation, data.test))
    free = shutil.disk_usage("/dev/shm").free
    if need > free:
        raise RunError(f"the images need {need >> 20} MiB of shared memory and /dev/shm has {free >> 20} MiB free: "
                       "use --workers 1, or enlarge it (docker run --shm-size)")
    data.share_memory()
