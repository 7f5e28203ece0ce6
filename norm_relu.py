"""relu(batch normalisation + shortcut): on a GPU in training two kernels each way, else PyTorch's.

The networks of Sec. 4.1 do this after every convolution. With PyTorch's operators it takes most of
a step on a GPU.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

import taylorglo_ext

DTYPES = torch.float32, torch.bfloat16, torch.float16


def norm_relu(bn, x, shortcut=None):
    """relu(bn(x)) or relu(bn(x) + shortcut) for an nn.BatchNorm2d and x (N, C, H, W)."""
    if fits(bn, x, shortcut):
        bn.num_batches_tracked.add_(1)
        return NormRelu.apply(x, bn.weight, bn.bias, bn.running_mean, bn.running_var, shortcut,
                              bn.eps, bn.momentum)
    return F.relu(bn(x) if shortcut is None else bn(x) + shortcut, inplace=True)


def fits(bn, x, shortcut):
    """Whether the kernels do what `bn` would. They need a BatchNorm2d in training, with weight,
    bias, running statistics and momentum; and x channels last on a GPU, with channels that fill
    whole vectors of 16 bytes."""
    if not (has_kernels(x.device) and type(bn) is nn.BatchNorm2d and bn.training and bn.affine
            and bn.track_running_stats and bn.momentum is not None):
        return False
    hooks = bn._forward_hooks, bn._forward_pre_hooks, bn._backward_hooks, bn._backward_pre_hooks
    tensors = bn.weight, bn.bias, bn.running_mean, bn.running_var
    return (not any(hooks) and x.dim() == 4 and x.dtype in DTYPES
            and x.shape[1] == bn.num_features and x.shape[1] * x.element_size() % 16 == 0
            and x.numel() > x.shape[1] and x.is_contiguous(memory_format=torch.channels_last)
            and all(t.dtype == torch.float32 and t.device == x.device for t in tensors)
            and (shortcut is None or (shortcut.shape == x.shape and shortcut.dtype == x.dtype
                                      and shortcut.device == x.device)))


def has_kernels(device):
    return device.type == "cuda" and taylorglo_ext.is_fused("cuda")


class NormRelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_var, shortcut, eps, momentum):
        y, saved = torch.ops.taylorglo.norm_relu(x, weight, bias, running_mean, running_var,
                                                 shortcut, eps, momentum)
        ctx.save_for_backward(x, None if shortcut is None else y, weight, bias, saved)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        *gradients, of_shortcut = torch.ops.taylorglo.norm_relu_backward(dy, *ctx.saved_tensors)
        shortcut = None if ctx.saved_tensors[1] is None else of_shortcut
        return *gradients, None, None, shortcut, None, None
