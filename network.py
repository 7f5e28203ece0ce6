"""A network with its momentum: the tensors that a child inherits, by name (Sec. 3.2, step 2b)."""

import torch

from errors import RunError


class Network:
    """A model on its device with the momentum of its SGD: all that a child inherits (Sec. 3.2)."""

    def __init__(self, model, device, layout):
        model.to(device)  # and what it returns is its own affair
        self.model = model
        if layout == "channels-last":
            for p in model.parameters():
                if p.ndim == 4:
                    p.data = p.data.to(memory_format=torch.channels_last)
        self.momentum = {name: torch.zeros_like(p) for name, p in model.named_parameters()}

    def tensors(self):
        """The state by name, such as "model/conv.weight" and "momentum/conv.weight"."""
        return ({f"model/{name}": tensor.detach() for name, tensor in named_tensors(self.model)}
                | {f"momentum/{name}": buffer for name, buffer in self.momentum.items()})


def named_tensors(model):
    """(name, tensor) of every parameter and buffer; a shared one has one name."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def plain_attributes(model):
    """{"layer.name": value} of what the model's modules keep outside their parameters and buffers,
    comparable."""
    def comparable(value):
        if isinstance(value, torch.Tensor):
            return id(value), value._version
        return repr((value, getattr(value, "__dict__", None)))

    usual = vars(torch.nn.Module())
    return {f"{path}.{key}".lstrip("."): comparable(value) for path, module in model.named_modules()
            for key, value in vars(module).items() if key not in usual}


@torch.no_grad()
def load_tensors(target, source):
    """Copy the tensors of `source` into those of `target`, by name. Raises RunError if they do not
    match."""
    for name in target | source:
        ours, theirs = ("none" if t is None else f"{t.dtype} {tuple(t.shape)}"
                        for t in (target.get(name), source.get(name)))
        if ours != theirs:
            raise RunError("the weights in the run's folder are of another model, or it has "
                           f"changed: of the tensor {name} it has {ours}, the folder {theirs}")
    torch._foreach_copy_(list(target.values()), [source[name] for name in target])


def model_tensors(state):
    """The part of an individual's state that is scored, teaches and is delivered: {"model/...":
    tensor}. It is the running mean of the weights where there is one (Config.average_weights)."""
    return part(state, "average", "model") or part(state, "model", "model")


def part(state, kind, called):
    """The tensors of one kind, called as of another."""
    return {name.replace(kind, called, 1): t for name, t in state.items()
            if name.startswith(f"{kind}/")}


def all_finite(state):
    """Whether no number of a state is infinite or NaN."""
    numbers = [t for t in state.values() if t.numel() and (t.is_floating_point() or t.is_complex())]
    return all(norm.isfinite() for norm in torch._foreach_norm(numbers, ord=torch.inf))
