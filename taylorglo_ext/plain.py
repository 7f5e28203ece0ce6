"""Losses in plain PyTorch, for comparison. Each takes logits (B, C) and labels (B,) int64 and returns
the mean over the batch; with a teacher, a number or 0-d tensor alpha gives the labels of Eq. 3."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import accumulate_dtype, reduce


def distilled_labels(logits: Tensor, labels: Tensor, teacher_logits: Tensor | None, alpha: float | Tensor | None) -> Tensor:
    """Eq. 3: alpha softmax(teacher) + (1 - alpha) one-hot, like the logits; without a teacher the labels."""
    if teacher_logits is None:
        return labels
    alpha = alpha.detach() if isinstance(alpha, Tensor) else alpha
    one_hot = F.one_hot(labels, logits.shape[1]).movedim(-1, 1)
    return alpha * teacher_logits.detach().softmax(dim=1) + (1 - alpha) * one_hot


def distilled_cross_entropy(
    logits: Tensor, labels: Tensor, teacher_logits: Tensor | None = None, alpha: float | Tensor | None = None,
    *, ignore_index: int | None = None, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """Cross-entropy; also for logits (B, C, d1, ...) with labels (B, d1, ...)."""
    kept = None
    if ignore_index is not None:
        kept = labels != ignore_index
        labels = labels.where(kept, 0)
    x = distilled_labels(logits, labels, teacher_logits, alpha)
    if kept is None:
        return F.cross_entropy(logits, x, reduction=reduction)
    return reduce(F.cross_entropy(logits, x, reduction="none"), kept, reduction)


def generalized_cross_entropy(
    logits: Tensor, labels: Tensor, teacher_logits: Tensor | None = None, alpha: float | Tensor | None = None, q: float = 0.7
) -> Tensor:
    """(1 - p_y^q) / q, which wrong labels mislead less (Zhang and Sabuncu 2018); for the labels of Eq. 3
    its expectation over them."""
    log_p = logits.log_softmax(dim=1, dtype=accumulate_dtype(logits.dtype))
    of_class = (1 - torch.exp(q * log_p)) / q
    if teacher_logits is None:
        return of_class.gather(1, labels[:, None]).mean()
    return (distilled_labels(logits, labels, teacher_logits, alpha) * of_class).sum(dim=1).mean()


def label_smoothing(
    logits: Tensor, labels: Tensor, teacher_logits: Tensor | None = None, alpha: float | Tensor | None = None,
    smoothing: float = 0.1,
) -> Tensor:  # fmt: skip
    """Cross-entropy with labels (1 - smoothing) x + smoothing / C (Szegedy et al. 2016)."""
    return F.cross_entropy(logits, distilled_labels(logits, labels, teacher_logits, alpha), label_smoothing=smoothing)
