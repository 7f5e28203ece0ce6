"""The rows of ``python -m benchmarks.throughput`` on a GPU: training images/s of slots (slots.py).

ResNet-32 at batch 128 on random data of CIFAR-10's shape, distilled, under the TaylorGLO loss;
training only: one eager slot; 1 to 16 slots with CUDA graphs, channels last as in a run, and
contiguous; and the limit, one eager network at a large batch. ``--deterministic`` and ``--compile``
(the networks go through torch.compile) measure slots with graphs so. The files are
throughput-cuda, -cuda-deterministic and -cuda-compile.
"""

import time
from dataclasses import replace

from benchmarks.rows import record
from benchmarks.throughput import random_cifar10, whole
from settings import settings
from slots import REHEARSAL, Slot, discard, rehearse

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
        for name, changes, counts in gpu_rows(options):
            changed = replace(config, precision=precision, **changes)
            contender = f"{name}, {precision}{label}"
            yield from records_of_slots(contender, changed, data, counts, options.rounds, kind)


def gpu_rows(options):
    """(contender, changes of the config, numbers of slots) of some rows."""
    if options.deterministic or options.compile:
        return [("graphs", {}, (1, 2) if options.tiny else (1, 8, 16))]
    rows = [
        ("graphs", {}, (1, 2) if options.tiny else (1, 2, 4, 8, 16)),
        ("eager", dict(no_graphs=True), (1,)),
        ("graphs, contiguous", dict(layout="contiguous"), (2,) if options.tiny else (8,)),
    ]
    limit = ("limit: batch 2048", dict(no_graphs=True, batch_size=2048), (1,))
    return rows if options.tiny else [*rows, limit]


def records_of_slots(contender, config, data, counts, rounds, kind):
    """For each number of slots, these take so many training steps each, `rounds` times."""
    trainers = []
    with settings(config):
        for count in counts:
            trainers += [kind(config, data) for _ in range(count - len(trainers))]
            rehearse(trainers, 1)  # captures the graphs
            times = []
            for _ in range(rounds):
                start = time.perf_counter()
                rehearse(trainers, REHEARSAL)
                times.append(time.perf_counter() - start)
            images = REHEARSAL * count * trainers[0].batch
            yield record(contender, times, images, config.model, count, count)
        discard(trainers)
