"""The TaylorGLO loss in plain PyTorch, which the tests take as true, and the checks of its input.

In Eq. 2, x is the LABEL (one-hot, or distilled by Eq. 3) and y is the PREDICTION (the softmax of
the logits); this is the reverse of the usual habit. n is the number of classes.
"""

from numbers import Real

import torch
from torch import Tensor

LOGITS_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
THETA_DTYPES = (torch.float64, torch.float32)
REDUCTIONS = ("none", "mean", "sum")


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the sums and of the loss: float64 for float64, float32 for the rest."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def reference_loss(
    logits: Tensor, labels: Tensor, theta: Tensor, teacher_logits=None, alpha=None,
    ignore_index=None, reduction="mean",
) -> Tensor:  # fmt: skip
    """Eq. 2 and Eq. 3 for logits (B, C). The arguments of ``taylorglo_loss``, not checked again.

    The host reads no value, so torch.compile has no graph break and a CUDA graph can capture it. A
    label outside [0, C) makes the loss and that row's gradient NaN.
    """
    dtype, classes = accumulate_dtype(logits.dtype), logits.shape[1]
    kept = None if ignore_index is None else labels != ignore_index
    if kept is not None:
        labels = labels.where(kept, 0)
    y = torch.softmax(logits.to(dtype), dim=1)
    x = (labels[:, None] == torch.arange(classes, device=labels.device)).to(dtype)  # one-hot
    x = torch.where(((labels >= 0) & (labels < classes))[:, None], x, float("nan"))
    if teacher_logits is not None:  # Eq. 3
        x = eq3(x, teacher_logits.to(dtype), alpha)
    return reduce(eq2(x, y, theta.detach().to(dtype).unbind()), kept, reduction)


def eq3(one_hot, teacher_logits, alpha):
    """Eq. 3: the labels of distillation (B, C, ...). No gradient flows to teacher or alpha."""
    alpha = alpha.detach() if isinstance(alpha, Tensor) else alpha
    return alpha * teacher_logits.detach().softmax(dim=1) + (1 - alpha) * one_hot


def reduce(losses: Tensor, kept: Tensor | None, reduction: str) -> Tensor:
    """The losses that are kept (None: all), their sum or their mean."""
    losses = losses if kept is None else torch.where(kept, losses, 0)
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    return losses.mean() if kept is None else losses.sum() / kept.sum()


def eq2(x, y, theta):
    """Eq. 2 for labels x and predictions y (..., C); theta: eight numbers."""
    t0, t1, t2, t3, t4, t5, t6, t7 = theta
    a, b = y - t1, x - t0
    f = (
        t2 * a + t3 * a**2 / 2 + t4 * a**3 / 6
        + t5 * b * a + t6 * b * a**2 / 2 + t7 * b**2 * a / 2
    )  # fmt: skip
    return -f.mean(-1)  # 1/n over the classes


def check_inputs(
    logits, labels, theta, teacher_logits, alpha, reduction="mean", *, most_dims=None
) -> None:  # fmt: skip
    """Raise a TypeError or ValueError that names a wrong argument of ``taylorglo_loss``.

    most_dims: of the logits, if only so many are accepted."""
    tensors = {"logits": logits, "labels": labels, "theta": theta}
    distilled = teacher_logits is not None
    if distilled:
        tensors["teacher_logits"] = teacher_logits
    for name, t in tensors.items():
        _expect(isinstance(t, Tensor), name, "a tensor", type(t).__name__, TypeError)
    dtypes = "float64, float32, float16 or bfloat16"
    _expect(logits.dtype in LOGITS_DTYPES, "logits", dtypes, logits.dtype, TypeError)
    _expect(labels.dtype == torch.int64, "labels", "int64", labels.dtype, TypeError)
    _expect(theta.dtype in THETA_DTYPES, "theta", "float32 or float64", theta.dtype, TypeError)
    shape = logits.shape
    _expect(len(shape) > 1 and shape[1] > 0, "logits", "shape (B, C, ...) with C >= 1", shape)
    of_labels = (shape[0], *shape[2:])
    _expect(labels.shape == of_labels, "labels", "shape (B, ...) to match logits", labels.shape)
    if most_dims:
        _expect(len(shape) <= most_dims, "logits", f"at most {most_dims} dimensions", shape)
    _expect(theta.shape == (8,), "theta", "shape (8,)", theta.shape)
    _expect((alpha is not None) == distilled, "alpha", "one if and only if teacher_logits", alpha)
    if distilled:
        dtype = teacher_logits.dtype
        _expect(dtype == logits.dtype, "teacher_logits", "the dtype of logits", dtype, TypeError)
        same = teacher_logits.shape == shape
        _expect(same, "teacher_logits", "the shape of logits", teacher_logits.shape)
    if isinstance(alpha, Tensor):
        tensors["alpha"] = alpha
        real = alpha.dtype in THETA_DTYPES and alpha.dim() == 0
        _expect(real, "alpha", "a number or a 0-d float32 or float64 tensor", alpha)
    elif distilled:
        right = isinstance(alpha, Real) and 0 <= alpha <= 1
        _expect(right, "alpha", "a number in [0, 1]", alpha)
    for name, t in tensors.items():
        _expect(t.device == logits.device, name, "the device of logits", t.device)
    _expect(reduction in REDUCTIONS, "reduction", "'none', 'mean' or 'sum'", reduction)


def _expect(holds: bool, name: str, what: str, got, error=ValueError) -> None:
    if not holds:
        got = tuple(got) if isinstance(got, torch.Size) else got
        raise error(f"{name}: expected {what}, got {got}")


def check_labels(labels: Tensor, classes: int, ignore_index: int | None = None) -> None:
    """Raise ValueError for a label outside [0, classes). It reads the values: for the CPU only."""
    wrong = (labels < 0) | (labels >= classes)
    if ignore_index is not None:
        wrong &= labels != ignore_index
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(f"labels: expected in [0, {classes}), got {int(labels[row])} in row {row}")
