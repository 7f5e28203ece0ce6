"""The TaylorGLO loss of Eq. 2 with the distilled labels of Eq. 3, and its gradient, in one pass."""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .build import BackendError, load_library
from .plain import distilled_cross_entropy, generalized_cross_entropy, label_smoothing
from .reference import (
    REDUCTIONS,
    THETA_DTYPES,
    accumulate_dtype,
    check_inputs,
    check_labels,
    reference_loss,
)

__all__ = [
    "PLAIN_LOSSES", "BackendError", "TaylorGLOLoss", "distilled_cross_entropy",
    "generalized_cross_entropy", "label_smoothing", "load", "loss_and_gradient", "losses",
    "taylorglo_loss",
]  # fmt: skip

_in_use: dict[str, str] = {}  # device type -> the backend that load() chose for it


def load(backend: str = "auto", device: str = "cpu") -> str:
    """Choose the backend of the loss on one type of device; return it: "fused" or "reference".

    "fused" takes the C++ (for "cuda" also the CUDA) operator from the cache or builds it, and
    raises BackendError if that fails; "auto" then warns and uses the reference. Call it before
    worker processes start, and in each worker with the result. Without a call, the first loss on a
    device does ``load("auto", device)``.
    """
    if backend not in ("auto", "fused", "reference"):
        raise ValueError(f"backend: expected 'auto', 'fused' or 'reference', got {backend!r}")
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device: expected 'cpu' or 'cuda', got {device!r}")
    chosen = "reference"
    if backend != "reference":
        try:
            load_library(device)
            chosen = "fused"
        except BackendError as error:
            if backend == "fused":
                raise
            warnings.warn(f"taylorglo_ext uses the slower reference loss: {error}", stacklevel=2)
    _in_use[device] = chosen
    return chosen


def is_fused(device: str) -> bool:
    """Whether load() chose the fused operators on this type of device."""
    return _in_use.get(device) == "fused"


def _backend(device: str) -> str:
    if device not in ("cpu", "cuda"):  # PyTorch's others, such as mps and meta
        return "reference"
    return _in_use.get(device) or load("auto", device)


# As torch.compiler.assume_constant_result, which takes a second to import torch._dynamo.
_backend._dynamo_marked_constant = True


def taylorglo_loss(
    logits: Tensor, labels: Tensor, theta: Tensor, teacher_logits: Tensor | None = None,
    alpha: float | Tensor | None = None, *, ignore_index: int | None = -100,
    reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """Eq. 2 between labels x and predictions y = softmax(logits), in place of ``F.cross_entropy``.

    Args:
        logits: (B, C) or (B, C, d1, ...), C >= 1, float64, float32, float16 or bfloat16. Only they
            receive a gradient. The fused backend has no second derivative.
        labels: (B,) or (B, d1, ...) int64 in [0, C), or ignore_index. Another value raises
            ValueError on the CPU and makes the loss NaN on CUDA.
        theta: (8,) float32 or float64 on the device of the logits, the parameters of Eq. 2.
        teacher_logits: like logits, or None. With it x is
            alpha softmax(teacher) + (1 - alpha) one-hot, Eq. 3.
        alpha: with a teacher only: a number in [0, 1], or a 0-d float32 or float64 tensor on the
            device of the logits.
        ignore_index: predictions with this label do not count; None: all count.
        reduction: "mean" over those that count, "sum", or "none".

    Returns:
        A 0-d tensor, for "none" one like labels; float64 for float64 logits, else float32. NaN for
        the mean of nothing, and for logits whose softmax is NaN.

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape, device or value; the message names the
            argument.
    """
    given = logits, labels, theta, teacher_logits, alpha
    try:
        if (teacher_logits is not None and teacher_logits.dtype != logits.dtype
                and torch.is_autocast_enabled(logits.device.type)):
            # Under autocast the two may differ in dtype, as in any loss.
            both = logits, teacher_logits
            logits, teacher_logits = (t.to(accumulate_dtype(t.dtype)) for t in both)
        if labels.dim() == 1:
            return _loss(logits, labels, theta, teacher_logits, alpha, ignore_index, reduction)
        check_inputs(logits, labels, theta, teacher_logits, alpha, reduction)
        teacher_logits = None if teacher_logits is None else _rows(teacher_logits)
        loss = _loss(_rows(logits), labels.reshape(-1), theta, teacher_logits, alpha, ignore_index,
                     reduction)
        return loss.reshape(labels.shape) if reduction == "none" else loss
    except (AttributeError, RuntimeError, TypeError, ValueError):
        check_inputs(*given, reduction)  # only now: it names the error, and takes time
        raise


def _rows(logits: Tensor) -> Tensor:
    return logits.movedim(1, -1).reshape(-1, logits.shape[1])  # (B, C, d1, ...) to (B d1 ..., C)


def _loss(logits, labels, theta, teacher_logits, alpha, ignore_index, reduction) -> Tensor:
    if _backend(logits.device.type) == "fused":
        options = ignore_index, REDUCTIONS.index(reduction)
        operator = torch.ops.taylorglo.loss.default
        return operator(logits, labels, theta, teacher_logits, *_alpha(alpha), *options)
    check_inputs(logits, labels, theta, teacher_logits, alpha, reduction)
    if logits.device.type == "cpu" and not torch.compiler.is_compiling():
        check_labels(labels, logits.shape[1], ignore_index)
    return reference_loss(logits, labels, theta, teacher_logits, alpha, ignore_index, reduction)


def _alpha(alpha: float | Tensor | None) -> tuple[Tensor | None, float | None]:
    return (alpha, None) if isinstance(alpha, Tensor) else (None, alpha)


def loss_and_gradient(
    logits: Tensor, labels: Tensor, theta: Tensor, teacher_logits: Tensor | None = None,
    alpha: float | Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """:func:`taylorglo_loss` of logits (B, C) and its gradient for them, without autograd.

    A training step can go on with ``logits.backward(gradient)``, which saves a GPU some launches.
    Every label counts. The gradient is like the logits, but float32 for float16: it can be scaled
    before it is rounded.
    """
    try:
        logits = logits.detach()
        if _backend(logits.device.type) == "fused":
            operator = torch.ops.taylorglo.loss_and_gradient.default
            return operator(logits, labels, theta, teacher_logits, *_alpha(alpha))
        check_inputs(logits, labels, theta, teacher_logits, alpha, most_dims=2)
        if logits.dtype == torch.float16:
            logits = logits.float()
            teacher_logits = None if teacher_logits is None else teacher_logits.float()
        logits.requires_grad_()
        with torch.enable_grad():
            loss = _loss(logits, labels, theta, teacher_logits, alpha, None, "mean")
        return loss.detach(), torch.autograd.grad(loss, logits)[0]
    except (AttributeError, RuntimeError, TypeError, ValueError):
        check_inputs(logits, labels, theta, teacher_logits, alpha, most_dims=2)
        raise


class TaylorGLOLoss(nn.Module):
    """:func:`taylorglo_loss` in place of ``nn.CrossEntropyLoss``. theta is a buffer, not trained.

    add_cross_entropy (not in the paper) adds the cross-entropy, with a teacher for the labels of
    Eq. 3.
    """

    def __init__(
        self, theta: Sequence[float] | Tensor, add_cross_entropy: bool = False, *,
        ignore_index: int | None = -100, reduction: str = "mean",
    ):  # fmt: skip
        super().__init__()
        self.add_cross_entropy = add_cross_entropy
        self.options = {"ignore_index": ignore_index, "reduction": reduction}
        self.register_buffer("theta", torch.as_tensor(theta, dtype=torch.float32).detach().clone())
        if self.theta.shape != (8,):
            raise ValueError(f"theta: expected 8 numbers, got shape {tuple(self.theta.shape)}")

    def _apply(self, fn, recurse=True):  # model.half() leaves theta as it is
        exact = self.theta
        super()._apply(fn, recurse)
        if self.theta.dtype not in THETA_DTYPES:
            self.theta = exact.to(self.theta.device)
        return self

    @torch.jit.unused
    def forward(
        self, logits: Tensor, labels: Tensor, teacher_logits: Tensor | None = None,
        alpha: float | Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        # A caller may have cast the buffers without _apply.
        theta = self.theta if self.theta.dtype in THETA_DTYPES else self.theta.float()
        loss = taylorglo_loss(logits, labels, theta, teacher_logits, alpha, **self.options)
        if self.add_cross_entropy:
            given = logits, labels, teacher_logits, alpha
            loss = loss + distilled_cross_entropy(*given, **self.options)
        return loss


# By their names in --loss and in schedules.
PLAIN_LOSSES = {"cross-entropy": distilled_cross_entropy,
                "generalized-cross-entropy": generalized_cross_entropy,
                "label-smoothing": label_smoothing}


def losses(schedule: dict) -> list:
    """The losses of the epochs of a schedule.json, called as ``loss(logits, labels)``."""
    plain, add = PLAIN_LOSSES[schedule["plain_loss"]], schedule["add_cross_entropy"]
    thetas = [epoch["theta"] for epoch in schedule["epochs"]]
    return [plain if t is None else TaylorGLOLoss(t, add) for t in thetas]
