"""The rows of ``python -m benchmarks.throughput`` on a GPU: training images/s of slots (slots.py).

ResNet-32 at batch 128 on random data of CIFAR-10's shape, distilled, under the TaylorGLO loss;
training only: one eager slot; slots with CUDA graphs; with contiguous tensors; and the limit, one
eager network at large batches. gpu_busy is the share of the time of a profile in which the GPU runs
something. ``--deterministic`` and ``--compile`` (the networks go through torch.compile) measure
slots with graphs so. The files are throughput-cuda, -cuda-deterministic and -cuda-compile.
"""

import time
from dataclasses import replace

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.rows import record
from benchmarks.throughput import random_cifar10, whole
from settings import settings
from slots import REHEARSAL, Slot, rehearse

DEVICE = "cuda:0"


class Compiled(Slot):
    """A slot whose networks go through torch.compile before their steps are captured."""

    def new_network(self, seed):
        network = super().new_network(seed)
        network.model.compile()
        return network


def on_gpu(options):
    """Yields the records of every GPU contender."""
    model, images = ("resnet8", 5_000) if options.tiny else ("resnet32", 50_000)
    config = whole(dataset="cifar10", device="cuda", model=model)
    config = replace(config, device=DEVICE, deterministic=options.deterministic)
    data, kind = random_cifar10(images).to(DEVICE), Compiled if options.compile else Slot
    label = ", deterministic" * options.deterministic + ", torch.compile" * options.compile
    for precision in ("float32", "bfloat16"):
        for name, changes, slots in gpu_rows(options):
            changed = replace(config, precision=precision, **changes)
            contender = f"{name}, {precision}{label}"
            yield record_of_slots(contender, changed, data, slots, options.rounds, kind)


def gpu_rows(options):
    """(contender, changes of the config, slots) of each row."""
    if options.deterministic or options.compile:
        return [("graphs", {}, slots) for slots in ((2,) if options.tiny else (1, 8, 16))]
    if options.tiny:
        return [
            ("eager", dict(no_graphs=True), 1),
            ("graphs", {}, 2),
            ("graphs, contiguous", dict(layout="contiguous"), 2),
        ]
    return [
        ("eager", dict(no_graphs=True), 1),
        *(("graphs", {}, slots) for slots in (1, 2, 4, 8, 16)),
        *(("graphs, contiguous", dict(layout="contiguous"), slots) for slots in (1, 8)),
        *((f"limit: batch {n}", dict(no_graphs=True, batch_size=n), 1) for n in (512, 2048, 8192)),
    ]


def record_of_slots(contender, config, data, slots, rounds, kind):
    """These slots together take so many training steps each, `rounds` times."""
    with settings(config):
        trainers, times = [kind(config, data) for _ in range(slots)], []
        rehearse(trainers, 1)  # captures the graphs
        for _ in range(rounds):
            start = time.perf_counter()
            rehearse(trainers, REHEARSAL)
            times.append(time.perf_counter() - start)
        row = record(
            contender, times, REHEARSAL * slots * trainers[0].batch, config.model, slots, slots
        )
        row["gpu_busy"] = round(busy_share(trainers), 3)
        del trainers
        torch.cuda.empty_cache()
    return row


def busy_share(trainers, steps=10):
    """In a profile of a few steps, the share of the time in which the GPU runs something."""
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as trace:
        rehearse(trainers, steps)
        torch.cuda.synchronize()
    return covered(
        [
            (e.time_range.start, e.time_range.end)
            for e in trace.events()
            if e.device_type == DeviceType.CUDA
        ]
    )


def covered(spans):
    """The share of the time from the first start to the last end that lies in any of the spans
    (start, end)."""
    spans = sorted(spans)
    begun = end = spans[0][0]
    total = 0.0
    for start, stop in spans:
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total / (end - begun)
