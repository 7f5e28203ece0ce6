"""Several individuals on one GPU: streams, CUDA graphs, turns, random states (Sec. 3.1, last par.).

A slot is a Trainer whose steps are captured once as a CUDA graph and then replayed. The slots of a
GPU take turns within one thread: each queues a few steps on its own stream, and the GPU works on
all streams at once.
"""

import hashlib
import json
import os
import sys
import time
from collections import Counter
from contextlib import contextmanager
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
WARM_UP = 3  # steps before a capture, as PyTorch asks: libraries allocate and choose in the first
MOST_SLOTS = 16
REHEARSAL = 25  # training steps by which throughput is measured
WORTHWHILE = 1.1  # twice the slots must raise a GPU's throughput by this factor


class Slot(Trainer):
    """A Trainer with a stream and graphs of its own. With config.no_graphs it launches each
    operation by itself."""

    def __init__(self, config, data):
        super().__init__(config, data)
        self.captured = not config.no_graphs
        self.graphs, self.network, self.random_states = {}, None, None
        self.stream, self.pool = torch.cuda.Stream(self.device), torch.cuda.graph_pool_handle()
        self.generator = torch.Generator(self.device)
        torch.cuda.synchronize(self.device)  # what the default stream made is used on another now

    def make_networks(self, seed):
        """The first time, make networks and capture their steps; then give them new weights."""
        if not self.captured:
            return self.new_networks(seed)
        if self.network is None:
            distilled, self.distilled = self.distilled, True  # the teacher comes into use later
            self.new_networks(seed)
            self.distilled = distilled
        # These flags change the operations, so each combination needs its own graph.
        self.kind = (self.distilled, self.has_theta, self.augmentation.cutout > 0,
                     self.h["weight_decay"] > 0)
        self.graph(self.step)  # before the weights are loaded, since its first steps change them
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
        """As a Trainer's, with fewer kernels: the teacher is folded, and in bfloat16 all weights
        are cast at once, where autocast has a kernel for each."""
        if self.folded and model is self.teacher.model:
            return super().logits(self.folded, images)
        weights = autocast_weights(model) if self.config.precision == "bfloat16" else {}
        if weights:
            cast = dict(zip(weights, Cast.apply(*weights.values()), strict=True))
            model = partial(functional_call, model, cast)
        return super().logits(model, images)

    def repeat(self, step, count):
        """Take a step so many times, giving other slots turns, until the GPU has done them."""
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
        """The replay of a step, captured when it is first asked for."""
        key = step, self.kind if step == self.step else None
        if key not in self.graphs:
            self.warm_up(step)
            graph = torch.cuda.CUDAGraph()
            # One pool of memory for all graphs of a slot, since only one of them runs at a time.
            try:
                with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                    step()
            except torch.AcceleratorError as error:  # the capture's end; its context is the cause
                if out_of_memory(error):
                    raise
                self.cannot_capture(f"({message(error.__context__ or error)})", error)
            self.graphs[key] = graph.replay
        return self.graphs[key]

    def warm_up(self, step):
        """A few steps without a graph. They must not change what a graph would freeze."""
        before = self.frozen_by_capture()
        for _ in range(WARM_UP):
            self.position.zero_()
            step()
            after = self.frozen_by_capture()
            if changed := [what for what in after if after[what] != before.get(what)]:
                self.cannot_capture(f"as it changes {changed[0]}, which a graph would freeze")

    def frozen_by_capture(self):
        """{what: its value now} for all that a graph takes from Python: where tensors are, random
        states, attributes."""
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
        """So many training steps as most of the run's are, of a slot that has evaluated nothing."""
        if self.network is None:
            theta = dict.fromkeys((f"theta{i}" for i in range(8)), 1.0)
            h = self.config.fixed(self.data.augmentation.cutout)
            stand_in = Path("stand-in") if self.config.distillation else None
            self.set_hyperparameters(h | (theta if self.config.evolves_theta else {}),
                                     Task(Individual(0, 0, {}), Path(), teacher=stand_in))
            self.make_networks(seed=0)
        while count > 0:
            self.repeat(self.step, min(count, self.steps))
            count -= self.steps

    @contextmanager
    def turn(self):
        """Within it, this slot's stream and states of the global random generators are in use."""
        generator = torch.cuda.default_generators[self.stream.device_index]
        before = generator.graphsafe_get_state()
        # A graph reads its random state on the device when it runs: with one state for all, a slot
        # would overwrite what another's graph is about to read.
        generator.graphsafe_set_state(self.generator)
        try:
            with random_states_kept(), torch.cuda.stream(self.stream):
                if self.random_states is not None:
                    set_random_states(self.random_states)
                yield
                self.random_states = random_states()
        finally:
            generator.graphsafe_set_state(before)


class Cast(torch.autograd.Function):
    """float32 tensors to bfloat16, and their gradients back, in one kernel each."""

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
    """{name: parameter} of what autocast would cast: the trained float32 parameters of plain
    convolutions and linear layers, if nothing else has them too."""
    plain = nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d
    users = Counter(map(id, dict(model.named_parameters(remove_duplicate=False)).values()))
    return {f"{path}.{name}".lstrip("."): p
            for path, module in model.named_modules() if type(module) in plain
            for name, p in module.named_parameters(recurse=False)
            if p.dtype == torch.float32 and p.requires_grad and users[id(p)] == 1}


def give_turn():
    """Within `Turns`, let the other slots go on; elsewhere nothing."""
    if getcurrent().parent is not None:
        getcurrent().parent.switch()


class Turns:
    """Runs one call a slot, a few steps of each in turn."""

    def __init__(self):
        self.busy = {}  # slot: its greenlet, a call that can be left and taken up again

    def begin(self, slot, call, *arguments):
        self.busy[slot] = greenlet(lambda: call(*arguments))

    def step(self):
        """Give each busy slot its turn. Returns [(slot, what its call returned)] of those that
        ended."""
        ended = []
        for slot, running in list(self.busy.items()):
            with slot.turn():
                result = running.switch()
            if running.dead:
                del self.busy[slot]
                ended.append((slot, result))
        return ended


def make_slots(config, data, count):
    """So many slots; for 0, as many as pay."""
    return [Slot(config, data) for _ in range(count)] or worthwhile_slots(config, data)


def in_turns(slots, tasks):
    """Evaluate tasks, one a slot, a few steps of each in turn. Yields each individual when it is
    done."""
    waiting, idle, turns = list(tasks)[::-1], list(slots), Turns()
    while waiting or turns.busy:
        while waiting and idle:
            slot = idle.pop()
            turns.begin(slot, slot.evaluate, waiting.pop())
        for slot, individual in turns.step():
            idle.append(slot)
            yield individual


def serve_slots(config, data, count, pipe):
    """Evaluate the tasks that come through the pipe in turns. For count 0, tell how many slots
    there are."""
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
    """So many training steps of each of these slots, in turn."""
    turns = Turns()
    for slot in slots:
        turns.begin(slot, slot.rehearse, count)
    while turns.busy:
        turns.step()


def throughput(slots):
    """Training images/s of these slots together."""
    rehearse(slots, 1)  # captures the graphs
    begun = time.perf_counter()
    rehearse(slots, REHEARSAL)
    return sum(REHEARSAL * slot.batch for slot in slots) / (time.perf_counter() - begun)


def worthwhile_slots(config, data):
    """As many slots as pay: their number is doubled while that raises the throughput by a tenth,
    within the memory. It is remembered for the same GPU, model, precision, batch and PyTorch."""
    memory = remembered(config, data)
    slots, best = [], 0.0
    known = json.loads(memory.read_text(encoding="utf-8")) if memory.is_file() else None
    while len(slots) < (known or MOST_SLOTS):
        wanted = known or max(1, 2 * len(slots))
        try:
            more = [Slot(config, data) for _ in range(wanted - len(slots))]
            if known:
                return more
            images = throughput([*slots, *more])
        except RuntimeError as error:
            if not out_of_memory(error) or not slots:
                raise
            break
        if images < best * WORTHWHILE:
            break
        slots, best = [*slots, *more], images
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(memory, json.dumps(len(slots)).encode())
    except (OSError, RunError) as error:
        print(f"the number of slots is not remembered: {message(error)}", file=sys.stderr)
    return slots


def remembered(config, data):
    """The file that remembers how many slots pay."""
    what = [torch.__version__, torch.cuda.get_device_name(), torch.cuda.mem_get_info()[1],
            config.model, config.precision, config.layout, config.batch_size,
            config.distillation > 0, config.average_weights > 0, data.channels, data.height,
            data.width, data.num_classes,
            Path(__file__).read_text(encoding="utf-8")]
    key = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]
    cache = os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return Path(cache) / "epbt" / f"slots-{key}.json"


def out_of_memory(error):
    """Whether a GPU's memory was too small: cuDNN and CUDA have errors of their own for it, and
    within a capture the error is the context of another."""
    words = "out of memory", "unable to find an engine", "ALLOC_FAILED"
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError):
            return True
        if isinstance(error, RuntimeError) and any(word in str(error) for word in words):
            return True
        error = error.__cause__ or error.__context__
    return False
