"""Several individuals on one GPU. Without one, stand-ins play CUDA: a captured graph is the list of
the operations that a step carried out, and a replay repeats them on the same tensors. So what a
graph would freeze is frozen here too."""

import contextlib
import copy
import random
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small import EVOLVED, TAYLORGLO, assert_close, configured, data, small, state_of, task
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import slots
import taylorglo_ext
from errors import RunError
from settings import settings
from slots import Slot, make_slots
from training import Trainer
from workers import ThisProcess

pytestmark = pytest.mark.usefixtures("one_thread")


class Operations(TorchDispatchMode):
    """Stands in for torch.cuda.CUDAGraph."""

    def __init__(self):
        super().__init__()
        self.done = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            raise torch.AcceleratorError("operation not permitted when stream is capturing")
        result = function(*args, **(kwargs or {}))
        self.done.append((function, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def replay(self):
        for function, args, kwargs, before in self.done:
            given = {t.untyped_storage().data_ptr() for t in tensors((args, kwargs))}
            for old, new in zip(tensors(before), tensors(function(*args, **kwargs)), strict=True):
                if old.untyped_storage().data_ptr() not in given:  # else it is a view, or in place
                    old.copy_(new)


def tensors(tree):
    return [t for t in tree_flatten(tree)[0] if isinstance(t, torch.Tensor)]


@contextlib.contextmanager
def capture(graph, pool, stream):
    with graph:
        yield


@pytest.fixture(params=["cpu", pytest.param("cuda:0", marks=pytest.mark.cuda)])
def device(request, monkeypatch):
    if request.param == "cpu":
        event = SimpleNamespace(query=iter([False, True] * 10_000).__next__)
        stream = SimpleNamespace(device_index=0, record_event=lambda: event)
        states = [object()]  # of the device's generator, which in its turn must have the slot's
        generator = SimpleNamespace(graphsafe_get_state=lambda: states[-1],
                                    graphsafe_set_state=states.append)
        for name, stand_in in dict(
                Stream=lambda device: stream, graph_pool_handle=lambda: None, CUDAGraph=Operations,
                synchronize=lambda device: None, default_generators=[generator], graph=capture,
                stream=lambda stream: contextlib.nullcontext(),
                get_device_name=lambda: "a stand-in", mem_get_info=lambda: (1, 2)).items():
            monkeypatch.setattr(torch.cuda, name, stand_in)
        # On a CPU these two look at the labels.
        monkeypatch.setattr(taylorglo_ext, "check_labels", lambda *ignored: None)
        monkeypatch.setattr(F, "one_hot", lambda x, n: (x[:, None] == torch.arange(n)).long())
        yield request.param
        assert states[-1] is states[0]
    else:
        yield request.param


def slots_of(device, count, model, **given):
    model = f"test_slots:{model}" if model[0].isupper() else model
    config = configured(model, device=device, deterministic=device != "cpu", **given)
    return [Slot(config, data().to(device)) for _ in range(count)]


def in_turns(some, tasks):
    """The states that the tasks end with, evaluated by these slots in turn."""
    with settings(some[0].config):  # without it cuDNN may choose kernels that add in any order
        done = list(slots.in_turns(some, map(copy.deepcopy, tasks)))
    assert {m.id for m in done} == {t.individual.id for t in tasks}
    return [state_of(t) for t in tasks]


def generations(folder):
    """Tasks whose steps differ in their operations, and in what must not be frozen."""
    children = [task(folder, 3, EVOLVED | {"cutout": 4.0}, 1, parent=0, teacher=1, alpha=0.4),
                task(folder, 4, TAYLORGLO | {"momentum": 0.2, "theta6": -4.0}, 1, 1, 0, alpha=0.8),
                task(folder, 5, {"lr_scale": 1e300}, 1, parent=0, teacher=0, alpha=0.1),
                task(folder, 6, {}, 1, parent=2, teacher=2, alpha=0.6)]
    parents = [task(folder, 0, EVOLVED), task(folder, 1, TAYLORGLO | {"cutout": 0.0})]
    return [*parents, task(folder, 2)], children


@small(steps=torch.zeros((), dtype=torch.int32))
def Dropping(model, x):
    if model.training:
        model.steps += 1
        return F.dropout(torch.ones(len(x), 128, device=x.device), 0.3) * (1 + model.steps)


@pytest.mark.parametrize("given", [
    {}, dict(average_weights=0.5, add_cross_entropy=True), dict(no_graphs=True),
    dict(loss_backend="fused")], ids=str)
@pytest.mark.parametrize("model", ["Dropping", "resnet8"])
def test_slots_in_turn_train_as_one_alone_and_as_a_plain_trainer(model, given, device, tmp_path):
    some = slots_of(device, 3, model, **given)
    plain = Trainer(some[0].config, some[0].data)
    with settings(plain.config):
        slots.rehearse(some[1:], 5)  # leaves no trace
        graphs = 0 if plain.config.no_graphs else 2  # of training and of scoring
        assert [len(slot.graphs) for slot in some] == [0, graphs, graphs]
        for tasks in generations(tmp_path):
            apart = in_turns(some[:1], tasks)
            states = {t.individual.id: state for t, state in zip(tasks, apart, strict=True)}
            for state, expected in zip(in_turns(some[1:], tasks), states.values(), strict=True):
                assert_close(state, expected, rtol=0, atol=0, equal_nan=True)
            for t in tasks:
                plain.evaluate(copy.deepcopy(t))
                # On a GPU a folded teacher rounds to TF32 in another way: 4e-3 was seen.
                rtol, atol = (1e-3, 1e-4) if device == "cpu" else (5e-2, 1e-2)
                assert_close(states[t.individual.id], state_of(t), rtol=rtol, atol=atol,
                             equal_nan=True)
    assert all(bool(slot.graphs) != given.get("no_graphs", False) for slot in some)


@pytest.mark.parametrize("model", ["Dropping", "resnet8"])
def test_bfloat16_weights_cast_at_once_are_those_that_autocast_casts(model, device, tmp_path):
    slot, = slots_of(device, 1, model, precision="bfloat16")
    tasks = [task(tmp_path, 0, EVOLVED), task(tmp_path, 1, {})]
    found, plain = in_turns([slot], tasks), Trainer(slot.config, slot.data)
    with settings(plain.config):
        for t, state in zip(tasks, found, strict=True):
            plain.evaluate(copy.deepcopy(t))
            assert_close(state, state_of(t), rtol=0, atol=0)


def test_only_what_nothing_else_uses_is_cast():
    model = torch.nn.ModuleDict(dict(
        conv=torch.nn.Conv2d(3, 4, 3), norm=torch.nn.BatchNorm2d(4), fc=torch.nn.Linear(4, 4),
        tied=torch.nn.Linear(4, 4), exact=torch.nn.Linear(4, 4).double(),
        frozen=torch.nn.Linear(4, 4).requires_grad_(False), table=torch.nn.Embedding(4, 4)))
    model["tied"].weight = model["table"].weight
    weights = slots.autocast_weights(model)
    assert list(weights) == ["conv.weight", "conv.bias", "fc.weight", "fc.bias", "tied.bias"]
    cast = slots.Cast.apply(*weights.values())
    upstream = torch.randn(cast[0].shape).bfloat16()
    (cast[0] * upstream).sum().backward()
    assert torch.equal(weights["conv.weight"].grad, upstream.float())
    assert weights["fc.weight"].grad is None and {t.dtype for t in cast} == {torch.bfloat16}


@pytest.mark.cuda
@pytest.mark.parametrize("workers", [0, 2])
def test_a_notebooks_process_has_the_slots_of_a_gpu(workers, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tasks = [task(tmp_path, i, EVOLVED) for i in range(3)]
    config = configured("resnet8", device="cuda", deterministic=True, workers=workers)
    with contextlib.closing(ThisProcess(config, data())) as pool:
        assert sorted(m.id for m in pool.run(map(copy.deepcopy, tasks))) == [0, 1, 2]
    found, alone = [state_of(t) for t in tasks], slots_of("cuda:0", 1, "resnet8")
    for state, expected in zip(found, in_turns(alone, tasks), strict=True):
        assert_close(state, expected, rtol=0, atol=0)


@small()
def Drawing(model, x):
    """Draws from the generators of PyTorch, NumPy and Python in every step."""
    if model.training:
        return random.random() + np.random.rand() + torch.rand(1).item()


def test_what_a_slot_carries_out_has_numpys_error_settings(device):
    (slot,), turns = slots_of(device, 1, "resnet8"), slots.Turns()
    with np.errstate(all="ignore"):
        turns.begin(slot, np.geterr)
        ((_, found),) = turns.step()
    assert set(found.values()) == {"ignore"}


def test_each_slot_has_random_states_of_its_own(device, tmp_path):
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    slot, *others = slots_of(device, 3, "Drawing", no_graphs=True)
    tasks = [task(tmp_path, i) for i in range(4)]
    for state, expected in zip(in_turns(others, tasks), in_turns([slot], tasks), strict=True):
        assert_close(state, expected, rtol=0, atol=0)
    assert torch.equal(states[0], torch.get_rng_state()) and states[2] == random.getstate()
    assert states[1] == np.random.get_state()[1].tolist()


# What a graph would freeze.


def hide(model, x):
    holder = vars(model).setdefault("holder", contextlib.ExitStack())  # its repr tells nothing
    holder.calls = getattr(holder, "calls", 0) + 1


def begin(model, x):
    """Initialise from the first images."""
    if not hasattr(model, "begun"):
        model.begun = True
        model.fc.weight.data.mul_(x.mean())


def thaw(model, x):
    model.fc.requires_grad_(not model.fc.weight.requires_grad)


ACTS = {  # what a model does in each step, and what its refusal says
    "Counting": (lambda model, x: setattr(model, "calls", getattr(model, "calls", 0) + 1),
                 "as it changes the attribute calls,"),
    "Hiding": (hide, "as it changes the attribute holder,"),
    "Beginning": (begin, "as it changes the attribute begun,"),
    "Replacing": (lambda model, x: setattr(model.bn, "running_var", model.bn.running_var * 0.9),
                  "as it changes the tensor bn.running_var,"),
    "Thawing": (thaw, "as it changes the tensor fc.weight,"),
    "Pythons": (lambda model, x: random.random(), "as it changes the state of Python's random"),
    "NumPys": (lambda model, x: np.random.rand(), "as it changes the state of NumPy's random"),
    "Peeking": (lambda model, x: 1 if x.sum().item() else 2,
                "(operation not permitted when stream is capturing)"),
}
for name, (act, _) in ACTS.items():
    act.__name__ = name
    globals()[name] = small()(act)


@pytest.mark.parametrize("model", ACTS)
def test_what_a_graph_would_freeze_is_refused_in_one_line(model, device, tmp_path):
    if device != "cpu" and model == "Peeking":
        pytest.skip("the process does not recover: test_workers.py")
    with pytest.raises(RunError) as error:
        in_turns(slots_of(device, 1, model), [task(tmp_path)])
    said = (f"model test_slots:{model}: its training step cannot be captured as a CUDA graph "
            f"{ACTS[model][1]}")
    assert str(error.value).startswith(said) and str(error.value).endswith("use --no-graphs")
    in_turns(slots_of(device, 1, model, no_graphs=True), [task(tmp_path)])


# How many slots pay.


def hidden(error):
    """As an error within a capture arrives: behind that of the capture's end."""
    error.__context__ = None
    outer = RuntimeError("capture failed")
    outer.__context__ = error
    return outer


MEMORY = [torch.OutOfMemoryError("CUDA out of memory"), torch.AcceleratorError("out of memory"),
          RuntimeError("GET was unable to find an engine to execute this computation"),
          RuntimeError("CUDNN_STATUS_ALLOC_FAILED"), hidden(torch.OutOfMemoryError("too much"))]


@pytest.fixture
def measured(device, monkeypatch, tmp_path):
    """The slots that make_slots makes where each number of them has its throughput."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def find(throughputs, **given):
        def throughput(some):
            found = throughputs[len(some)]
            if isinstance(found, Exception):
                raise found
            return found
        monkeypatch.setattr(slots, "throughput", throughput)
        return make_slots(configured(device=device, **given), data(), 0)
    return find


@pytest.mark.parametrize("throughputs, count", [
    ({1: 100, 2: 109}, 1), ({1: 100, 2: 111, 4: 120}, 2), ({1: 1, 2: 2, 4: 4, 8: 8, 16: 16}, 16),
    *(({1: 100, 2: 150, 4: error}, 2) for error in MEMORY)])
def test_slots_are_doubled_while_it_pays_and_fits_and_remembered(throughputs, count, measured):
    assert len(measured(throughputs)) == count
    assert len(measured({})) == count  # nothing is measured again


def test_no_more_slots_than_networks(measured):
    assert len(measured({1: 1, 2: 2, 4: 4, 5: 5}, population=5)) == 5


def test_slots_that_are_tried_and_not_used_are_given_back(measured, monkeypatch):
    made = []

    class Counted(Slot):
        def __init__(self, *given):
            super().__init__(*given)
            made.append(weakref.ref(self))

    monkeypatch.setattr(slots, "Slot", Counted)
    kept = measured({1: 100, 2: 150, 4: 151})
    assert [slot() for slot in made] == [*kept, None, None]


def test_slots_without_memory_in_a_notebook_end_in_one_line(device, tmp_path, monkeypatch):
    def train(*ignored):
        raise MEMORY[0]
    monkeypatch.setattr(Slot, "train", train)
    with pytest.raises(RunError, match="^2 individuals at once do not fit.* --workers.*CUDA out"):
        in_turns(slots_of(device, 2, "resnet8"), [task(tmp_path, 0, EVOLVED)])


@pytest.mark.parametrize("throughputs", [{1: MEMORY[0]}, {1: 1, 2: ValueError("another")}])
def test_an_error_that_fewer_slots_would_not_mend_is_raised(throughputs, measured):
    with pytest.raises((RuntimeError, ValueError)):
        measured(throughputs)


def test_a_cache_that_cannot_be_written_is_told_and_costs_nothing_else(measured, tmp_path, capsys):
    (tmp_path / "cache").write_text("a file", encoding="utf-8")
    assert len(measured({1: 100, 2: 100})) == 1
    assert "the number of slots is not remembered: " in capsys.readouterr().err
