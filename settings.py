"""PyTorch's global settings for the duration of a run.

The caller (a Jupyter cell, Lightning, ...) may have changed them. Without this, a run in its
process would give other bits than the same run in workers.
"""

import os
import sys
from contextlib import ExitStack, contextmanager, redirect_stderr, suppress
from functools import partial

import numpy as np
import torch

import taylorglo_ext
from errors import RunError


@contextmanager
def settings(config):
    """Within it, a run depends on its config alone. config: of `epbt.settled`. Raises RunError."""
    device = torch.device(config.device)
    if (device.type == "cuda" and config.precision == "bfloat16"
            and torch.cuda.get_device_capability(device)[0] < 8):
        raise RunError("--precision bfloat16 needs a GPU of compute capability 8.0 or more, not "
                       f"{torch.cuda.get_device_name(device)}")
    if config.deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # read by the first call of cuBLAS
    with ExitStack() as stack:
        # Read all settings before one is set, since some change others.
        for set_to, before, value in [(s, get(), value) for get, s, value in wanted(config)]:
            stack.callback(set_to, before)
            set_to(value)
        if torch.get_default_device().type != "cpu":  # only then: the context slows every call
            stack.enter_context(torch.device("cpu"))
        for kind in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(kind, enabled=False))
        if sys.stderr is None:  # it is closed, and progress bars write to it
            nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(redirect_stderr(nowhere))
        stack.enter_context(torch.inference_mode(False))  # enables gradients too
        stack.enter_context(np.errstate(all="ignore"))
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
        taylorglo_ext.load(config.loss_backend, device.type)
        yield


def wanted(config):
    """(getter, setter, value) of each setting."""
    yield torch.get_num_threads, torch.set_num_threads, config.threads
    yield torch.get_default_dtype, torch.set_default_dtype, torch.float32
    # torch.use_deterministic_algorithms does the same, but imports PyTorch's compiler: a second.
    yield (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode,
           "error" if config.deterministic else "default")
    yield flushes_denormals, torch.set_flush_denormal, False
    cudnn, mkldnn, precision = torch.backends.cudnn, torch.backends.mkldnn, "fp32_precision"
    for owner, name, value in (
            (mkldnn, "enabled", True), (cudnn, "enabled", True),
            (cudnn, "benchmark", not config.deterministic),
            (cudnn, "deterministic", config.deterministic),
            *((kind, precision, "ieee") for kind in (mkldnn.conv, mkldnn.matmul, mkldnn.rnn)),
            *((kind, precision, "tf32") for kind in (cudnn.conv, cudnn.rnn)),
            (torch.backends.cuda.matmul, precision, "ieee")):
        yield partial(getattr, owner, name), partial(setattr, owner, name), value
    yield matmul_precision, set_matmul_precision, "highest"


def flushes_denormals():
    """Whether tiny results become 0. PyTorch has no getter."""
    return not torch.full((1,), 1e-40, dtype=torch.float32, device="cpu") * 1


def matmul_precision():
    """PyTorch's old setting, or None if the caller mixed it with the new ones: PyTorch then raises
    RuntimeError."""
    with suppress(RuntimeError):
        return torch.get_float32_matmul_precision()


def set_matmul_precision(value):
    if value is not None:
        torch.set_float32_matmul_precision(value)
