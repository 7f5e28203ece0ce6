"""What the benchmarks reckon; what they measure is in benchmarks/results/."""

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.throughput import covered, record_of_slots
from data import make_data
from epbt import Config, make_job
from training import prepare


@pytest.fixture
def job():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (90, 3, 8, 8), dtype=np.uint8), rng.integers(0, 3, 90)
    config = Config(model="resnet8", batch_size=16, device="cpu", threads=1, loss_backend="reference").resolved()
    return make_job(config, make_data(images, images, validation=10))


def test_time_that_several_spans_cover_counts_once():
    assert covered([(5.0, 6.0), (0.0, 2.0), (1.0, 3.0), (1.0, 1.5)]) == 4 / 6


@pytest.mark.cuda
def test_a_profile_tells_how_busy_the_gpu_is(job):
    row = record_of_slots("slots", prepare(replace(job, device="cuda:0")), 2, 2)
    assert row["images_per_s"] > 0 and 0 < row["gpu_busy"] <= 1
