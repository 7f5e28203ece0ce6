"""relu(batch normalisation + shortcut): by hand, as PyTorch on a CPU, and the kernels on a GPU."""

import copy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from small import captured, only_on_a_gpu
from torch import nn

import norm_relu as module
from models import make_model
from norm_relu import DTYPES, norm_relu
from taylorglo_ext import load

CHANNELS_LAST = torch.channels_last
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
# Those of ResNets and of a wide one at a batch of 128, and odd ones: fewer rows than a block has,
# slices of unequal width, one channel's vector, more than a thousand channels.
SHAPES = [(128, 16, 32, 32), (128, 32, 16, 16), (128, 64, 8, 8), (128, 160, 32, 32),
          (32, 160, 16, 16), (1, 8, 3, 5), (7, 24, 9, 9), (3, 40, 7, 5), (3, 8, 1, 1),
          (5, 1048, 2, 3), (33, 96, 5, 1)]
either = pytest.mark.parametrize("with_shortcut", [True, False])


def batch_norm(channels, device, **options):
    generator = torch.Generator().manual_seed(channels)
    bn = nn.BatchNorm2d(channels, **options)
    for tensor in (bn.weight, bn.bias, bn.running_mean, bn.running_var):
        tensor.data.uniform_(0.5 if tensor is bn.running_var else -1, 2, generator=generator)
    return bn.to(device)


def numbers(device, shape, dtype=torch.float32, seed=0, mean=0.0, std=1.0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * std + mean
    return x.to(device, dtype).to(memory_format=CHANNELS_LAST).requires_grad_()


def given(device, shape, with_shortcut=True, dtype=torch.float32):
    """x, the shortcut or None, and the gradient of y."""
    x, shortcut, upstream = (numbers(device, shape, dtype, seed) for seed in range(3))
    return x, shortcut if with_shortcut else None, upstream.detach()


def fused_step(bn, x, shortcut, upstream):
    """y and the gradients of x, the weight, the bias and the shortcut."""
    y = norm_relu(bn, x, shortcut)
    assert y.grad_fn.name() == "NormReluBackward"
    wanted = [x, bn.weight, bn.bias] + ([] if shortcut is None else [shortcut])
    return [y.detach(), *torch.autograd.grad(y, wanted, upstream)]


def assert_near(actual, expected, tolerance):
    """To within a share of the largest number."""
    difference = (actual.double() - expected).abs().max()
    assert difference <= tolerance * expected.abs().max(), (difference, expected.abs().max())


def assert_right(bn, x, shortcut, upstream, tolerance, tolerance_of_sums=1e-4):
    exact = copy.deepcopy(bn).double()
    leaves = [t if t is None else t.detach().double().requires_grad_() for t in (x, shortcut)]
    z = exact(leaves[0]) if shortcut is None else exact(leaves[0]) + leaves[1]
    y, *gradients = fused_step(bn, x, shortcut, upstream)
    assert y.dtype == gradients[0].dtype == x.dtype
    assert y.is_contiguous(memory_format=CHANNELS_LAST) and gradients[0].shape == x.shape
    assert_near(y, z.detach().relu(), tolerance)
    passed = torch.where(y > 0, upstream, 0)  # rounding decides for a z of nearly 0
    wanted = [leaves[0], exact.weight, exact.bias]
    expected = torch.autograd.grad(z, wanted, passed.double())
    assert_near(gradients[0], expected[0], tolerance)
    for gradient, correct in zip(gradients[1:3], expected[1:], strict=True):
        assert_near(gradient, correct, tolerance_of_sums)
    if shortcut is not None:
        assert torch.equal(gradients[3], passed)
    assert_near(bn.running_mean, exact.running_mean, tolerance_of_sums)
    assert_near(bn.running_var, exact.running_var, tolerance_of_sums)
    assert bn.num_batches_tracked == exact.num_batches_tracked == 1


def test_by_hand(gpu):
    works_by_hand(gpu)


def test_by_hand_without_the_kernels():
    works_by_hand("cpu")


def works_by_hand(device):
    bn = nn.BatchNorm2d(4, eps=3.0, momentum=0.25).to(device)
    with torch.no_grad():
        bn.weight.copy_(torch.tensor([2.0, -1, 4, 2]))
        bn.bias.copy_(torch.tensor([0.5, 0, 1, -3]))
    def images(*rows):
        return torch.tensor(rows, device=device)[:, :, None, None]

    x = images([1.0, 5, 2, 0], [3, 7, 4, 2]).contiguous(memory_format=CHANNELS_LAST)
    # The means are 2, 6, 3, 1, variances 1, and 1 / sqrt(1 + eps) is 1/2: x becomes -1/2 and 1/2.
    y = norm_relu(bn, x.requires_grad_())
    assert y.flatten(1).tolist() == [[0, 0.5, 0, 0], [1.5, 0, 3, 0]]
    assert bn.running_mean.tolist() == [0.5, 1.5, 0.75, 0.25] and bn.num_batches_tracked == 1
    assert bn.running_var.tolist() == [1.25] * 4  # of the unbiased variance 2
    shortcut = images([1.0, -1, 1, 4], [1, 1, -3, 1]).requires_grad_()
    y = norm_relu(bn, x, shortcut)
    assert y.flatten(1).tolist() == [[0.5, 0, 0, 0], [2.5, 0.5, 0, 0]]
    y.backward(images([1.0, 8, 8, 8], [3, 4, 8, 8]))
    assert shortcut.grad.flatten(1).tolist() == [[1, 0, 0, 0], [3, 4, 0, 0]]
    assert bn.bias.grad.tolist() == [4, 4, 0, 0] and bn.weight.grad.tolist() == [1, 2, 0, 0]
    # weight / 2 * (dz - mean dz - x / 2 * mean(dz x)), the means over the two rows
    assert x.grad.flatten(1).tolist() == [[-0.75, 0.75, 0, 0], [0.75, -0.75, 0, 0]]


@pytest.mark.parametrize("training", [True, False])
@either
def test_on_a_cpu_the_bits_are_those_of_pytorch(training, with_shortcut):
    results = []
    for ours in (True, False):
        bn = batch_norm(24, "cpu").train(training)
        generator = torch.Generator().manual_seed(0)
        x, shortcut, upstream = torch.randn(3, 7, 24, 9, 9, generator=generator).requires_grad_()
        if ours:
            y = norm_relu(bn, x, shortcut if with_shortcut else None)
        else:
            y = torch.relu(bn(x) + shortcut if with_shortcut else bn(x))
        leaves = [x, bn.weight, bn.bias] + [shortcut] * with_shortcut
        results.append([y, *torch.autograd.grad(y, leaves, upstream), *bn.buffers()])
    for our, its in zip(*results, strict=True):
        assert torch.equal(our, its)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@either
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_pytorch_in_float64(gpu, shape, with_shortcut, dtype):
    if gpu == "cpu" and shape == (128, 160, 32, 32):
        pytest.skip("too large for the CPU")
    bn = batch_norm(shape[1], gpu, momentum=0.3, eps=1e-3)
    assert_right(bn, *given(gpu, shape, with_shortcut, dtype), TOLERANCE[dtype])


@pytest.mark.parametrize("shape", [(128, 16, 32, 32), (7, 24, 9, 9)], ids=str)
def test_a_variance_that_is_small_beside_the_mean(gpu, shape):
    x, upstream = numbers(gpu, shape, mean=1000, std=0.1), numbers(gpu, shape, seed=1).detach()
    bn = batch_norm(shape[1], gpu, momentum=1.0)  # running_var is the variance
    assert_right(bn, x, None, upstream, tolerance=2e-3, tolerance_of_sums=2e-3)
    exact = x.detach().double().var((0, 2, 3))
    assert_near(bn.running_var, exact, 5e-4)


def test_one_number_far_from_all_others(gpu):
    x = torch.zeros(128, 8, 32, 32, device=gpu).to(memory_format=CHANNELS_LAST)
    x[0, :, 0, 0] = 1000
    bn = batch_norm(8, gpu, momentum=1.0)
    norm_relu(bn, x)
    assert_near(bn.running_var, x.double().var((0, 2, 3)), 1e-5)


@pytest.mark.parametrize("layout", ["expanded", "contiguous", "off a 16-byte boundary"])
def test_other_layouts_of_shortcut_and_gradient(gpu, layout):
    shape = 7, 24, 9, 9
    x, shortcut, upstream = (t.detach() for t in given(gpu, shape))
    if layout == "expanded":
        upstream = upstream[:, :, :1, :1].expand(shape)
    elif layout == "contiguous":
        shortcut, upstream = shortcut.contiguous(), upstream.contiguous()
    else:
        def moved(t):
            flat = torch.empty(t.numel() + 1, device=gpu)[1:]
            return flat.view(7, 9, 9, 24).permute(0, 3, 1, 2).copy_(t)
        x, shortcut, upstream = moved(x), moved(shortcut), moved(upstream)
        assert x.data_ptr() % 16 == 4
    assert_right(batch_norm(24, gpu), x.requires_grad_(), shortcut.requires_grad_(), upstream, 1e-5)


@either
def test_the_same_bits_each_time(gpu, with_shortcut):
    numbers_of_step, results = given(gpu, (128, 16, 32, 32), with_shortcut), []
    for _ in range(2):
        bn = batch_norm(16, gpu)
        results.append([*fused_step(bn, *numbers_of_step), *bn.buffers()])
    assert all(map(torch.equal, *results))


@only_on_a_gpu
@either
def test_a_captured_graph_does_the_same(gpu, with_shortcut):
    bn, (x, *rest) = batch_norm(16, gpu), given(gpu, (128, 16, 32, 32), with_shortcut)
    step = partial(fused_step, bn, x, *rest)
    graph, results = captured(step)
    for seed in (4, 5):
        before = [t.clone() for t in bn.buffers()]
        x.data.copy_(numbers(gpu, x.shape, seed=seed))
        graph.replay()
        replayed = [t.clone() for t in [*results, *bn.buffers()]]
        for buffer, value in zip(bn.buffers(), before, strict=True):
            buffer.copy_(value)
        assert all(map(torch.equal, replayed, [*step(), *bn.buffers()]))


def network_gradient(device, name, bfloat16):
    """Of one step, as one vector; and how many convolutions had their images from the kernels."""
    model = make_model(name, 10, 3, seed=0).to(device, memory_format=CHANNELS_LAST)
    sources = []
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(lambda _, given, out: sources.append(given[0].grad_fn))
    with torch.autocast(device, torch.bfloat16, enabled=bfloat16):
        logits = model(numbers(device, (16, 3, 16, 16)).detach())
    labels = torch.arange(16, device=device) % 10
    nn.functional.cross_entropy(logits.float(), labels).backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    return gradient, sum(s is not None and s.name() == "NormReluBackward" for s in sources)


@pytest.mark.parametrize("name", ["resnet8", "wrn-10-1"])
def test_a_network_has_the_gradient_that_it_has_with_pytorchs(gpu, monkeypatch, name):
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # TF32's differ by 1.3%
        ours = {bfloat16: network_gradient(gpu, name, bfloat16) for bfloat16 in (False, True)}
        monkeypatch.setattr(module, "fits", lambda *_: False)
        its = {bfloat16: network_gradient(gpu, name, bfloat16) for bfloat16 in (False, True)}
    assert [count for _, count in ours.values()] == [{"resnet8": 6, "wrn-10-1": 8}[name]] * 2
    assert [count for _, count in its.values()] == [0, 0]
    exact = its[False][0]
    assert (ours[False][0] - exact).norm() < 0.01 * exact.norm()
    assert (ours[True][0] - exact).norm() < 1.5 * (its[True][0] - exact).norm()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_spreads_as_in_pytorch(gpu, bad):
    for of in ("x", "shortcut"):
        x, shortcut, upstream = (t.detach() for t in given(gpu, (7, 24, 9, 9)))
        (x if of == "x" else shortcut)[3, 5, 2, 1] = bad
        x, shortcut = x.requires_grad_(), shortcut.requires_grad_()
        bn, plain = batch_norm(24, gpu), batch_norm(24, gpu)
        y = torch.relu(plain(x) + shortcut)
        expected = y, *torch.autograd.grad(y, [x, plain.weight, plain.bias, shortcut], upstream)
        for ours, its in zip(fused_step(bn, x, shortcut, upstream), expected, strict=True):
            assert torch.equal(ours.isnan(), its.isnan()) and torch.equal(ours.isinf(), its.isinf())
        assert torch.equal(bn.running_var.isfinite(), plain.running_var.isfinite())


def test_opcheck(gpu):
    bn, (x, shortcut, dy) = batch_norm(24, gpu), (t.detach() for t in given(gpu, (7, 24, 9, 9)))
    weight, bias, operators = bn.weight.detach(), bn.bias.detach(), torch.ops.taylorglo
    for s in (None, shortcut):
        arguments = x, weight, bias, bn.running_mean, bn.running_var, s, 1e-5, 0.1
        torch.library.opcheck(operators.norm_relu.default, arguments)
        y, saved = operators.norm_relu(*arguments)
        arguments = dy, x, None if s is None else y, weight, bias, saved
        torch.library.opcheck(operators.norm_relu_backward.default, arguments)
    with pytest.raises(ValueError, match="do not fit"):
        operators.norm_relu(x, weight[1:], bias, bn.running_mean, bn.running_var, None, 1e-5, 0.1)


@pytest.mark.parametrize("options", [
    {}, dict(memory_format=torch.contiguous_format), dict(shape=(4, 6, 5, 5)),
    dict(dtype=torch.float64), dict(training=False), dict(hook=True), dict(shortcut=torch.float64),
    dict(backend="reference"), *(dict(norm={name: value}) for name, value in dict(
        affine=False, track_running_stats=False, momentum=None).items()),
], ids=str)
def test_what_the_kernels_do_not_do_is_pytorchs(gpu, options):
    usual = dict(shape=(4, 24, 5, 5), dtype=torch.float32, memory_format=CHANNELS_LAST,
                 training=True, hook=False, shortcut=torch.float32, backend="fused", norm={})
    case, called = SimpleNamespace(**usual | options), []
    load(case.backend, gpu)
    bn = nn.BatchNorm2d(case.shape[1], device=gpu, dtype=case.dtype, **case.norm)
    bn.train(case.training)
    if case.hook:
        bn.register_forward_hook(lambda *_: called.append(1))
    x = numbers(gpu, case.shape, case.dtype).detach().contiguous(memory_format=case.memory_format)
    y = norm_relu(bn, x.requires_grad_(), numbers(gpu, case.shape, case.shortcut, seed=1))
    assert (y.grad_fn.name() == "NormReluBackward") == (options == {})
    assert len(called) == case.hook
