"""Shared by the tests: real runs of a second, and runs that only pretend to train."""

import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cuda_on_cpu import load_emulated

import norm_relu
import taylorglo_ext
from augmentation import Augmentation
from epbt import METHODS, main

TINY = ("--population 4 --generations 3 --epochs 1 --limit 300 --validation 60 --enlarge 1 "
        "--workers 1 --threads 1 --loss-backend reference --device cpu")

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read by the first call of cuBLAS


def pytest_collection_modifyitems(items):
    """Tests that carry the marker cuda are skipped without a GPU."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.cuda)])
def gpu(request, monkeypatch):
    """A device whose fused operators are the CUDA kernels: a GPU, and the CPU that emulates one.
    Fresh memory is full of NaN there, so that an element that is not written shows."""
    device = "cuda" if request.param == "cuda" else "cpu"
    taylorglo_ext.load("fused", device)
    if device == "cpu":
        load_emulated()
        monkeypatch.setattr(torch.ops, "taylorglo", torch.ops.emulated)
        monkeypatch.setattr(norm_relu, "has_kernels", lambda d: taylorglo_ext.is_fused(d.type))
    torch.use_deterministic_algorithms(True)
    yield device
    torch.use_deterministic_algorithms(False)
    taylorglo_ext.load("fused", device)


@pytest.fixture(scope="module")
def one_thread():
    """Sums round alike only on equally many threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def run_epbt(tmp_path_factory):
    """Carries out `python epbt.py` on the digits with options; returns the run's folder."""
    def run(*options):
        folder = tmp_path_factory.mktemp("run")
        main([*TINY.split(), "--out", str(folder), *options])
        return folder
    return run


@pytest.fixture(scope="session")
def pretend():
    """Carries out a method with random fitness in place of training. Returns a namespace: log, as
    RunFolder writes it; calls of Workers.evaluate (individuals, teacher, alpha); everyone by id."""
    def run(config, diverges=lambda individual: False, after=None):
        after = after or SimpleNamespace(log=[], calls=[], everyone={})
        log, calls, everyone = after.log[:], after.calls[:], dict(after.everyone)

        def evaluate(individuals, teacher=None, alpha=0.0):
            calls.append((individuals, teacher, alpha))
            for individual in individuals:
                rng = np.random.default_rng((1, individual.id))
                individual.diverged = diverges(individual)
                # Many live with a fitness of 0.
                accuracy = max(0, rng.uniform(-0.2, 1)) * (not individual.diverged)
                individual.correct = rng.random(50) < accuracy
                individual.fitness = individual.correct.mean()  # a multiple of 1/50: there are ties
                everyone[individual.id] = individual
            return individuals

        def record(generation, population, elites=()):
            members = [{**m.record(), "elite": any(m is e for e in elites)} for m in population]
            log.append(json.loads(json.dumps({"generation": generation, "population": members})))

        population = [everyone[m["id"]] for m in log[-1]["population"]] if log else []
        folder = SimpleNamespace(generations=len(log), population=population, record=record)
        workers = SimpleNamespace(evaluate=evaluate)
        augmentation = Augmentation(cutout=8 * ("cutout" in config.augmentation))
        data = SimpleNamespace(num_classes=10, height=8, width=8, augmentation=augmentation)
        generations = METHODS[config.method](config, config.search_space(), data, workers, folder)
        assert [g for g, _ in generations] == list(range(folder.generations, config.generations))
        return SimpleNamespace(log=log, calls=calls, everyone=everyone)
    return run
