"""What a practitioner would use in place of an evolved loss, in plain PyTorch, with Eq. 3's labels under a teacher.

Arguments as for `taylorglo_ext.taylorglo_loss`, without theta: logits (B, C), labels (B,) int64. Each returns a 0-d tensor,
the mean over the batch; gradients flow to the logits only.
"""

import torch.nn.functional as F
from torch import Tensor

Q = 0.7  # of generalized cross-entropy, as published
SMOOTHING = 0.1  # the share of a label that is spread over all classes


def eq3_labels(logits, labels, teacher_logits, alpha):
    """Eq. 3: x = alpha softmax(teacher) + (1 - alpha) one-hot, (B, C); one-hot without a teacher."""
    x = F.one_hot(labels, logits.shape[1]).to(logits.dtype)
    if teacher_logits is not None:
        alpha = alpha.detach() if isinstance(alpha, Tensor) else alpha
        x = alpha * teacher_logits.detach().softmax(dim=1) + (1 - alpha) * x
    return x


def generalized_cross_entropy(logits, labels, teacher_logits=None, alpha=None):
    """Zhang and Sabuncu 2018: (1 - p^q) / q for the probability p of the label, or its mean over a soft label."""
    x = eq3_labels(logits, labels, teacher_logits, alpha)
    # From the logarithm: the gradient p^q of a label that the softmax rounds to 0 is 0, and not 0 times infinity.
    return (x * (1 - (Q * logits.log_softmax(dim=1)).exp()) / Q).sum(dim=1).mean()


def label_smoothing(logits, labels, teacher_logits=None, alpha=None):
    """Cross-entropy in which a share SMOOTHING of each label is spread evenly over all classes."""
    x = eq3_labels(logits, labels, teacher_logits, alpha)
    return F.cross_entropy(logits, x, label_smoothing=SMOOTHING)
