"""Several individuals on one GPU: streams, CUDA graphs, turns, random states (Sec. 3.1, last par.).

A slot is a Trainer that captures its steps once as CUDA graphs and then replays them. The slots of
a GPU take turns in one thread. Each queues a few steps on its own stream, and the GPU works on all
streams at once.
"""

import gc
import hashlib
import json
import os
import sys
import time
from collections import Counter
from contextlib import contextmanager
from contextvars import copy_context
from functools import partial
from pathlib import Path

import torch
from greenlet import getcurrent, greenlet
from torch import nn
from torch.func import functional_call

from errors import RunError, message
from models import FoldedResNet, ResNet, random_states, random_states_kept, set_random_states
from network import load_tensors, named_tensors, plain_attributes
from records import Individual, write_atomic
from training import Task, Trainer

STEPS_A_TURN = 8  # steps that a slot queues before the next slot has its turn
WARM_UP = 3  # steps before a capture: in the first ones libraries allocate and choose kernels
MOST_SLOTS = 16
REHEARSAL = 25  # training steps that measure the throughput
WORTHWHILE = 1.1  # twice the slots must raise the throughput by this factor


class Slot(Trainer):
    """A Trainer with a stream, graphs and random states of its own."""

    def __init__(self, config, data):
        super().__init__(config, data)
        self.captured = not config.no_graphs
        self.graphs, self.network, self.random_states = {}, None, random_states()
        self.stream, self.pool = torch.cuda.Stream(self.device), torch.cuda.graph_pool_handle()
        self.generator = torch.Generator(self.device)
        torch.cuda.synchronize(self.device)  # the default stream has filled what this one reads

    def make_networks(self, seed):
        """Make networks once and give them new weights each time, as graphs keep addresses."""
        if not self.captured:
            return self.new_networks(seed)
        if self.network is None:
            distilled, self.distilled = self.distilled, True  # later tasks need the teacher
            self.new_networks(seed)
            self.distilled = distilled
        # These flags change the operations, so each combination needs its own graph.
        self.kind = (self.distilled, self.has_theta, self.augmentation.cutout > 0,
                     self.h["weight_decay"] > 0)
        self.graph(self.step)  # before the weights are loaded, since a capture's steps change them
        load_tensors(self.network.tensors(), self.new_network(seed).tensors())

    def new_networks(self, seed):
        super().make_networks(seed)
        self.folded = None
        if self.teacher and type(self.teacher.model) is ResNet:
            self.folded = FoldedResNet(self.teacher.model, getattr(torch, self.config.precision))

    def load(self, task):
        super().load(task)
        if self.folded:
            self.folded.fold()

    def logits(self, model, images):
        """A Trainer's logits by fewer kernels: the teacher is folded, and one kernel casts all
        weights to bfloat16, where autocast needs one for each."""
        if self.folded and model is self.teacher.model:
            return super().logits(self.folded, images)
        weights = autocast_weights(model) if self.config.precision == "bfloat16" else {}
        if weights:
            cast = dict(zip(weights, Cast.apply(*weights.values()), strict=True))
            model = partial(functional_call, model, cast)
        return super().logits(model, images)

    def repeat(self, step, count):
        """Call `step` so many times, let other slots go on in between, and wait for the GPU."""
        if self.captured:
            step = self.graph(step)
        self.position.zero_()
        for i in range(count):
            if i % STEPS_A_TURN == 0:
                give_turn()
            step()
        done = self.stream.record_event()
        while not done.query():
            give_turn()

    def graph(self, step):
        """The function that replays a step's graph. The first call captures the graph."""
        key = step, self.kind if step == self.step else None
        if key not in self.graphs:
            self.warm_up(step)
            graph = torch.cuda.CUDAGraph()
            # The graphs of a slot share one pool of memory, since only one of them runs at a time.
            try:
                with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                    step()
            except torch.AcceleratorError as error:  # its context is the cause
                if out_of_memory(error):
                    raise
                self.cannot_capture(f"({message(error.__context__ or error)})", error)
            self.graphs[key] = graph.replay
        return self.graphs[key]

    def warm_up(self, step):
        """Take a few steps without a graph. Raises RunError if they change what a graph freezes."""
        before = self.frozen_by_capture()
        for _ in range(WARM_UP):
            self.position.zero_()
            step()
            after = self.frozen_by_capture()
            if changed := [what for what in after if after[what] != before.get(what)]:
                self.cannot_capture(f"as it changes {changed[0]}, which a graph would freeze")

    def frozen_by_capture(self):
        """{what: its value now} of what a graph takes from Python: places of tensors, random states
        and attributes."""
        model, (_, numpy_state, python_state) = self.network.model, random_states()
        found = {f"the attribute {name}": value for name, value in plain_attributes(model).items()}
        found |= {f"the tensor {name}": (id(t), t.data_ptr(), t.shape, t.stride(), t.requires_grad)
                  for name, t in named_tensors(model)}
        return found | {"the state of NumPy's random generator": repr(numpy_state),
                        "the state of Python's random generator": python_state}

    def cannot_capture(self, why, error=None):
        raise RunError(f"model {self.config.model}: its training step cannot be captured as a CUDA "
                       f"graph {why}; use --no-graphs") from error

    def rehearse(self, count):
        """Take so many typical training steps. For a slot that has evaluated nothing yet."""
        if self.network is None:
            theta = dict.fromkeys((f"theta{i}" for i in range(8)), 1.0)
            h = self.config.fixed(self.data.augmentation.cutout)
            stand_in = Path("stand-in") if self.config.distillation else None
            self.set_hyperparameters(h | (theta if self.config.evolves_theta else {}),
                                     Task(Individual(0, 0, {}), Path(), teacher=stand_in))
            self.make_networks(seed=0)
            self.repeat(self.validation.step, 1)  # an evaluation needs memory too
        while count > 0:
            self.repeat(self.step, min(count, self.steps))
            count -= self.steps

    @contextmanager
    def turn(self):
        """Within it, PyTorch uses this slot's stream and random states."""
        generator = torch.cuda.default_generators[self.stream.device_index]
        before = generator.graphsafe_get_state()
        # A running graph reads its random state from the GPU. If slots shared one state, a slot
        # could overwrite it before another slot's graph has read it.
        generator.graphsafe_set_state(self.generator)
        try:
            with random_states_kept(), torch.cuda.stream(self.stream):
                set_random_states(self.random_states)
                yield
                self.random_states = random_states()
        finally:
            generator.graphsafe_set_state(before)


class Cast(torch.autograd.Function):
    """Casts float32 tensors to bfloat16, and their gradients back, in one kernel each way."""

    @staticmethod
    def forward(ctx, *tensors):
        ctx.set_materialize_grads(False)
        return all_cast(tensors, torch.bfloat16)

    @staticmethod
    def backward(ctx, *gradients):  # None for a weight that the model did not use
        return all_cast(gradients, torch.float32)


def all_cast(tensors, dtype):
    given = [t for t in tensors if t is not None]
    cast = [torch.empty_like(t, dtype=dtype) for t in given]
    torch._foreach_copy_(cast, given)
    cast = iter(cast)
    return tuple(None if t is None else next(cast) for t in tensors)


def autocast_weights(model):
    """{name: parameter} of those that autocast would cast: the trained float32 parameters that
    belong to one convolution or linear layer alone."""
    plain = nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d
    users = Counter(map(id, dict(model.named_parameters(remove_duplicate=False)).values()))
    return {f"{path}.{name}".lstrip("."): p
            for path, module in model.named_modules() if type(module) in plain
            for name, p in module.named_parameters(recurse=False)
            if p.dtype == torch.float32 and p.requires_grad and users[id(p)] == 1}


def give_turn():
    """Within `Turns`, let the other slots go on. Elsewhere do nothing."""
    if getcurrent().parent is not None:
        getcurrent().parent.switch()


class Turns:
    """Runs one call for each slot, a few steps of each in turn."""

    def __init__(self):
        self.busy = {}  # slot: its greenlet, a call that can pause

    def begin(self, slot, call, *arguments):
        self.busy[slot] = running = greenlet(lambda: call(*arguments))
        running.gr_context = copy_context()  # has NumPy's error settings

    def step(self):
        """Give each busy slot a turn. Returns [(slot, what its call returned)] of ended calls."""
        ended = []
        for slot, running in list(self.busy.items()):
            with slot.turn():
                result = running.switch()
            if running.dead:
                del self.busy[slot]
                ended.append((slot, result))
        return ended


def make_slots(config, data, count):
    """So many slots; for 0, the best number. A file remembers it for the same GPU, model,
    precision, batch and PyTorch."""
    memory = remembered(config, data)
    if not count and memory.is_file():
        count = json.loads(memory.read_text(encoding="utf-8"))
    if count:
        return [Slot(config, data) for _ in range(count)]
    slots = worthwhile_slots(config, data)
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(memory, json.dumps(len(slots)).encode())
    except (OSError, RunError) as error:
        print(f"the number of slots is not remembered: {message(error)}", file=sys.stderr)
    return slots


def in_turns(slots, tasks):
    """Evaluate tasks, one in each slot. Yields each individual when it is done."""
    waiting, idle, turns = list(tasks)[::-1], list(slots), Turns()
    while waiting or turns.busy:
        while waiting and idle:
            slot = idle.pop()
            turns.begin(slot, slot.evaluate, waiting.pop())
        try:
            ended = turns.step()
        except RuntimeError as error:
            if out_of_memory(error):
                raise RunError(f"{len(slots)} individuals at once do not fit the GPU's memory: use "
                               "fewer --workers, a smaller --batch-size or --model, or free the "
                               f"GPU ({message(error)})") from error
            raise
        for slot, individual in ended:
            idle.append(slot)
            yield individual


def serve_slots(config, data, count, pipe):
    """Evaluate the tasks that come through the pipe. For count 0 first send the number of slots."""
    idle, turns = make_slots(config, data, count), Turns()
    if not count:
        pipe.send(len(idle))
    while True:
        while idle and (not turns.busy or pipe.poll()):
            slot = idle.pop()
            turns.begin(slot, slot.evaluate, pipe.recv())
        for slot, individual in turns.step():
            pipe.send(individual)
            idle.append(slot)


def rehearse(slots, count):
    """Take so many training steps in each of these slots."""
    turns = Turns()
    for slot in slots:
        turns.begin(slot, slot.rehearse, count)
    while turns.busy:
        turns.step()


def throughput(slots):
    """Training images per second of these slots together."""
    rehearse(slots, 1)  # captures the graphs
    begun = time.perf_counter()
    rehearse(slots, REHEARSAL)
    return sum(REHEARSAL * slot.batch for slot in slots) / (time.perf_counter() - begun)


def worthwhile_slots(config, data):
    """The best number of slots: double it while the throughput rises by a tenth and the memory is
    large enough."""
    slots, more, best, most = [], [], 0.0, most_slots(config)
    while len(slots) < most:
        try:
            more = [Slot(config, data) for _ in range(min(len(slots) or 1, most - len(slots)))]
            images = throughput([*slots, *more])
        except RuntimeError as error:
            if not out_of_memory(error) or not slots:
                raise
            break
        if images < best * WORTHWHILE:
            break
        slots, more, best = [*slots, *more], [], images
    discard(more)
    return slots


def most_slots(config):
    """How many slots the search may try: no more than there are networks."""
    return min(MOST_SLOTS, config.population)


def discard(slots):
    """Empty a list of slots and give back their memory. A slot refers to itself, so without this
    Python would keep it for long."""
    slots.clear()
    gc.collect()
    torch.cuda.empty_cache()


def remembered(config, data):
    """The file that remembers the best number of slots."""
    what = [torch.__version__, torch.cuda.get_device_name(), torch.cuda.mem_get_info()[1],
            config.model, config.precision, config.layout, config.batch_size,
            config.distillation > 0, config.average_weights > 0, config.no_graphs,
            config.deterministic, most_slots(config), data.channels, data.height, data.width,
            data.num_classes, Path(__file__).read_text(encoding="utf-8")]
    key = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]
    cache = os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return Path(cache) / "epbt" / f"slots-{key}.json"


def out_of_memory(error):
    """Whether a GPU's memory was too small. cuDNN and CUDA have their own errors for this, and in a
    capture the error is the context of another."""
    words = "out of memory", "unable to find an engine", "ALLOC_FAILED"
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError):
            return True
        if isinstance(error, RuntimeError) and any(word in str(error) for word in words):
            return True
        error = error.__cause__ or error.__context__
    return False
