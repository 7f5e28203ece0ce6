"""Evaluations on a Ray cluster: `--backend ray`, with the packages of requirements-ray.txt.

Ray schedules the evaluations. If a node or process is lost, Ray repeats its evaluations elsewhere.
Each node gets the images once, through its object store. The run's folder stays on the machine that
started the run. Weights travel as the bytes of their files, so nodes need no common file system.
"""

import os
import socket
import sys
import tempfile
from collections import deque
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import ray
import torch

from data import ImageSet
from errors import RunError, message
from records import write_atomic
from settings import settings
from training import Trainer
from workers import ATTEMPTS, KNOWN, keep_freed_memory

SETS = ("train", "validation", "test")


class RayPool:
    """A pool for `workers.Workers` whose workers are processes of Ray."""

    def __init__(self, config, data):
        """config.workers: at most so many evaluations at once, which share the GPUs; 0: one per
        `config.threads` cores, or per GPU, of the cluster."""
        count, address = config.workers, config.ray_address
        own = dict(include_dashboard=False, num_cpus=count * config.threads or None)
        path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
        host, _, port = address.removeprefix("ray://").rpartition(":")
        try:
            if port.isdigit():  # Ray would try for minutes to reach a port where nobody listens
                socket.create_connection((host, int(port)), timeout=10).close()
            ray.init(address=address or "local", log_to_driver=False, **({} if address else own),
                     runtime_env={"env_vars": {"PYTHONPATH": path}})
        except (OSError, ValueError, RuntimeError) as error:
            raise RunError(f"cannot use the Ray cluster {address or 'of this machine'}: "
                           f"{message(error)}") from error
        with ExitStack() as stack:
            stack.callback(self.close)
            self.prepare(config, data)
            stack.pop_all()

    def prepare(self, config, data):
        """Put the data into Ray's object store, and decide what an evaluation needs."""
        count, resources = config.workers, dict(num_cpus=config.threads)
        if config.device != "cpu":
            gpus = ray.cluster_resources().get("GPU", 0)
            if gpus == 0:
                raise RunError("the Ray cluster has no GPU; use --device cpu")
            resources |= dict(num_gpus=min(1, gpus / (count or gpus)))
            config = replace(config, device="cuda")
        self.evaluate = ray.remote(max_retries=ATTEMPTS - 1, **resources)(evaluate)
        # Processes read NumPy arrays in Ray's object store without a copy.
        arrays = [(s.images.permute(0, 2, 3, 1).contiguous().numpy(), s.labels.numpy())
                  for s in (getattr(data, name) for name in SETS)]
        self.work = ray.put((config, replace(data, **dict.fromkeys(SETS)), arrays))
        self.count = count

    def run(self, tasks):
        """Yields each task's individual when it is done, in any order."""
        files = {path: ray.put(path.read_bytes()) for path in
                 {p for task in tasks for p in (task.parent, task.teacher) if p is not None}}
        waiting, running = deque(tasks), {}
        while waiting or running:
            while waiting and (self.count == 0 or len(running) < self.count):
                task = waiting.popleft()
                weights = files.get(task.parent), files.get(task.teacher)
                running[self.evaluate.remote([self.work], task, *weights)] = task
            (done,), _ = ray.wait(list(running), num_returns=1)
            task = running.pop(done)
            try:
                individual, file = ray.get(done)
            except ray.exceptions.RayTaskError as error:
                raise (error.cause if isinstance(error.cause, KNOWN) else error) from None
            except ray.exceptions.RayError as error:
                raise RunError(f"individual {task.individual.id} could not be evaluated in "
                               f"{ATTEMPTS} attempts on the Ray cluster: "
                               f"{str(error).splitlines()[0]}") from error
            write_atomic(task.path, file)
            yield individual

    def close(self):
        ray.shutdown()


# Ray keeps a process for later evaluations.
kept = ExitStack()  # its settings
trainers = {}  # its Trainer by `work`


def evaluate(work, task, parent, teacher):
    """In a process of Ray: return the evaluated individual and the bytes of its file.

    work: a list with the reference to config and data: without the list Ray would fetch them each
    time; parent, teacher: bytes of files, or None."""
    if work[0] not in trainers:
        trainers.clear()
        keep_freed_memory()
        config, data, arrays = ray.get(work[0])
        sets = [ImageSet(torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels))
                for images, labels in arrays]
        data = replace(data, **dict(zip(SETS, sets, strict=True)))
        kept.enter_context(settings(config))
        trainers[work[0]] = Trainer(config, data.to(config.device))
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder) / name for name in ("path", "parent", "teacher")}
        for name, content in (("parent", parent), ("teacher", teacher)):
            if content:
                paths[name].write_bytes(content)
            else:
                paths[name] = None
        return trainers[work[0]].evaluate(replace(task, **paths)), paths["path"].read_bytes()
