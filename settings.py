"""PyTorch's global settings for the duration of a run, whatever the caller has set (a Jupyter cell, Lightning, ...).

Without this, a run in the caller's process would give other bits than the same run in worker processes.
"""

import os
from contextlib import ExitStack, contextmanager

import torch

import taylorglo_ext
from errors import RunError

FP32_PRECISION = "fp32_precision"


@contextmanager
def settings(config):
    """Within it, a run depends on its config alone. config: as `epbt.settled` returns it. Raises RunError."""
    device = torch.device(config.device)
    if device.type == "cuda" and config.precision == "bfloat16" and torch.cuda.get_device_capability(device)[0] < 8:
        raise RunError("--precision bfloat16 needs a GPU of compute capability 8.0 or more, not "
                       f"{torch.cuda.get_device_name(device)}")
    if config.deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # read by a process's first call of cuBLAS
    with ExitStack() as stack:
        for get, set_to, value in wanted(config):
            stack.callback(set_to, get())
            set_to(value)
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(kind, enabled=False))
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
        taylorglo_ext.load(config.loss_backend, device.type)
        yield


def wanted(config):
    """(getter, setter, value) of each setting."""
    yield torch.get_num_threads, torch.set_num_threads, config.threads
    yield torch.get_default_dtype, torch.set_default_dtype, torch.float32
    yield torch.get_default_device, torch.set_default_device, "cpu"
    yield torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest"
    yield (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, config.deterministic)
    yield flushes_denormals, torch.set_flush_denormal, False
    cudnn, mkldnn = torch.backends.cudnn, torch.backends.mkldnn
    for owner, name, value in ((cudnn, "enabled", True), (cudnn, "benchmark", not config.deterministic),
                               (cudnn, "deterministic", config.deterministic), (mkldnn, "enabled", True),
                               (mkldnn.conv, FP32_PRECISION, "none"), (mkldnn.matmul, FP32_PRECISION, "none"),
                               (cudnn.conv, FP32_PRECISION, "tf32")):
        yield (lambda o=owner, n=name: getattr(o, n)), (lambda v, o=owner, n=name: setattr(o, n, v)), value


def flushes_denormals():
    """PyTorch has no getter."""
    return not bool(torch.full((1,), 1e-40, device="cpu") * 1)
