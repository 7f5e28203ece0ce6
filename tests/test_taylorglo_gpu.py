"""The CUDA kernels of the loss, on a GPU and emulated on a CPU, against the float64 reference."""

import pytest
import torch
from small import captured, only_on_a_gpu
from test_taylorglo import DTYPES, TOLERANCE, assert_agrees, exact, problem, with_gradient

from taylorglo_ext import loss_and_gradient, taylorglo_loss
from taylorglo_ext.reference import reference_loss


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 127, 128, 129, 5000])
@pytest.mark.parametrize("classes", [1, 2, 10, 33, 100, 1000, 1001, 32003])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_odd_sizes(gpu, rows, classes, dtype):
    if rows * classes > (10**7 if gpu == "cuda" else 1.3e5):
        pytest.skip("too large for the CPU")
    logits, labels, theta, teacher_logits = problem(rows, classes, dtype, device=gpu)
    assert_agrees(logits, labels, theta)
    alpha = torch.tensor(0.3, device=gpu)
    assert_agrees(logits, labels, theta, teacher_logits, alpha, upstream=-2.75)
    assert_agrees(logits.t().contiguous().t(), labels, theta, teacher_logits, 1.0)


@pytest.mark.parametrize("classes", [10, 1000, 32003, 40000])
def test_extreme_logits_and_labels(gpu, classes):
    logits, labels, theta, teacher_logits = problem(64 if gpu == "cuda" else 8, classes, device=gpu)
    assert_agrees(logits.sign() * 1e4, labels, theta, teacher_logits.sign() * 1e4, 0.3)
    for bad in (float("nan"), float("inf")):
        changed = logits.clone()
        changed[5, 3] = bad
        assert taylorglo_loss(changed, labels, theta).isnan()
    for bad in (-1, classes):
        changed = labels.clone()
        changed[7] = bad
        loss, gradient = with_gradient(taylorglo_loss, logits, changed, theta)
        assert loss.isnan() and gradient[7].isnan().all() and not gradient[6].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions_and_ignored_labels(gpu, dtype, reduction):
    rows, options = 300 if gpu == "cuda" else 30, dict(reduction=reduction, ignore_index=-100)
    for classes in (10, 100, 1001):
        logits, labels, theta, teacher_logits = problem(rows, classes, dtype, device=gpu)
        labels[::3] = -100
        given = labels, theta, teacher_logits, 0.3
        ours = with_gradient(taylorglo_loss, logits, *given, upstream=-2.75, **options)
        true = with_gradient(reference_loss, exact(logits), labels.cpu(), *map(exact, given[1:]),
                             upstream=-2.75, **options)
        for our, correct in zip(ours, true, strict=True):
            torch.testing.assert_close(our.cpu().double(), correct, atol=1e-5,
                                       rtol=max(1e-4, TOLERANCE[dtype]))


@only_on_a_gpu
@pytest.mark.parametrize("rows", [128, 5000])
def test_a_graph_replays_with_new_parameters(gpu, rows):
    logits, labels, theta, teacher_logits = problem(rows, 10, device=gpu)
    alpha = torch.tensor(0.3, device=gpu)
    logits.requires_grad_()

    def step():
        loss = taylorglo_loss(logits, labels, theta, teacher_logits, alpha)
        return loss, torch.autograd.grad(loss, logits)[0]

    graph, results = captured(step)
    for seed in (1, 2):
        theta.copy_(problem(1, 2, seed=seed)[2])
        alpha.fill_(seed / 3)
        graph.replay()
        assert all(map(torch.equal, [t.clone() for t in results], step()))


@only_on_a_gpu
def test_captured_losses_run_side_by_side(gpu):
    # Each captured launch has a counter of its own, though all were captured on one stream.
    graphs, captured, streams = [], [], [torch.cuda.Stream() for _ in range(8)]
    for seed in range(8):
        arguments = problem(5000, 100, seed=seed, device=gpu)
        loss_and_gradient(*arguments, 0.3)
        torch.cuda.synchronize()
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            results = [loss_and_gradient(*arguments, 0.3) for _ in range(5)]
        captured.append((arguments, results))
    for _ in range(20):
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for arguments, results in captured:
        expected = loss_and_gradient(*arguments, 0.3)
        assert all(all(map(torch.equal, found, expected)) for found in results)
