"""Evaluations on Ray clusters of this machine; skipped without requirements-ray.txt."""

import os
import signal
import threading
from dataclasses import replace

import pytest
import torch

ray = pytest.importorskip("ray")

from ray.cluster_utils import Cluster  # noqa: E402

from epbt import Config, evolve  # noqa: E402
from errors import RunError  # noqa: E402
from records import read_config  # noqa: E402
from tests.soak import wait_for  # noqa: E402

CONFIG = Config(dataset="digits", model="resnet8", population=6, generations=3, epochs=1, limit=300,
                validation=60, enlarge=1, label_noise=0.2, threads=1, device="cpu",
                loss_backend="reference", workers=1)


def log_of(folder, **given):
    """The bytes of log.jsonl and best.pt of a run into this folder."""
    evolve(replace(CONFIG, out=str(folder), **given), report=lambda line: None)
    return (folder / "log.jsonl").read_bytes(), (folder / "best.pt").read_bytes()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process computes without Ray."""
    return log_of(tmp_path_factory.mktemp("alone") / "run")


@pytest.fixture
def cluster():
    """A head that computes nothing, and two nodes of one core each."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def test_a_cluster_started_for_the_run_gives_the_same_bytes(alone, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # which only --ray-address would look for
    assert log_of(tmp_path / "run", backend="ray", workers=2) == alone
    assert not ray.is_initialized()


def test_two_nodes_one_of_which_is_killed_in_the_middle_of_a_generation(alone, cluster, tmp_path):
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    cluster.wait_for_nodes()
    folder = tmp_path / "run"
    killed = []

    def kill_one():
        wait_for(lambda: len(list(folder.glob("individuals/*[0-9].safetensors"))) >= 2, 120)
        killed.append((folder / "log.jsonl").read_bytes().count(b"\n"))
        cluster.remove_node(nodes[0], allow_graceful=False)

    thread = threading.Thread(target=kill_one)
    thread.start()
    result = log_of(folder, backend="ray", ray_address=cluster.address, workers=0)
    thread.join()
    assert killed == [0]  # within generation 0
    assert result == alone


def test_an_individual_that_kills_its_worker_each_time_ends_in_one_line(cluster, tmp_path):
    cluster.add_node(num_cpus=1)
    model = "test_cluster:Deadly"
    with pytest.raises(RunError, match="individual 0 could not be evaluated in 3 attempts on the"):
        log_of(tmp_path / "run", backend="ray", ray_address=cluster.address, model=model)
    assert read_config(tmp_path / "run")["model"] == model


def test_an_address_where_no_cluster_is_is_told_in_one_line(tmp_path):
    with pytest.raises(RunError, match="cannot use the Ray cluster 127.0.0.1:1: "):
        log_of(tmp_path / "run", backend="ray", ray_address="127.0.0.1:1")


class Deadly(torch.nn.Flatten):
    """Passes the trial with two images before the run, and kills the process that trains it."""

    def __init__(self, num_classes, in_channels):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x):
        if len(x) > 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)[:, :10] * self.weight
