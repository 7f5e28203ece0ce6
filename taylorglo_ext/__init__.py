"""The TaylorGLO loss of Eq. 2 with the distilled labels of Eq. 3, forward and gradient in one pass, on CPU and CUDA.

In Eq. 2, x is the LABEL (one-hot, or distilled by Eq. 3) and y is the PREDICTION (the softmax of the logits); this is the
reverse of the usual habit. n is the number of classes.
"""

import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .build import BackendError, load_library
from .plain import generalized_cross_entropy, label_smoothing
from .reference import check_inputs, check_labels, reference_loss, widen

__all__ = ["PLAIN_LOSSES", "BackendError", "TaylorGLOLoss", "distilled_cross_entropy", "load", "losses", "taylorglo_loss"]

_in_use: dict[str, str] = {}  # device type -> the backend that load() chose for it


def load(backend: str = "auto", device: str = "cpu") -> str:
    """Choose the backend of :func:`taylorglo_loss` on one type of device, and return it: "fused" or "reference".

    "fused" builds the C++ (and for "cuda" the CUDA) operator, or takes it from the cache, and raises BackendError where
    that fails; "auto" then warns once and uses the reference. Call it once before worker processes start, and in each
    worker with the answer. Without a call, the first loss on a device does ``load("auto", device)``.
    """
    if backend not in ("auto", "fused", "reference"):
        raise ValueError(f"backend: expected 'auto', 'fused' or 'reference', got {backend!r}")
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device: expected 'cpu' or 'cuda', got {device!r}")
    chosen = backend
    if backend != "reference":
        try:
            load_library(device)
            chosen = "fused"
        except BackendError as error:
            if backend == "fused":
                raise
            warnings.warn(f"taylorglo_ext uses the slower reference loss: {error}", stacklevel=2)
            chosen = "reference"
    _in_use[device] = chosen
    return chosen


def _backend(device: str) -> str:
    return _in_use.get(device) or load("auto", device)


# torch.compiler.assume_constant_result does this alone, but imports torch._dynamo for it: a second, in every process.
_backend._dynamo_marked_constant = True


def taylorglo_loss(
    logits: Tensor, labels: Tensor, theta: Tensor, teacher_logits: Tensor | None = None, alpha: float | Tensor | None = None
) -> Tensor:
    """The mean over the batch of Eq. 2 between labels x and predictions y = softmax(logits).

    Args:
        logits: (B, C), C >= 1, float64, float32, float16 or bfloat16. Nothing else receives a gradient, and there is
            no second derivative.
        labels: (B,) int64 in [0, C). On the CPU another value raises ValueError; on CUDA it makes the loss NaN.
        theta: (8,) float32 or float64 on the device of the logits, the parameters of Eq. 2.
        teacher_logits: like logits, or None. With it, Eq. 3: x = alpha softmax(teacher) + (1 - alpha) one-hot.
        alpha: with a teacher only: a number in [0, 1], or a 0-d float32 or float64 tensor on the device of the logits.

    Returns:
        A 0-d tensor, float64 for float64 logits and float32 otherwise; NaN for an empty batch, and for logits whose
        softmax is NaN.

    Raises:
        TypeError, ValueError: a wrong dtype; a wrong shape, device or value. The message names the argument.
    """
    if _backend("cuda" if logits.is_cuda else "cpu") == "fused":
        if alpha is None or isinstance(alpha, Tensor):
            return torch.ops.taylorglo.loss.default(logits, labels, theta, teacher_logits, alpha, None)
        return torch.ops.taylorglo.loss.default(logits, labels, theta, teacher_logits, None, alpha)
    if torch.is_autocast_enabled(logits.device.type):  # as the fused operator, and as every loss
        logits, teacher_logits = widen(logits), widen(teacher_logits)
    check_inputs(logits, labels, theta, teacher_logits, alpha)
    if logits.device.type == "cpu" and not torch.compiler.is_compiling():
        check_labels(labels, logits.shape[1])
    return reference_loss(logits, labels, theta, teacher_logits, alpha)


class TaylorGLOLoss(nn.Module):
    """:func:`taylorglo_loss` in the place of ``nn.CrossEntropyLoss``; theta is a float32 buffer and is not trained.

    With add_cross_entropy (not in the paper) it is added to the loss, with the labels of Eq. 3 where there is a teacher.
    """

    def __init__(self, theta: Sequence[float] | Tensor, add_cross_entropy: bool = False):
        super().__init__()
        self.add_cross_entropy = add_cross_entropy
        self.register_buffer("theta", torch.as_tensor(theta, dtype=torch.float32).detach().clone())
        if self.theta.shape != (8,):
            raise ValueError(f"theta: expected 8 numbers, got shape {tuple(self.theta.shape)}")

    def forward(
        self, logits: Tensor, labels: Tensor, teacher_logits: Tensor | None = None, alpha: float | Tensor | None = None
    ) -> Tensor:
        loss = taylorglo_loss(logits, labels, self.theta, teacher_logits, alpha)
        if self.add_cross_entropy:
            loss = loss + distilled_cross_entropy(logits, labels, teacher_logits, alpha)
        return loss


def distilled_cross_entropy(
    logits: Tensor, labels: Tensor, teacher_logits: Tensor | None = None, alpha: float | Tensor | None = None
) -> Tensor:
    """Cross-entropy, with the labels of Eq. 3 where there is a teacher. Arguments as for :func:`taylorglo_loss`."""
    if teacher_logits is not None:
        alpha = alpha.detach() if isinstance(alpha, Tensor) else alpha
        labels = alpha * teacher_logits.detach().softmax(dim=1) + (1 - alpha) * F.one_hot(labels, logits.shape[1])
    return F.cross_entropy(logits, labels)


# By the names that --loss and schedules have for them.
PLAIN_LOSSES = {"cross-entropy": distilled_cross_entropy, "generalized-cross-entropy": generalized_cross_entropy,
                "label-smoothing": label_smoothing}


def losses(schedule: dict) -> list:
    """The loss of each epoch of a run's schedule.json, as ``json.load`` gives it: called as ``loss(logits, labels)``."""
    plain = PLAIN_LOSSES[schedule["plain_loss"]]
    return [plain if epoch["theta"] is None else TaylorGLOLoss(epoch["theta"], schedule["add_cross_entropy"])
            for epoch in schedule["epochs"]]
