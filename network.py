"""A network's tensors by name: what a child inherits (Sec. 3.2, step 2b)."""

import torch

from errors import RunError


class Network:
    """A model on its device, the momentum of its SGD and, if averaged, the exponential moving
    average (EMA) of its weights."""

    def __init__(self, model, device, layout, averaged=False):
        model.to(device)  # not model = model.to(device): a user's to() may return nothing
        self.model = model
        if layout == "channels-last":
            for p in model.parameters():
                if p.ndim == 4:
                    p.data = p.data.to(memory_format=torch.channels_last)
        self.momentum = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        tensors = named_tensors(model) if averaged else ()
        self.average = {name: t.detach().clone() for name, t in tensors}

    def tensors(self):
        """The state by name, such as "model/conv.weight" and "momentum/conv.weight"."""
        model = {name: t.detach() for name, t in named_tensors(self.model)}
        parts = {"model": model, "momentum": self.momentum, "average": self.average}
        return {f"{part}/{name}": t for part, some in parts.items() for name, t in some.items()}

    def load_model(self, state):
        """Give the model the scored tensors of a state."""
        load_tensors(part(self.tensors(), "model"), model_tensors(state))

    @torch.no_grad()
    def move_average(self, weight):
        """Move the average a fraction `weight` of the way to the weights; copy integers."""
        new = dict(named_tensors(self.model))
        numbers = [name for name, mean in self.average.items() if mean.is_floating_point()]
        mean, to = ([of[name] for name in numbers] for of in (self.average, new))
        torch._foreach_lerp_(mean, to, weight)
        for name in self.average.keys() - numbers:
            self.average[name].copy_(new[name])


def named_tensors(model):
    """(name, tensor) of every parameter and buffer. A shared tensor has only its first name."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def plain_attributes(model):
    """{"layer.name": a value to compare} of what modules keep beside parameters and buffers."""
    def comparable(value):
        if isinstance(value, torch.Tensor):
            return id(value), value._version
        return repr((value, getattr(value, "__dict__", None)))

    usual = vars(torch.nn.Module())
    return {f"{path}.{key}".lstrip("."): comparable(value) for path, module in model.named_modules()
            for key, value in vars(module).items() if key not in usual}


@torch.no_grad()
def load_tensors(target, source):
    """Copy `source` into `target`, both {name: tensor}. Raises RunError if they do not match."""
    for name in target | source:
        ours, theirs = ("none" if t is None else f"{t.dtype} {tuple(t.shape)}"
                        for t in (target.get(name), source.get(name)))
        if ours != theirs:
            raise RunError("the weights in the run's folder are of another model, or it has "
                           f"changed: of the tensor {name} it has {ours}, the folder {theirs}")
    torch._foreach_copy_(list(target.values()), [source[name] for name in target])


def model_tensors(state):
    """The tensors of a state that are scored, teach and are delivered, {"model/...": tensor}: the
    EMA of the weights if there is one (Config.average_weights), else the weights."""
    return part(state, "average") or part(state, "model")


def part(state, kind):
    """The tensors of one kind, {"model/...": tensor}."""
    return {name.replace(kind, "model", 1): t for name, t in state.items()
            if name.startswith(f"{kind}/")}


def all_finite(state):
    """Whether no number of a state is infinite or NaN."""
    numbers = [t for t in state.values() if t.numel() and (t.is_floating_point() or t.is_complex())]
    return all(norm.isfinite() for norm in torch._foreach_norm(numbers, ord=torch.inf))
