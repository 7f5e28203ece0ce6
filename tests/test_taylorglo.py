"""The loss of Eq. 2 and Eq. 3, through the public door, against the float64 reference and numbers
worked by hand."""

import copy
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from taylorglo_ext import TaylorGLOLoss, load, loss_and_gradient, losses, taylorglo_loss
from taylorglo_ext.plain import distilled_cross_entropy, generalized_cross_entropy, label_smoothing
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


def problem(rows, classes, dtype=torch.float32, teacher=True, seed=0, device="cpu", shape=None):
    """Random logits, labels, theta and, if asked for, teacher logits."""
    rng = torch.Generator().manual_seed(seed)
    shape = shape or (rows, classes)
    logits = (3 * torch.randn(shape, generator=rng)).to(dtype)
    labels = torch.randint(classes, (rows,), generator=rng)
    theta = 20 * torch.rand(8, generator=rng) - 10
    teacher_logits = (3 * torch.randn(shape, generator=rng)).to(dtype) if teacher else None
    return [None if t is None else t.to(device) for t in (logits, labels, theta, teacher_logits)]


def with_gradient(loss_function, logits, *rest, upstream=1.0, **named):
    logits = logits.detach().clone().requires_grad_()
    loss = loss_function(logits, *rest, **named)
    loss.backward(torch.full_like(loss, upstream))
    return loss.detach(), logits.grad


def assert_agrees(logits, labels, theta, teacher_logits=None, alpha=None, upstream=1.0):
    """The loss and gradient are those of the reference in float64 on the CPU, to rounding."""

    def exact(t):
        return (
            t.detach().cpu().double()
            if isinstance(t, torch.Tensor) and t.is_floating_point()
            else t
        )

    loss, gradient = with_gradient(
        taylorglo_loss, logits, labels, theta, teacher_logits, alpha, upstream=upstream
    )
    true_loss, true_gradient = with_gradient(
        reference_loss,
        exact(logits),
        labels.cpu(),
        exact(theta),
        exact(teacher_logits),
        exact(alpha),
        upstream=upstream,
    )
    assert gradient.dtype == logits.dtype and gradient.shape == logits.shape
    assert loss.dtype == (torch.float64 if logits.dtype == torch.float64 else torch.float32)
    rows, classes = logits.shape
    if rows == 0:
        return torch.testing.assert_close(loss.isnan().cpu(), torch.tensor(True))
    # Sums are rounded in the loss's dtype, relative to the size of f and df/dy; the gradient also
    # in the logits' dtype,
    # where float16 has no numbers below 6e-8.
    size = torch.finfo(loss.dtype).eps * 16 * (1 + theta.abs().sum().item() ** 2)
    assert abs(loss.item() - true_loss.item()) <= size
    y = torch.softmax(exact(logits), dim=1)
    smallest = 6e-8 if logits.dtype == torch.float16 else 1e-37
    bound = TOLERANCE[logits.dtype] * true_gradient.abs() + (1 + abs(upstream)) * (
        size * y / (rows * classes) + smallest
    )
    assert ((gradient.cpu().double() - true_gradient).abs() <= bound).all()


def test_hand_worked(backend):
    # y = softmax(0, ln 3) = (1/4, 3/4), label 1. With theta_1 = 1/4 and theta_0 = 0: a = (0, 1/2),
    # b = (0, 1).
    # Every term of f has a factor a, so f(class 0) = 0.
    # f(class 1) = 1/2 + 2/2/4 + 6/6/8 + 1/2 + 2/2/4 + 2/2/2 = 17/8, and L = -1/2 * 17/8.
    # G = (1, 1 + 1 + 3/4 + 1 + 1 + 1) = (1, 23/4); sum_i G_i y_i = 73/16; dL/dz_1 = -1/2 * 3/4 *
    # (23/4 - 73/16) = -57/128.
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [10, 1000])
def test_saturated_logits(backend, dtype, classes):
    logits, labels, theta, teacher_logits = problem(64, classes, dtype)
    sure = torch.full_like(logits, -1e4)
    sure[:, 1] = 1e4
    ruled_out = logits.clone()
    ruled_out[:, 1] = -float("inf")
    for extreme in (logits.sign() * 1e4, sure, ruled_out):
        assert_agrees(extreme, labels, theta)
        assert_agrees(extreme, labels, theta, teacher_logits.sign() * 1e4, 0.3)
    assert taylorglo_loss(torch.full_like(logits, -float("inf")), labels, theta).isnan()


@pytest.mark.parametrize("classes", [10, 1000])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [(0, 0), (5, 3), (19, -1)])
def test_a_bad_logit_makes_the_loss_nan(backend, classes, bad, place):
    logits, labels, theta, teacher_logits = problem(20, classes)
    logits[place] = bad
    loss, gradient = with_gradient(taylorglo_loss, logits, labels, theta)
    assert loss.isnan() and gradient[place].isnan()
    assert taylorglo_loss(
        teacher_logits, labels, theta, logits, 0.3
    ).isnan()  # from the teacher, too


def test_other_layouts():
    logits, labels, theta, teacher_logits = problem(40, 24)
    wide = torch.randn(40, 48)
    assert_agrees(
        logits.t().contiguous().t(), labels, theta, teacher_logits.t().contiguous().t(), 0.3
    )
    assert_agrees(wide[:, ::2], labels, theta, wide[:, 1::2], 0.3)
    assert_agrees(
        logits[1::2], labels[::2], torch.stack([theta, theta], 1)[:, 0], teacher_logits[::2], 0.3
    )
    assert_agrees(logits[:1].expand(40, 24), labels[:1].expand(40), theta[:1].expand(8))


def test_the_result_has_the_same_bits_for_any_number_of_threads():
    threads = torch.get_num_threads()
    try:
        for arguments in (problem(4000, 10), problem(600, 333), problem(600, 333, teacher=False)):
            results = []
            for count in (1, 2, 3, 2):
                torch.set_num_threads(count)
                results.append(
                    with_gradient(
                        taylorglo_loss, *arguments, alpha=0.3 if arguments[3] is not None else None
                    )
                )
            for loss, gradient in results[1:]:
                assert torch.equal(loss, results[0][0]) and torch.equal(gradient, results[0][1])
    finally:
        torch.set_num_threads(threads)


def rows_by_hand(logits, labels, theta, teacher_logits, alpha, ignore_index, reduction):
    """What the drop-in promises, one prediction after the other."""
    flat = logits.movedim(1, -1).flatten(0, -2)
    teacher = (
        [None] * len(flat)
        if teacher_logits is None
        else teacher_logits.movedim(1, -1).flatten(0, -2)[:, None]
    )
    rows = [
        z.sum() * 0
        if label == ignore_index
        else reference_loss(z[None], label[None], theta, t, alpha)
        for z, label, t in zip(flat, labels.flatten(), teacher, strict=True)
    ]
    if reduction == "none":
        return torch.stack(rows).reshape(labels.shape)
    return sum(rows) / (1 if reduction == "sum" else (labels != ignore_index).sum())


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(6, 5), (3, 70), (2, 3, 4), (2, 5, 3, 2)], ids=str)
@pytest.mark.parametrize("ignore_index", [-100, 1])
def test_takes_what_cross_entropy_takes(backend, reduction, shape, ignore_index):
    for teacher in (False, True):
        logits, _, theta, teacher_logits = problem(*shape[:2], torch.float64, teacher, shape=shape)
        labels = torch.randint(
            shape[1], (shape[0], *shape[2:]), generator=torch.Generator().manual_seed(1)
        )
        labels.view(-1)[1::3] = ignore_index
        arguments = (labels, theta, teacher_logits, 0.3 if teacher else None)
        upstream = torch.randn(labels.shape if reduction == "none" else (), dtype=torch.float64)
        results = []
        for function in (taylorglo_loss, rows_by_hand):
            z = logits.clone().requires_grad_()
            loss = function(z, *arguments, ignore_index=ignore_index, reduction=reduction)
            loss.backward(upstream)
            results.append((loss.detach(), z.grad))
        torch.testing.assert_close(results[0], results[1])
    assert taylorglo_loss(
        logits, torch.full_like(labels, ignore_index), theta, ignore_index=ignore_index
    ).isnan()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loss_and_gradient(backend, dtype):
    for teacher, alpha in ((False, None), (True, 0.3), (True, torch.tensor(0.6))):
        logits, labels, theta, teacher_logits = problem(9, 33, dtype, teacher)
        z = logits.clone().requires_grad_()
        loss, gradient = loss_and_gradient(z, labels, theta, teacher_logits, alpha)
        assert (
            gradient.dtype == (torch.float32 if dtype == torch.float16 else dtype)
            and not loss.requires_grad
        )
        expected, expected_gradient = with_gradient(
            taylorglo_loss, logits, labels, theta, teacher_logits, alpha
        )
        (2 * z).backward(gradient)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(
            z.grad, 2 * expected_gradient, rtol=TOLERANCE[dtype] * 4, atol=1e-6
        )


def test_a_loss_scale_reaches_float16_gradients_before_they_are_rounded(backend):
    logits, labels, theta, _ = problem(64, 1000, torch.float16)
    _, gradient = with_gradient(taylorglo_loss, logits, labels, theta, upstream=2.0**15)
    _, expected = with_gradient(reference_loss, logits.double(), labels, theta, upstream=2.0**15)
    torch.testing.assert_close(gradient.double(), expected, rtol=3e-3, atol=2e-6)


class Model(torch.nn.Module):
    """A model that computes its own loss, as trainers and exporters meet it."""

    def __init__(self, criterion):
        super().__init__()
        self.layer, self.criterion = torch.nn.Linear(10, 10), criterion

    def forward(self, x, labels: torch.Tensor):
        return self.criterion(self.layer(x), labels)


def test_the_module_replaces_cross_entropy(tmp_path):
    logits, labels, theta, teacher_logits = problem(8, 10)
    criterion = TaylorGLOLoss(theta.tolist())
    assert criterion(logits, labels) == taylorglo_loss(logits, labels, theta)
    assert criterion(logits, labels, teacher_logits, 0.3) == taylorglo_loss(
        logits, labels, theta, teacher_logits, 0.3
    )
    assert list(criterion.state_dict()) == ["theta"] and not list(criterion.parameters())
    with pytest.raises(ValueError, match="theta"):
        TaylorGLOLoss([1, 2, 3])
    model = Model(TaylorGLOLoss(theta, add_cross_entropy=True, ignore_index=2, reduction="sum"))
    expected = model(logits, labels)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin(logits, labels) == expected
    for cast in (torch.nn.Module.half, torch.nn.Module.bfloat16):
        twin = cast(copy.deepcopy(model))
        assert (
            torch.equal(twin.criterion.theta, theta)
            and twin(logits.to(twin.layer.weight.dtype), labels).isfinite()
        )
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    try:
        parallel = torch.nn.parallel.DistributedDataParallel(model)
        loss = parallel(logits, labels)
        loss.backward()
        assert loss == expected and model.layer.weight.grad.any()
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_a_scripted_model_may_carry_the_loss():
    class Exported(Model):
        def forward(self, x):
            return self.layer(x)

    x = torch.randn(3, 10)
    model = Exported(TaylorGLOLoss(T))
    assert torch.equal(torch.jit.script(model)(x), model(x))


def test_a_schedule_has_a_loss_for_each_epoch():
    logits, labels, theta, teacher_logits = problem(8, 10)
    first, second = losses(
        {"epochs": [{"theta": theta.tolist()}, {"theta": None}], "add_cross_entropy": True,
         "plain_loss": "cross-entropy"}
    )
    both = taylorglo_loss(logits, labels, theta) + F.cross_entropy(logits, labels)
    torch.testing.assert_close(first(logits, labels), both)
    assert second(logits, labels) == F.cross_entropy(logits, labels)
    teacher_logits, alpha = teacher_logits.requires_grad_(), torch.tensor(0.3, requires_grad=True)
    first(logits.requires_grad_(), labels, teacher_logits, alpha).backward()
    assert logits.grad is not None and teacher_logits.grad is None and alpha.grad is None


def test_plain_losses_by_hand():
    # p = (1/4, 3/4); label 1; Eq. 3 with an undecided teacher and alpha = 1/2: x = (1/4, 3/4).
    logits, label, teacher = torch.tensor([[0, 3.0]]), torch.tensor([1]), torch.zeros(1, 2)
    logits[0, 1] = logits[0, 1].log()
    p = torch.tensor([0.25, 0.75])
    generalized = (1 - p**0.7) / 0.7
    for function, hard, distilled in (
        (distilled_cross_entropy, -p[1].log(), -(p * p.log()).sum()),
        (generalized_cross_entropy, generalized[1], (p * generalized).sum()),
        (
            label_smoothing,
            -(0.05 * p[0].log() + 0.95 * p[1].log()),
            -(0.275 * p[0].log() + 0.725 * p[1].log()),
        ),
    ):
        torch.testing.assert_close(function(logits, label), hard)
        torch.testing.assert_close(function(logits, label, teacher, 0.5), distilled)
        torch.testing.assert_close(function(logits, label, teacher, torch.tensor(0.5)), distilled)
    three = torch.stack([logits, logits, -logits]).squeeze(1)
    labels = torch.tensor([1, 0, -100])
    kept = distilled_cross_entropy(three, labels, torch.zeros(3, 2), 0.5, ignore_index=-100)
    torch.testing.assert_close(
        kept, distilled_cross_entropy(three[:2], labels[:2], torch.zeros(2, 2), 0.5)
    )


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


@pytest.mark.filterwarnings(
    "ignore:.torch.jit.script. is deprecated"
)  # which PyTorch's own forward mode uses
def test_forward_mode_is_refused_and_not_zero():
    logits, labels, theta, _ = problem(4, 10)
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(lambda z: taylorglo_loss(z, labels, theta), (logits,), (logits,))
    with (
        torch.autograd.forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match="no forward-mode derivative"),
    ):
        taylorglo_loss(torch.autograd.forward_ad.make_dual(logits, logits), labels, theta)


Z, L, T = torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64), torch.zeros(8)
BAD_INPUTS = {
    "a tuple of logits": (((Z, Z), L, T), TypeError, "logits: expected a tensor, got tuple"),
    "a list of labels": ((Z, [0, 1, 2], T), TypeError, "labels: expected a tensor, got list"),
    "a list theta": ((Z, L, [0.0] * 8), TypeError, "theta: expected a tensor, got list"),
    "a dict of the teacher": (
        (Z, L, T, {"logits": Z}, 0.5),
        TypeError,
        "teacher_logits: expected a tensor",
    ),
    "half theta": ((Z, L, T.half()), TypeError, "theta"),
    "labels of too few dimensions": ((Z[..., None], L, T), ValueError, "labels"),
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
    with pytest.raises(error, match=message):
        loss_and_gradient(*arguments)
    with pytest.raises(ValueError, match="reduction: expected"):
        taylorglo_loss(Z, L, T, reduction="average")
    with pytest.raises(ValueError, match="labels: expected in .* got -100 in row 2"):
        taylorglo_loss(Z, torch.tensor([0, 1, -100]), T, ignore_index=None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [(None, 1), (-100, 1), (2, 2), (-100, 0)], ids=str)
def test_opcheck(dtype, options):
    for classes, rest in ((10, (None, None)), (70, (torch.tensor(0.3), None)), (3, (None, 0.3))):
        logits, labels, theta, teacher_logits = problem(
            6, classes, dtype, teacher=rest != (None, None)
        )
        arguments = (labels, theta, teacher_logits, *rest, *options)
        torch.library.opcheck(
            torch.ops.taylorglo.loss.default, (logits.clone().requires_grad_(), *arguments)
        )
        torch.library.opcheck(torch.ops.taylorglo.loss_and_gradient.default, (logits, *arguments))


def test_batched_gradients_and_batched_losses(backend):
    logits, labels, theta, _ = problem(6, 10)
    weights, x = torch.randn(3, 10, 10), torch.randn(6, 10)

    def of_weights(weights):
        return torch.stack([taylorglo_loss(x @ w, labels, theta) for w in weights])

    expected = torch.autograd.functional.jacobian(of_weights, weights)
    torch.testing.assert_close(
        torch.autograd.functional.jacobian(of_weights, weights, vectorize=True), expected
    )
    z = logits.clone().requires_grad_()
    rows = taylorglo_loss(z, labels, theta, reduction="none")
    (gradients,) = torch.autograd.grad(rows, z, torch.eye(6), is_grads_batched=True)
    torch.testing.assert_close(
        gradients.sum(0), with_gradient(taylorglo_loss, logits, labels, theta)[1] * 6
    )
    stacked = torch.stack([logits, -logits])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the fused operator is called once for each
        batched = torch.vmap(lambda z: taylorglo_loss(z, labels, theta))(stacked)
    torch.testing.assert_close(
        batched, torch.stack([taylorglo_loss(z, labels, theta) for z in stacked])
    )


def test_exports(backend):
    logits, labels, theta, _ = problem(6, 10)
    program = torch.export.export(TaylorGLOLoss(theta, reduction="none"), (logits, labels))
    torch.testing.assert_close(
        program.module()(-logits, labels), taylorglo_loss(-logits, labels, theta, reduction="none")
    )


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
        "import sys, torch; from taylorglo_ext import taylorglo_loss;"
        "assert 'torch._dynamo' not in sys.modules;"
        "loss = torch.compile(taylorglo_loss, fullgraph=True, backend='aot_eager');"
        "loss(torch.randn(6, 10, requires_grad=True), torch.arange(6), torch.randn(8)).backward()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(backend, dtype):
    # As every loss under autocast, this one computes in float32. So a gradient that float16 cannot
    # hold survives, when the
    # loss is scaled up, to where it is cast.
    logits, labels, theta, teacher_logits = problem(128, 100, dtype)
    with torch.autocast("cpu", dtype=dtype):
        loss, gradient = with_gradient(taylorglo_loss, logits, labels, theta, upstream=2.0**16)
        assert (
            taylorglo_loss(logits, labels, theta, teacher_logits.float(), 0.3).dtype
            == torch.float32
        )
    expected, expected_gradient = with_gradient(
        reference_loss, logits.float(), labels, theta, upstream=2.0**16
    )
    assert loss.dtype == torch.float32 and gradient.dtype == dtype
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient.float(), expected_gradient, rtol=1e-2, atol=1e-5)
