"""The TaylorGLO loss in plain PyTorch: slow, short, differentiated by autograd, and the ground truth of
the tests; and the checks of its arguments, for every backend.

In Eq. 2, x is the LABEL (one-hot, or distilled by Eq. 3) and y is the PREDICTION (the softmax of the
logits); this is the reverse of the usual habit. n is the number of classes.
"""

import torch
from torch import Tensor

LOGITS_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
THETA_DTYPES = (torch.float64, torch.float32)
REDUCTIONS = ("none", "mean", "sum")


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the sums and of the loss: float64 for float64, float32 for the rest."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def reference_loss(
    logits: Tensor, labels: Tensor, theta: Tensor, teacher_logits: Tensor | None = None,
    alpha: float | Tensor | None = None, ignore_index: int | None = None, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """Eq. 2 and Eq. 3 for logits (B, C). Arguments as for :func:`taylorglo_ext.taylorglo_loss`, taken
    as checked; ignore_index None: every label counts.

    Nothing here looks at a value on the host, so it can be compiled without a graph break and captured
    in a CUDA graph. A label outside [0, C) makes the loss and that row's gradient NaN.
    """
    dtype, classes = accumulate_dtype(logits.dtype), logits.shape[1]
    kept = None if ignore_index is None else labels != ignore_index
    if kept is not None:
        labels = labels.where(kept, 0)
    y = torch.softmax(logits.to(dtype), dim=1)
    x = (labels[:, None] == torch.arange(classes, device=labels.device)).to(dtype)  # one-hot
    x = torch.where(((labels >= 0) & (labels < classes))[:, None], x, float("nan"))
    if teacher_logits is not None:  # Eq. 3
        x = alpha * torch.softmax(teacher_logits.detach().to(dtype), dim=1) + (1 - alpha) * x
    return reduce(eq2(x, y, theta.detach().to(dtype).unbind()), kept, reduction)


def reduce(losses: Tensor, kept: Tensor | None, reduction: str) -> Tensor:
    """The losses, their sum or their mean, without those that are not kept (None: all are)."""
    if kept is not None:
        losses = torch.where(kept, losses, 0)
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    return losses.mean() if kept is None else losses.sum() / kept.sum()


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
    logits: Tensor, labels: Tensor, theta: Tensor, teacher_logits: Tensor | None,
    alpha: float | Tensor | None, reduction: str = "mean",
) -> None:  # fmt: skip
    """Raise the TypeError or ValueError that names the argument which the loss does not take."""
    tensors = [("logits", logits), ("labels", labels), ("theta", theta)]
    if teacher_logits is not None:
        tensors.append(("teacher_logits", teacher_logits))
    for name, tensor in tensors:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if logits.dtype not in LOGITS_DTYPES:
        raise TypeError(f"logits: expected float64, float32, float16 or bfloat16, got {logits.dtype}")
    shape = logits.shape
    if len(shape) < 2 or shape[1] < 1:
        raise ValueError(f"logits: expected shape (B, C, ...) with C >= 1, got {tuple(shape)}")
    if labels.dtype != torch.int64:
        raise TypeError(f"labels: expected int64, got {labels.dtype}")
    expected = (shape[0], *shape[2:])
    if labels.shape != expected:
        raise ValueError(f"labels: expected shape {expected} to match logits, got {tuple(labels.shape)}")
    if theta.dtype not in THETA_DTYPES:
        raise TypeError(f"theta: expected float32 or float64, got {theta.dtype}")
    if theta.shape != (8,):
        raise ValueError(f"theta: expected shape (8,), got {tuple(theta.shape)}")
    if teacher_logits is not None or alpha is not None:
        _check_teacher(logits, teacher_logits, alpha)
        tensors.append(("alpha", alpha))
    for name, tensor in tensors[1:]:
        if isinstance(tensor, Tensor) and tensor.device != logits.device:
            raise ValueError(f"{name}: expected on {logits.device} like logits, got {tensor.device}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected 'none', 'mean' or 'sum', got {reduction!r}")


def _check_teacher(logits: Tensor, teacher_logits: Tensor | None, alpha: float | Tensor | None) -> None:
    if teacher_logits is None:
        raise ValueError("alpha: given without teacher_logits")
    if alpha is None:
        raise ValueError("alpha: needed with teacher_logits")
    if teacher_logits.dtype != logits.dtype:
        raise TypeError(f"teacher_logits: expected {logits.dtype} like logits, got {teacher_logits.dtype}")
    if teacher_logits.shape != logits.shape:
        raise ValueError(f"teacher_logits: expected shape {tuple(logits.shape)} like logits, "
                         f"got {tuple(teacher_logits.shape)}")
    if isinstance(alpha, Tensor):
        if alpha.dim() != 0 or alpha.dtype not in THETA_DTYPES:
            raise ValueError(f"alpha: expected a 0-d float32 or float64 tensor, got {alpha.dtype} {tuple(alpha.shape)}")
    elif not 0 <= alpha <= 1:
        raise ValueError(f"alpha: expected a number in [0, 1], got {alpha}")


def check_labels(labels: Tensor, classes: int, ignore_index: int | None = None) -> None:
    """Raise ValueError for a label outside [0, classes). Reads the values, so it is for the CPU only."""
    wrong = (labels < 0) | (labels >= classes)
    if ignore_index is not None:
        wrong &= labels != ignore_index
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(f"labels: expected in [0, {classes}), got {int(labels[row])} in row {row}")
