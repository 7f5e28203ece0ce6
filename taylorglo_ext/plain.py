"""Losses in plain PyTorch, for comparison.

Each takes logits (B, C), labels (B,) int64 and, for the labels of Eq. 3, teacher logits (B, C) and
alpha, a number or a 0-d tensor; it returns the mean over the batch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import accumulate_dtype, eq3, reduce


def distilled_labels(logits: Tensor, labels: Tensor, teacher_logits=None, alpha=None) -> Tensor:
    """Eq. 3: alpha softmax(teacher) + (1 - alpha) one-hot; without a teacher the labels."""
    if teacher_logits is None:
        return labels
    return eq3(F.one_hot(labels, logits.shape[1]).movedim(-1, 1), teacher_logits, alpha)


def distilled_cross_entropy(
    logits: Tensor, labels: Tensor, teacher_logits=None, alpha=None,
    *, ignore_index=None, reduction="mean",
) -> Tensor:  # fmt: skip
    """Cross-entropy. Takes more dimensions, ignore_index and reduction, as ``taylorglo_loss``."""
    kept = None if ignore_index is None else labels != ignore_index
    if kept is not None:
        labels = labels.where(kept, 0)
    x = distilled_labels(logits, labels, teacher_logits, alpha)
    if kept is None:
        return F.cross_entropy(logits, x, reduction=reduction)
    return reduce(F.cross_entropy(logits, x, reduction="none"), kept, reduction)


def generalized_cross_entropy(
    logits: Tensor, labels: Tensor, teacher_logits=None, alpha=None, q: float = 0.7
) -> Tensor:
    """(1 - p_y^q) / q, which is more robust to wrong labels (Zhang and Sabuncu 2018); with a
    teacher its expectation over the labels of Eq. 3."""
    log_p = logits.log_softmax(dim=1, dtype=accumulate_dtype(logits.dtype))
    of_class = (1 - torch.exp(q * log_p)) / q
    if teacher_logits is None:
        return of_class.gather(1, labels[:, None]).mean()
    x = distilled_labels(logits, labels, teacher_logits, alpha)
    return (x * of_class).sum(dim=1).mean()


def label_smoothing(
    logits: Tensor, labels: Tensor, teacher_logits=None, alpha=None, smoothing: float = 0.1
) -> Tensor:
    """Cross-entropy with the labels (1 - smoothing) x + smoothing / C."""
    x = distilled_labels(logits, labels, teacher_logits, alpha)
    return F.cross_entropy(logits, x, label_smoothing=smoothing)
