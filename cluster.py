"""Evaluations on a Ray cluster: `--backend ray`, with the packages of requirements-ray.txt.

Ray schedules the evaluations, and runs those of a lost node or a killed process again on another.
The images go to each node once, through its object store. A run's folder stays on the machine that
started the run: weights travel as the bytes of their files, so nodes need share no file system.
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
from errors import ConfigError, RunError, message
from records import write_atomic
from settings import settings
from taylorglo_ext import BackendError
from training import Trainer
from workers import ATTEMPTS, keep_freed_memory

SETS = ("train", "validation", "test")


class RayPool:
    """A pool for `workers.Workers` whose workers are Ray's."""

    def __init__(self, config, data):
        """config.workers: at most so many evaluations at once, sharing the GPUs if there are any;
        0: one a core or a GPU. config.ray_address: of a running cluster; empty: a new one."""
        count, address = config.workers, config.ray_address
        own = dict(include_dashboard=False, num_cpus=count * config.threads or None)
        path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
        host, _, port = address.removeprefix("ray://").rpartition(":")
        try:
            if port.isdigit():  # where nobody listens, Ray itself would try for minutes
                socket.create_connection((host, int(port)), timeout=10).close()
            ray.init(address=address or "local", log_to_driver=False, **({} if address else own),
                     runtime_env={"env_vars": {"PYTHONPATH": path}})
        except (OSError, ValueError, RuntimeError) as error:
            raise RunError(f"cannot use the Ray cluster {address or 'of this machine'}: "
                           f"{message(error)}") from error
        resources = dict(num_cpus=config.threads)
        if config.device != "cpu":
            gpus = ray.cluster_resources().get("GPU", 0)
            if gpus == 0:
                raise RunError("the Ray cluster has no GPU; use --device cpu")
            resources |= dict(num_gpus=min(1, gpus / (count or gpus)))
            config = replace(config, device="cuda")
        self.evaluate = ray.remote(max_retries=ATTEMPTS - 1, **resources)(evaluate)
        # As NumPy arrays, which are not copied out of Ray's object store.
        arrays = [(s.images.permute(0, 2, 3, 1).contiguous().numpy(), s.labels.numpy())
                  for s in (getattr(data, name) for name in SETS)]
        self.work = ray.put((config, replace(data, **dict.fromkeys(SETS)), arrays))
        self.count = count

    def run(self, tasks):
        """Yields each task's individual as it is done, in no particular order."""
        files = {}  # each parent and teacher is put into the object store once
        for path in {p for task in tasks for p in (task.parent, task.teacher) if p is not None}:
            files[path] = ray.put(path.read_bytes())
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
                mendable = isinstance(error.cause, ConfigError | RunError | BackendError)
                raise (error.cause if mendable else error) from None
            except ray.exceptions.RayError as error:
                raise RunError(f"individual {task.individual.id} could not be evaluated in "
                               f"{ATTEMPTS} attempts on the Ray cluster: "
                               f"{str(error).splitlines()[0]}") from error
            write_atomic(task.path, file)
            yield individual

    def close(self):
        ray.shutdown()


kept = ExitStack()  # the settings of this process
trainers = {}  # of this process, which Ray keeps for the next evaluations, by its work


def evaluate(work, task, parent, teacher):
    """In a process of Ray: (the evaluated individual, the bytes of its file).

    work: the reference of the config and the data, in a list, or Ray would fetch it each time;
    parent, teacher: bytes or None."""
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
