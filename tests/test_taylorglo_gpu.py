"""The fused loss on a GPU, against the float64 reference on the CPU."""

import pytest
import torch
from small import captured
from test_taylorglo import DTYPES, TOLERANCE, assert_agrees, problem, with_gradient

from taylorglo_ext import load, loss_and_gradient, taylorglo_loss

pytestmark = pytest.mark.cuda


@pytest.fixture
def poisoned_memory():
    """Fresh CUDA memory is full of NaN, so that an element that is not written shows."""
    torch.use_deterministic_algorithms(True)
    yield load("fused", "cuda")
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 127, 128, 129, 5000])
@pytest.mark.parametrize("classes", [1, 2, 10, 33, 100, 1000, 1001, 32003])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gpu_odd_sizes(poisoned_memory, rows, classes, dtype):
    if rows * classes > 10**7:
        pytest.skip("too large for the float64 reference on the CPU")
    logits, labels, theta, teacher_logits = problem(rows, classes, dtype, device="cuda")
    assert_agrees(logits, labels, theta)
    alpha = torch.tensor(0.3, device="cuda")
    assert_agrees(logits, labels, theta, teacher_logits, alpha, upstream=-2.75)
    assert_agrees(logits.t().contiguous().t(), labels, theta, teacher_logits, 1.0)


@pytest.mark.parametrize("classes", [10, 1000, 32003, 40000])
def test_gpu_extreme_logits_and_labels(poisoned_memory, classes):
    logits, labels, theta, teacher_logits = problem(64, classes, device="cuda")
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
def test_gpu_does_what_the_cpu_does(poisoned_memory, dtype, reduction):
    for classes in (10, 100, 1001):
        given = problem(300, classes, dtype)
        given[1][::3] = -100
        cpu, gpu = ([t.cpu() for t in with_gradient(
            taylorglo_loss, *(t.to(device) for t in given), 0.3, upstream=-2.75,
            reduction=reduction)] for device in ("cpu", "cuda"))
        torch.testing.assert_close(gpu, cpu, rtol=max(1e-4, TOLERANCE[dtype]), atol=1e-5)


@pytest.mark.parametrize("rows", [128, 5000])
def test_gpu_graph_replays_with_new_parameters(poisoned_memory, rows):
    logits, labels, theta, teacher_logits = problem(rows, 10, device="cuda")
    alpha = torch.tensor(0.3, device="cuda")
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


def test_gpu_captured_losses_run_side_by_side(poisoned_memory):
    # Each captured launch has a counter of its own, though all were captured on one stream.
    graphs, captured, streams = [], [], [torch.cuda.Stream() for _ in range(8)]
    for seed in range(8):
        arguments = problem(5000, 100, seed=seed, device="cuda")
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
