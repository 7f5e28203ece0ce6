"""The TaylorGLO loss in plain PyTorch: slow, short, differentiated by autograd, and the ground truth of the tests.

In Eq. 2, x is the LABEL (one-hot, or distilled by Eq. 3) and y is the PREDICTION (the softmax of the logits); this is the
reverse of the usual habit. n is the number of classes.
"""

import torch
from torch import Tensor

LOGITS_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
THETA_DTYPES = (torch.float64, torch.float32)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums are taken, and in which the loss is returned: float64 for float64, float32 for the rest."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def widen(logits: Tensor | None) -> Tensor | None:
    """Half-precision logits in float32."""
    return logits.float() if logits is not None and logits.dtype in (torch.float16, torch.bfloat16) else logits


def reference_loss(
    logits: Tensor, labels: Tensor, theta: Tensor, teacher_logits: Tensor | None = None, alpha: float | Tensor | None = None
) -> Tensor:
    """Eq. 2 and Eq. 3, averaged over the batch. Arguments as for :func:`taylorglo_ext.taylorglo_loss`, taken as checked.

    Nothing here looks at a value on the host, so it can be compiled without a graph break and captured in a CUDA graph.
    A label outside [0, C) makes the loss and that row's gradient NaN.
    """
    dtype, classes = accumulate_dtype(logits.dtype), logits.shape[1]
    y = torch.softmax(logits.to(dtype), dim=1)
    x = (labels[:, None] == torch.arange(classes, device=labels.device)).to(dtype)  # one-hot
    x = torch.where(((labels >= 0) & (labels < classes))[:, None], x, float("nan"))
    if teacher_logits is not None:  # Eq. 3
        x = alpha * torch.softmax(teacher_logits.detach().to(dtype), dim=1) + (1 - alpha) * x
    return eq2(x, y, theta.detach().to(dtype).unbind()).mean()  # the mean over the batch


def eq2(x, y, theta):
    """Eq. 2 for labels x and predictions y (..., C), tensors or arrays; theta: eight numbers. Returns (...)."""
    t0, t1, t2, t3, t4, t5, t6, t7 = theta
    a, b = y - t1, x - t0
    f = (
        t2 * a + t3 * a**2 / 2 + t4 * a**3 / 6
        + t5 * b * a + t6 * b * a**2 / 2 + t7 * b**2 * a / 2
    )  # fmt: skip
    return -f.mean(-1)  # 1/n over the classes


def check_inputs(
    logits: Tensor, labels: Tensor, theta: Tensor, teacher_logits: Tensor | None, alpha: float | Tensor | None
) -> None:
    """Raise the error that the fused operator raises for the same bad argument (inputs.h, ``check_inputs``)."""
    if logits.dtype not in LOGITS_DTYPES:
        raise TypeError(f"logits: expected float64, float32, float16 or bfloat16, got {logits.dtype}")
    if logits.dim() != 2 or logits.shape[1] < 1:
        raise ValueError(f"logits: expected shape (B, C) with C >= 1, got {tuple(logits.shape)}")
    if labels.dtype != torch.int64:
        raise TypeError(f"labels: expected int64, got {labels.dtype}")
    if tuple(labels.shape) != (logits.shape[0],):
        raise ValueError(f"labels: expected shape ({logits.shape[0]},) to match logits, got {tuple(labels.shape)}")
    if theta.dtype not in THETA_DTYPES:
        raise TypeError(f"theta: expected float32 or float64, got {theta.dtype}")
    if tuple(theta.shape) != (8,):
        raise ValueError(f"theta: expected shape (8,), got {tuple(theta.shape)}")
    _check_teacher(logits, teacher_logits, alpha)
    for name, tensor in (("labels", labels), ("theta", theta), ("teacher_logits", teacher_logits), ("alpha", alpha)):
        if isinstance(tensor, Tensor) and tensor.device != logits.device:
            raise ValueError(f"{name}: expected on {logits.device} like logits, got {tensor.device}")


def _check_teacher(logits: Tensor, teacher_logits: Tensor | None, alpha: float | Tensor | None) -> None:
    if teacher_logits is None:
        if alpha is not None:
            raise ValueError("alpha: given without teacher_logits")
        return
    if alpha is None:
        raise ValueError("alpha: needed with teacher_logits")
    if teacher_logits.dtype != logits.dtype:
        raise TypeError(f"teacher_logits: expected {logits.dtype} like logits, got {teacher_logits.dtype}")
    if teacher_logits.shape != logits.shape:
        shapes = f"{tuple(logits.shape)} like logits, got {tuple(teacher_logits.shape)}"
        raise ValueError(f"teacher_logits: expected shape {shapes}")
    if isinstance(alpha, Tensor):
        if alpha.dim() != 0 or alpha.dtype not in THETA_DTYPES:
            raise ValueError(f"alpha: expected a 0-d float32 or float64 tensor, got {alpha.dtype} {tuple(alpha.shape)}")
    elif not 0 <= alpha <= 1:
        raise ValueError(f"alpha: expected a number in [0, 1], got {alpha}")


def check_labels(labels: Tensor, classes: int) -> None:
    """Raise ValueError for a label outside [0, classes). Reads the values, so it is for the CPU only."""
    if labels.numel() and not bool(((labels >= 0) & (labels < classes)).all()):
        low, high = int(labels.min()), int(labels.max())
        raise ValueError(f"labels: expected in [0, {classes}), got values from {low} to {high}")
