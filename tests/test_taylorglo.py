"""The loss of Eq. 2 and Eq. 3, through the public door, against the float64 reference and numbers worked by hand."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import taylorglo_ext
from models import make_model
from taylorglo_ext import BackendError, TaylorGLOLoss, build, load, losses, taylorglo_loss
from taylorglo_ext.reference import reference_loss

ROOT = Path(__file__).parent.parent
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
# Of a gradient that has been rounded twice to the dtype of the logits.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@pytest.fixture(scope="module", autouse=True)
def fused_backend():
    assert load("fused") == "fused"
    yield
    load("fused")


@pytest.fixture(params=["fused", "reference"])
def backend(request):
    yield load(request.param)
    load("fused")


def problem(rows, classes, dtype=torch.float32, teacher=True, seed=0, device="cpu"):
    """Random logits, labels, theta and, if asked for, teacher logits."""
    rng = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(rows, classes, generator=rng)).to(dtype)
    labels = torch.randint(classes, (rows,), generator=rng)
    theta = 20 * torch.rand(8, generator=rng) - 10
    teacher_logits = (3 * torch.randn(rows, classes, generator=rng)).to(dtype) if teacher else None
    return [None if t is None else t.to(device) for t in (logits, labels, theta, teacher_logits)]


def with_gradient(loss_function, logits, *rest, upstream=1.0, **named):
    logits = logits.detach().clone().requires_grad_()
    loss = loss_function(logits, *rest, **named)
    loss.backward(torch.full_like(loss, upstream))
    return loss.detach(), logits.grad


def assert_agrees(logits, labels, theta, teacher_logits=None, alpha=None, upstream=1.0):
    """The loss and gradient are those of the reference in float64 on the CPU, to rounding."""
    def exact(t):
        return t.detach().cpu().double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t

    loss, gradient = with_gradient(taylorglo_loss, logits, labels, theta, teacher_logits, alpha, upstream=upstream)
    true_loss, true_gradient = with_gradient(
        reference_loss, exact(logits), labels.cpu(), exact(theta), exact(teacher_logits), exact(alpha), upstream=upstream
    )
    assert gradient.dtype == logits.dtype and gradient.shape == logits.shape
    assert loss.dtype == (torch.float64 if logits.dtype == torch.float64 else torch.float32)
    rows, classes = logits.shape
    if rows == 0:
        return torch.testing.assert_close(loss.isnan().cpu(), torch.tensor(True))
    # Sums are rounded in the loss's dtype, relative to the size of f and df/dy; the gradient also in the logits' dtype,
    # where float16 has no numbers below 6e-8.
    size = torch.finfo(loss.dtype).eps * 16 * (1 + theta.abs().sum().item() ** 2)
    assert abs(loss.item() - true_loss.item()) <= size
    y = torch.softmax(exact(logits), dim=1)
    smallest = 6e-8 if logits.dtype == torch.float16 else 1e-37
    bound = TOLERANCE[logits.dtype] * true_gradient.abs() + (1 + abs(upstream)) * (size * y / (rows * classes) + smallest)
    assert ((gradient.cpu().double() - true_gradient).abs() <= bound).all()


# ---- The value -------------------------------------------------------------------------------------------------------


def test_hand_worked(backend):
    # y = softmax(0, ln 3) = (1/4, 3/4), label 1. With theta_1 = 1/4 and theta_0 = 0: a = (0, 1/2), b = (0, 1).
    # Every term of f has a factor a, so f(class 0) = 0.
    # f(class 1) = 1/2 + 2/2/4 + 6/6/8 + 1/2 + 2/2/4 + 2/2/2 = 17/8, and L = -1/2 * 17/8.
    # G = (1, 1 + 1 + 3/4 + 1 + 1 + 1) = (1, 23/4); sum_i G_i y_i = 73/16; dL/dz_1 = -1/2 * 3/4 * (23/4 - 73/16) = -57/128.
    logits = torch.tensor([[0, 3.0]], dtype=torch.float64)
    logits[0, 1] = logits[0, 1].log()
    theta = torch.tensor([0, 0.25, 1, 2, 6, 1, 2, 2], dtype=torch.float64)
    label = torch.tensor([1])
    loss, gradient = with_gradient(taylorglo_loss, logits, label, theta)
    torch.testing.assert_close(loss, torch.tensor(-17 / 16, dtype=torch.float64))
    torch.testing.assert_close(gradient, torch.tensor([[57 / 128, -57 / 128]], dtype=torch.float64))
    # Eq. 3 with an undecided teacher and alpha = 1/2: x = (1/4, 3/4), so b(class 1) = 3/4 and
    # f(class 1) = 1/2 + 1/4 + 1/8 + 3/8 + 3/16 + 9/32 = 55/32.
    distilled = taylorglo_loss(logits, label, theta, torch.zeros(1, 2, dtype=torch.float64), 0.5)
    torch.testing.assert_close(distilled, torch.tensor(-55 / 64, dtype=torch.float64))


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 127, 128, 129])
@pytest.mark.parametrize("classes", [1, 2, 10, 33, 65, 1000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_odd_sizes(rows, classes, dtype):
    for teacher, alpha in [(False, None), (True, 0.0), (True, torch.tensor(0.3)), (True, 1.0)]:
        assert_agrees(*problem(rows, classes, dtype, teacher), alpha=alpha, upstream=-2.75)


def test_many_rows_on_many_threads():
    assert_agrees(*problem(5000, 10), alpha=0.3)
    assert_agrees(*problem(700, 300), alpha=0.3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [10, 1000])
def test_saturated_logits(dtype, classes):
    logits, labels, theta, teacher_logits = problem(64, classes, dtype)
    logits, teacher_logits = logits.sign() * 1e4, teacher_logits.sign() * 1e4
    logits[::2] = -1e4
    logits[::2, 1] = 1e4  # sure of one class
    assert_agrees(logits, labels, theta)
    assert_agrees(logits, labels, theta, teacher_logits, 0.3)


@pytest.mark.parametrize("classes", [10, 1000])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [(0, 0), (5, 3), (19, -1)])
def test_a_bad_logit_makes_the_loss_nan(backend, classes, bad, place):
    logits, labels, theta, teacher_logits = problem(20, classes)
    logits[place] = bad
    loss, gradient = with_gradient(taylorglo_loss, logits, labels, theta)
    assert loss.isnan() and gradient[place].isnan()
    assert taylorglo_loss(teacher_logits, labels, theta, logits, 0.3).isnan()  # from the teacher, too


@pytest.mark.parametrize("classes", [10, 1000])
def test_minus_infinity_is_a_class_that_is_ruled_out(backend, classes):
    logits, labels, theta, _ = problem(20, classes)
    logits[:, 1] = -float("inf")
    assert_agrees(logits, labels, theta)
    assert taylorglo_loss(torch.full_like(logits, -float("inf")), labels, theta).isnan()


def test_other_layouts():
    logits, labels, theta, teacher_logits = problem(40, 24)
    wide = torch.randn(40, 48)
    assert_agrees(logits.t().contiguous().t(), labels, theta, teacher_logits.t().contiguous().t(), 0.3)
    assert_agrees(wide[:, ::2], labels, theta, wide[:, 1::2], 0.3)
    assert_agrees(logits[1::2], labels[::2], torch.stack([theta, theta], 1)[:, 0], teacher_logits[::2], 0.3)
    assert_agrees(logits[:1].expand(40, 24), labels[:1].expand(40), theta[:1].expand(8))


def test_the_module_replaces_cross_entropy():
    logits, labels, theta, teacher_logits = problem(8, 10)
    criterion = TaylorGLOLoss(theta.tolist())
    assert criterion(logits, labels) == taylorglo_loss(logits, labels, theta)
    assert criterion(logits, labels, teacher_logits, 0.3) == taylorglo_loss(logits, labels, theta, teacher_logits, 0.3)
    assert list(criterion.state_dict()) == ["theta"] and not list(criterion.parameters())
    with pytest.raises(ValueError, match="theta"):
        TaylorGLOLoss([1, 2, 3])


def test_a_schedule_has_a_loss_for_each_epoch():
    logits, labels, theta, teacher_logits = problem(8, 10)
    schedule = {"plain_loss": "cross-entropy", "add_cross_entropy": False,
                "epochs": [{"theta": theta.tolist()}, {"theta": None}]}
    first, second = losses(schedule)
    assert first(logits, labels) == taylorglo_loss(logits, labels, theta)
    assert second(logits, labels) == F.cross_entropy(logits, labels)
    first, second = losses(schedule | {"add_cross_entropy": True})
    both = taylorglo_loss(logits, labels, theta) + F.cross_entropy(logits, labels)
    torch.testing.assert_close(first(logits, labels), both)
    assert second(logits, labels) == F.cross_entropy(logits, labels)
    x = 0.3 * teacher_logits.softmax(1) + 0.7 * F.one_hot(labels, 10)  # Eq. 3
    both = taylorglo_loss(logits, labels, theta, teacher_logits, 0.3) - (x * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(first(logits, labels, teacher_logits, 0.3), both)
    teacher_logits, alpha = teacher_logits.requires_grad_(), torch.tensor(0.3, requires_grad=True)
    first(logits.requires_grad_(), labels, teacher_logits, alpha).backward()
    assert logits.grad is not None and teacher_logits.grad is None and alpha.grad is None


def test_one_training_step_of_a_network_agrees_with_the_reference():
    rng = torch.Generator().manual_seed(1)
    images, teacher_logits = torch.randn(32, 1, 8, 8, generator=rng).double(), torch.randn(32, 10, generator=rng).double()
    labels, theta = torch.randint(10, (32,), generator=rng), 20 * torch.rand(8, generator=rng) - 10

    def weights_after_a_step(loss_function):
        model = make_model("resnet8", 10, 1, seed=0).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        loss_function(model(images), labels, theta, teacher_logits, 0.3).backward()
        optimizer.step()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    fused, reference = weights_after_a_step(taylorglo_loss), weights_after_a_step(reference_loss)
    assert (fused - reference).abs().max() <= 1e-10


def test_the_result_has_the_same_bits_for_any_number_of_threads():
    threads = torch.get_num_threads()
    try:
        for arguments in (problem(4000, 10), problem(600, 333), problem(600, 333, teacher=False)):
            results = []
            for count in (1, 2, 3, 2):
                torch.set_num_threads(count)
                results.append(with_gradient(taylorglo_loss, *arguments, alpha=0.3 if arguments[3] is not None else None))
            for loss, gradient in results[1:]:
                assert torch.equal(loss, results[0][0]) and torch.equal(gradient, results[0][1])
    finally:
        torch.set_num_threads(threads)


# ---- The derivative --------------------------------------------------------------------------------------------------


def test_gradient_is_the_formula(backend):
    # dL/dz_j = -1/n y_j (G_j - sum_i G_i y_i), G = t2 + t3 a + t4 a^2/2 + t5 b + t6 b a + t7 b^2/2
    logits, labels, t, teacher_logits = (v if v.dtype == torch.int64 else v.double() for v in problem(7, 5))
    y = torch.softmax(logits, 1)
    x = 0.3 * torch.softmax(teacher_logits, 1) + 0.7 * torch.nn.functional.one_hot(labels, 5)
    a, b = y - t[1], x - t[0]
    g = t[2] + t[3] * a + t[4] * a**2 / 2 + t[5] * b + t[6] * b * a + t[7] * b**2 / 2
    expected = -y * (g - (g * y).sum(1, keepdim=True)) / 5 / 7
    _, gradient = with_gradient(taylorglo_loss, logits, labels, t, teacher_logits, 0.3)
    torch.testing.assert_close(gradient, expected)


def test_when_a_loss_trains_backwards(backend):
    # At the uniform prediction the first step raises the true class's logit exactly when
    # t5 + t6 (1/n - t1) + t7 (1 - 2 t0) / 2 > 0.
    rng = torch.Generator().manual_seed(1)
    logits, labels, raised = torch.zeros(1, 10, dtype=torch.float64), torch.tensor([4]), []
    for _ in range(200):
        t = 20 * torch.rand(8, generator=rng, dtype=torch.float64) - 10
        _, gradient = with_gradient(taylorglo_loss, logits, labels, t)
        raised.append(bool(gradient[0, 4] < 0))
        assert raised[-1] == bool(t[5] + t[6] * (1 / 10 - t[1]) + t[7] * (1 - 2 * t[0]) / 2 > 0)
    assert 60 < sum(raised) < 140


@pytest.mark.parametrize("rows, classes", [(3, 10), (2, 70)])
def test_gradcheck(backend, rows, classes):
    logits, labels, theta, teacher_logits = problem(rows, classes, torch.float64)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(taylorglo_loss, (logits, labels, theta.double()))
    assert torch.autograd.gradcheck(taylorglo_loss, (logits, labels, theta, teacher_logits, 0.3))


def test_gradient_flows_to_the_logits_only(backend):
    logits, labels, theta, teacher_logits = problem(4, 10)
    for tensor in (logits, theta, teacher_logits):
        tensor.requires_grad_()
    taylorglo_loss(logits, labels, theta, teacher_logits, 0.3).backward()
    assert logits.grad is not None and theta.grad is None and teacher_logits.grad is None
    assert not taylorglo_loss(logits.detach(), labels, theta, teacher_logits, 0.3).requires_grad
    with torch.no_grad():
        assert not taylorglo_loss(logits, labels, theta).requires_grad


def test_backward_twice():
    logits, labels, theta, _ = problem(4, 10)
    logits.requires_grad_()
    loss = taylorglo_loss(logits, labels, theta)
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    expected = first.clone()
    first.zero_()  # the result is the caller's
    (second,) = torch.autograd.grad(3 * loss, logits, retain_graph=True)
    (third,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(second, 3 * expected)
    torch.testing.assert_close(third, expected)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    with pytest.raises(RuntimeError, match="differentiable only once"):
        torch.autograd.grad(taylorglo_loss(logits, labels, theta), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="torch.func.grad are not supported"):
        torch.func.grad(lambda z: taylorglo_loss(z, labels, theta))(logits.detach())


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # which PyTorch's own forward mode uses
def test_forward_mode_is_refused_and_not_zero():
    logits, labels, theta, _ = problem(4, 10)
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(lambda z: taylorglo_loss(z, labels, theta), (logits,), (logits,))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        taylorglo_loss(torch.autograd.forward_ad.make_dual(logits, logits), labels, theta)


# ---- Bad input -------------------------------------------------------------------------------------------------------

Z, L, T = torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64), torch.zeros(8)
BAD_INPUTS = {
    "integer logits": ((Z.long(), L, T), TypeError, "logits"),
    "1-d logits": ((Z[0], L, T), ValueError, "logits"),
    "no classes": ((Z[:, :0], L, T), ValueError, "logits"),
    "float labels": ((Z, L.float(), T), TypeError, "labels"),
    "int32 labels": ((Z, L.int(), T), TypeError, "labels"),
    "too few labels": ((Z, L[:2], T), ValueError, "labels"),
    "one-hot labels": ((Z, Z.long(), T), ValueError, "labels"),
    "label too large": ((Z, L + 4, T), ValueError, r"labels: expected in \[0, 4\)"),
    "label negative": ((Z, L - 1, T), ValueError, r"labels: expected in \[0, 4\)"),
    "theta of size 7": ((Z, L, T[:7]), ValueError, "theta"),
    "theta 2-d": ((Z, L, T[None]), ValueError, "theta"),
    "integer theta": ((Z, L, T.long()), TypeError, "theta"),
    "theta elsewhere": ((Z, L, T.to("meta")), ValueError, "theta"),
    "teacher of another shape": ((Z, L, T, Z[:, :3], 0.5), ValueError, "teacher_logits"),
    "teacher of another dtype": ((Z, L, T, Z.double(), 0.5), TypeError, "teacher_logits"),
    "teacher without alpha": ((Z, L, T, Z), ValueError, "alpha"),
    "alpha without teacher": ((Z, L, T, None, 0.5), ValueError, "alpha"),
    "alpha above 1": ((Z, L, T, Z, 1.5), ValueError, "alpha"),
    "alpha below 0": ((Z, L, T, Z, -0.1), ValueError, "alpha"),
    "alpha is nan": ((Z, L, T, Z, float("nan")), ValueError, "alpha"),
    "alpha 1-d": ((Z, L, T, Z, T[:1]), ValueError, "alpha"),
    "integer alpha tensor": ((Z, L, T, Z, L[0]), ValueError, "alpha"),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_input_is_named(backend, case):
    arguments, error, message = BAD_INPUTS[case]
    with pytest.raises(error, match=message):
        taylorglo_loss(*arguments)


def test_a_bad_label_is_found_with_and_without_a_gradient():
    for classes in (4, 400):
        logits, labels = torch.zeros(200, classes), torch.zeros(200, dtype=torch.int64)
        labels[150] = classes
        for tensor in (logits, logits.clone().requires_grad_()):
            with pytest.raises(ValueError, match="labels: expected in .* in row 150"):
                taylorglo_loss(tensor, labels, T)


# ---- PyTorch's machinery ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [10, 70])
def test_opcheck(classes):
    logits, labels, theta, teacher_logits = problem(6, classes)
    logits.requires_grad_()
    for rest in ((None, None, None), (teacher_logits, torch.tensor(0.3), None), (teacher_logits, None, 0.3)):
        torch.library.opcheck(torch.ops.taylorglo.loss.default, (logits, labels, theta, *rest))
    arguments = (logits.detach(), labels, theta, teacher_logits, None, 0.3)
    torch.library.opcheck(torch.ops.taylorglo.loss_and_gradient.default, arguments)


def test_compiles_without_a_graph_break(backend):
    torch._dynamo.reset()
    logits, labels, theta, teacher_logits = problem(6, 10)

    def step(logits, alpha):
        return 2 * taylorglo_loss(torch.relu(logits), labels, theta, teacher_logits, alpha)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for alpha in (torch.tensor(0.3), torch.tensor(0.4), 0.3):
        expected, expected_gradient = with_gradient(step, logits, alpha)
        loss, gradient = with_gradient(compiled, logits, alpha)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(gradient, expected_gradient)


def test_the_first_loss_of_a_process_may_be_compiled():
    code = (
        "import sys, torch; from taylorglo_ext import taylorglo_loss; assert 'torch._dynamo' not in sys.modules;"
        "loss = torch.compile(taylorglo_loss, fullgraph=True, backend='aot_eager');"
        "loss(torch.randn(6, 10, requires_grad=True), torch.arange(6), torch.randn(8)).backward()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(backend, dtype):
    # As every loss under autocast, this one computes in float32. So a gradient that float16 cannot hold survives, when the
    # loss is scaled up, to where it is cast.
    logits, labels, theta, teacher_logits = problem(128, 100, dtype)
    with torch.autocast("cpu", dtype=dtype):
        loss, gradient = with_gradient(taylorglo_loss, logits, labels, theta, upstream=2.0**16)
        assert taylorglo_loss(logits, labels, theta, teacher_logits.float(), 0.3).dtype == torch.float32
    expected, expected_gradient = with_gradient(reference_loss, logits.float(), labels, theta, upstream=2.0**16)
    assert loss.dtype == torch.float32 and gradient.dtype == dtype
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient.float(), expected_gradient, rtol=1e-2, atol=1e-5)


def _child(queue, backend, arguments):
    load(backend)
    loss, gradient = with_gradient(taylorglo_loss, *arguments, alpha=0.3)
    queue.put((loss.item(), gradient.tolist()))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_in_a_child_process(method):
    if method == "fork" and torch.cuda.is_available():
        pytest.skip("where there is a GPU, any backward starts autograd's threads, which a fork does not survive")
    arguments = problem(128, 10)
    loss, gradient = with_gradient(taylorglo_loss, *arguments, alpha=0.3)
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    child = context.Process(target=_child, args=(queue, load("fused"), arguments), daemon=True)
    child.start()
    assert queue.get(timeout=60) == (loss.item(), gradient.tolist())
    child.join(10)
    assert child.exitcode == 0


# ---- Building --------------------------------------------------------------------------------------------------------


def run_python(code, cache, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, start_new_session=True, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "TORCH_EXTENSIONS_DIR": str(cache), **environment},
    )  # fmt: skip


def test_a_killed_build_does_not_block_the_next(tmp_path):
    code = "import taylorglo_ext; taylorglo_ext.load('fused')"
    killed = run_python(code, tmp_path)
    while not list(tmp_path.glob("taylorglo/*.building-*/*.ninja")):
        assert killed.poll() is None
        time.sleep(0.05)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    _, progress = run_python(code, tmp_path).communicate(timeout=120)
    assert "building" in progress
    (library,) = tmp_path.glob("taylorglo/*.so")
    assert not list(tmp_path.glob("taylorglo/*.building-*"))
    _, progress = run_python(code, tmp_path).communicate(timeout=60)
    assert "building" not in progress


@contextlib.contextmanager
def nothing_loaded(monkeypatch, cache, **environment):
    with monkeypatch.context() as patch:
        patch.setattr(build, "_loaded", set())
        patch.setenv("TORCH_EXTENSIONS_DIR", str(cache))
        for name, value in environment.items():
            patch.setenv(name, value)
        yield


def test_without_a_compiler(monkeypatch, tmp_path):
    with nothing_loaded(monkeypatch, tmp_path, CXX="no-such-compiler"):
        with pytest.raises(BackendError, match="no C.. compiler .*install"):
            load("fused")
        with pytest.warns(UserWarning, match="reference.* install"):
            assert load("auto") == "reference"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            taylorglo_loss(Z, L, T)
            assert load("reference") == "reference"


def test_a_failed_build_says_so_in_one_line(monkeypatch, tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text(
        "#!/bin/sh\n"
        "case $1 in --version|-dumpversion|-dumpfullversion) exec c++ $@ ;; esac\n"
        "echo 'x.cpp:1: error: out of order' >&2; exit 1\n"
    )
    compiler.chmod(0o755)
    with nothing_loaded(monkeypatch, tmp_path / "cache", CXX=str(compiler)):
        with pytest.raises(BackendError, match="out of order") as caught:
            load("fused")
    assert "\n" not in str(caught.value) and caught.value.__cause__ is not None
    assert not list(tmp_path.glob("cache/taylorglo/*building*"))


def test_load_checks_its_arguments():
    with pytest.raises(ValueError, match="backend"):
        load("fast")
    with pytest.raises(ValueError, match="device"):
        load("auto", "tpu")
    if not torch.cuda.is_available():
        with pytest.raises(BackendError, match="CUDA"):
            load("fused", "cuda")


def test_the_first_loss_loads_the_backend(monkeypatch):
    monkeypatch.setattr(taylorglo_ext, "_in_use", {})
    taylorglo_loss(Z, L, T)
    assert taylorglo_ext._in_use == {"cpu": "fused"}


@pytest.mark.skipif(build.cuda_home() is None, reason="needs nvcc")
def test_cuda_source_compiles_without_a_warning(tmp_path):
    code = (
        "import sys, pathlib; from taylorglo_ext import build; build.load_library('cpu');"
        "build.build('cuda', pathlib.Path(sys.argv[1]) / 'taylorglo_cuda.so',"
        " ('-Werror=all-warnings', '-Xcompiler=-Wall,-Werror'))"
    )
    environment = {**os.environ, "TORCH_CUDA_ARCH_LIST": "8.0;9.0"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "taylorglo_cuda.so").exists()


# ---- On a GPU --------------------------------------------------------------------------------------------------------


@pytest.fixture
def poisoned_memory():
    """Fresh CUDA memory is full of NaN, so that an element that is not written shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield load("fused", "cuda")
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.mark.cuda
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 127, 128, 129, 5000])
@pytest.mark.parametrize("classes", [1, 2, 10, 33, 100, 1000, 1001, 32003])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gpu_odd_sizes(poisoned_memory, rows, classes, dtype):
    if rows * classes > 10**7:
        pytest.skip("too large for the float64 reference on the CPU")
    logits, labels, theta, teacher_logits = problem(rows, classes, dtype, device="cuda")
    assert_agrees(logits, labels, theta)
    assert_agrees(logits, labels, theta, teacher_logits, torch.tensor(0.3, device="cuda"), upstream=-2.75)
    assert_agrees(logits.t().contiguous().t(), labels, theta, teacher_logits, 1.0)


@pytest.mark.cuda
@pytest.mark.parametrize("classes", [10, 1000, 32003])
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


@pytest.mark.cuda
@pytest.mark.parametrize("rows", [128, 5000])
def test_gpu_graph_replays_with_new_parameters(poisoned_memory, rows):
    logits, labels, theta, teacher_logits = problem(rows, 10, device="cuda")
    alpha = torch.tensor(0.3, device="cuda")
    logits.requires_grad_()

    def step():
        loss = taylorglo_loss(logits, labels, theta, teacher_logits, alpha)
        return loss, torch.autograd.grad(loss, logits)[0]

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in (1, 2):
        theta.copy_(problem(1, 2, seed=seed)[2])
        alpha.fill_(seed / 3)
        graph.replay()
        replayed = [t.clone() for t in captured]
        for result, expected in zip(replayed, step(), strict=True):
            assert torch.equal(result, expected)
