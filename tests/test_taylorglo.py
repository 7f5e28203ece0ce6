"""The loss of Eq. 2 and Eq. 3 against the float64 reference and numbers worked by hand."""

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
    loss.backward(upstream if isinstance(upstream, torch.Tensor) else
                  torch.full_like(loss, upstream))
    return loss.detach(), logits.grad


def exact(t):
    return t.detach().cpu().double() if torch.is_tensor(t) and t.is_floating_point() else t


def assert_agrees(logits, labels, theta, teacher_logits=None, alpha=None, upstream=1.0):
    """The loss and gradient are those of the reference in float64 on the CPU, to rounding."""
    given = logits, labels, theta, teacher_logits, alpha
    loss, gradient = with_gradient(taylorglo_loss, *given, upstream=upstream)
    given = exact(logits), labels.cpu(), *map(exact, given[2:])
    true_loss, true_gradient = with_gradient(reference_loss, *given, upstream=upstream)
    assert gradient.dtype == logits.dtype and gradient.shape == logits.shape
    assert loss.dtype == (torch.float64 if logits.dtype == torch.float64 else torch.float32)
    if len(logits) == 0:
        assert loss.isnan()
        return
    # Sums are rounded in the loss's dtype, relative to the size of f and df/dy; the gradient also
    # in the logits' dtype, where float16 has no numbers below 6e-8.
    size = torch.finfo(loss.dtype).eps * 16 * (1 + theta.abs().sum().item() ** 2)
    assert abs(loss.item() - true_loss.item()) <= size
    smallest = 6e-8 if logits.dtype == torch.float16 else 1e-37
    absolute = size * torch.softmax(exact(logits), dim=1) / logits.numel() + smallest
    bound = TOLERANCE[logits.dtype] * true_gradient.abs() + (1 + abs(upstream)) * absolute
    assert ((gradient.cpu().double() - true_gradient).abs() <= bound).all()


def test_hand_worked(backend):
    # y = softmax(0, ln 3) = (1/4, 3/4), label 1. With theta_1 = 1/4 and theta_0 = 0: a = (0, 1/2),
    # b = (0, 1). Every term of f has a factor a, so f(class 0) = 0.
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
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_odd_sizes(rows, dtype):
    for classes in (1, 2, 10, 33, 65, 1000):
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
def test_a_bad_logit_makes_the_loss_nan(backend, classes, bad):
    for place in ((0, 0), (5, 3), (19, -1)):
        logits, labels, theta, other = problem(20, classes)
        logits[place] = bad
        loss, gradient = with_gradient(taylorglo_loss, logits, labels, theta)
        assert loss.isnan() and gradient[place].isnan()
        assert taylorglo_loss(other, labels, theta, logits, 0.3).isnan()  # the teacher's


def test_other_layouts():
    logits, labels, theta, teacher_logits = problem(40, 24)
    wide = torch.randn(40, 48)
    by_column = [t.t().contiguous().t() for t in (logits, teacher_logits)]
    strided = torch.stack([theta, theta], 1)[:, 0]
    assert_agrees(by_column[0], labels, theta, by_column[1], 0.3)
    assert_agrees(wide[:, ::2], labels, theta, wide[:, 1::2], 0.3)
    assert_agrees(logits[1::2], labels[::2], strided, teacher_logits[::2], 0.3)
    assert_agrees(logits[:1].expand(40, 24), labels[:1].expand(40), theta[:1].expand(8))


def test_the_result_has_the_same_bits_for_any_number_of_threads():
    threads = torch.get_num_threads()
    try:
        for given in (problem(4000, 10), problem(600, 333), problem(600, 333, teacher=False)):
            results = []
            for count in (1, 2, 3, 2):
                torch.set_num_threads(count)
                alpha = None if given[3] is None else 0.3
                results.append(with_gradient(taylorglo_loss, *given, alpha=alpha))
            for found in results[1:]:
                assert all(map(torch.equal, found, results[0]))
    finally:
        torch.set_num_threads(threads)


def rows_by_hand(logits, labels, theta, teacher_logits, alpha, ignore_index, reduction):
    """What the drop-in promises, one prediction after the other."""
    def flat(t):
        return t.movedim(1, -1).flatten(0, -2)

    teacher = [None] * labels.numel() if teacher_logits is None else flat(teacher_logits)[:, None]
    rows = [z.sum() * 0 if label == ignore_index
            else reference_loss(z[None], label[None], theta, t, alpha)
            for z, label, t in zip(flat(logits), labels.flatten(), teacher, strict=True)]
    if reduction == "none":
        return torch.stack(rows).reshape(labels.shape)
    return sum(rows) / (1 if reduction == "sum" else (labels != ignore_index).sum())


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(6, 5), (3, 70), (2, 3, 4), (2, 5, 3, 2)], ids=str)
@pytest.mark.parametrize("ignore_index", [-100, 1])
def test_takes_what_cross_entropy_takes(backend, reduction, shape, ignore_index):
    labels = torch.randint(shape[1], (shape[0], *shape[2:]),
                           generator=torch.Generator().manual_seed(1))
    labels.view(-1)[1::3] = ignore_index
    options = dict(ignore_index=ignore_index, reduction=reduction)
    upstream = torch.randn(labels.shape if reduction == "none" else (), dtype=torch.float64)
    for teacher, alpha in ((False, None), (True, 0.3)):
        logits, _, theta, lesson = problem(*shape[:2], torch.float64, teacher, shape=shape)
        torch.testing.assert_close(*(
            with_gradient(function, logits, labels, theta, lesson, alpha, upstream=upstream,
                          **options) for function in (taylorglo_loss, rows_by_hand)))
    nothing = torch.full_like(labels, ignore_index)
    assert taylorglo_loss(logits, nothing, theta, ignore_index=ignore_index).isnan()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loss_and_gradient(backend, dtype):
    for teacher, alpha in ((False, None), (True, 0.3), (True, torch.tensor(0.6))):
        logits, *rest = problem(9, 33, dtype, teacher)
        z = logits.clone().requires_grad_()
        loss, gradient = loss_and_gradient(z, *rest, alpha)
        assert gradient.dtype == (torch.float32 if dtype == torch.float16 else dtype)
        assert not loss.requires_grad
        expected = with_gradient(taylorglo_loss, logits, *rest, alpha)
        (2 * z).backward(gradient)
        torch.testing.assert_close(loss, expected[0])
        torch.testing.assert_close(z.grad, 2 * expected[1], rtol=TOLERANCE[dtype] * 4, atol=1e-6)


def test_a_loss_scale_reaches_float16_gradients_before_they_are_rounded(backend):
    logits, labels, theta, _ = problem(64, 1000, torch.float16)
    _, gradient = with_gradient(taylorglo_loss, logits, labels, theta, upstream=2.0**15)
    _, expected = with_gradient(reference_loss, logits.double(), labels, theta, upstream=2.0**15)
    torch.testing.assert_close(gradient.double(), expected, rtol=3e-3, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(backend, dtype):
    # As every loss under autocast, this one computes in float32. So a gradient that float16 cannot
    # hold survives, when the loss is scaled up, to where it is cast.
    logits, labels, theta, teacher_logits = problem(128, 100, dtype)
    with torch.autocast("cpu", dtype=dtype):
        loss, gradient = with_gradient(taylorglo_loss, logits, labels, theta, upstream=2.0**16)
        taught = taylorglo_loss(logits, labels, theta, teacher_logits.float(), 0.3)
    expected = with_gradient(reference_loss, logits.float(), labels, theta, upstream=2.0**16)
    assert loss.dtype == taught.dtype == torch.float32 and gradient.dtype == dtype
    torch.testing.assert_close(loss, expected[0])
    torch.testing.assert_close(gradient.float(), expected[1], rtol=1e-2, atol=1e-5)


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
    taught = taylorglo_loss(logits, labels, theta, teacher_logits, 0.3)
    assert criterion(logits, labels, teacher_logits, 0.3) == taught
    assert list(criterion.state_dict()) == ["theta"] and not list(criterion.parameters())
    with pytest.raises(ValueError, match="theta"):
        TaylorGLOLoss([1, 2, 3])
    model = Model(TaylorGLOLoss(theta, add_cross_entropy=True, ignore_index=2, reduction="sum"))
    expected = model(logits, labels)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin(logits, labels) == expected
    for cast in (torch.nn.Module.half, torch.nn.Module.bfloat16):
        twin = cast(copy.deepcopy(model))
        assert torch.equal(twin.criterion.theta, theta)
        assert twin(logits.to(twin.layer.weight.dtype), labels).isfinite()
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        loss = torch.nn.parallel.DistributedDataParallel(model)(logits, labels)
        loss.backward()
        assert loss == expected and model.layer.weight.grad.any()
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_a_scripted_model_may_carry_the_loss():
    class Exported(Model):
        def forward(self, x):
            return self.layer(x)

    x, model = torch.randn(3, 10), Exported(TaylorGLOLoss(T))
    assert torch.equal(torch.jit.script(model)(x), model(x))


def test_a_schedule_has_a_loss_for_each_epoch():
    logits, labels, theta, teacher_logits = problem(8, 10)
    first, second = losses({"epochs": [{"theta": theta.tolist()}, {"theta": None}],
                            "add_cross_entropy": True, "plain_loss": "cross-entropy"})
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
    log, generalized = p.log(), (1 - p**0.7) / 0.7
    for function, hard, distilled in (
            (distilled_cross_entropy, -log[1], -(p * log).sum()),
            (generalized_cross_entropy, generalized[1], (p * generalized).sum()),
            (label_smoothing, -(0.05 * log[0] + 0.95 * log[1]),
             -(0.275 * log[0] + 0.725 * log[1]))):
        torch.testing.assert_close(function(logits, label), hard)
        for alpha in (0.5, torch.tensor(0.5)):
            torch.testing.assert_close(function(logits, label, teacher, alpha), distilled)
    three, labels = torch.cat([logits, logits, -logits]), torch.tensor([1, 0, -100])
    torch.testing.assert_close(
        distilled_cross_entropy(three, labels, torch.zeros(3, 2), 0.5, ignore_index=-100),
        distilled_cross_entropy(three[:2], labels[:2], torch.zeros(2, 2), 0.5))


@pytest.mark.parametrize("rows, classes", [(3, 10), (2, 70)])
def test_gradcheck(backend, rows, classes):
    logits, labels, theta, teacher_logits = problem(rows, classes, torch.float64)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(taylorglo_loss, (logits, labels, theta.double()))
    assert torch.autograd.gradcheck(taylorglo_loss, (logits, labels, theta, teacher_logits, 0.3))


def test_gradient_flows_to_the_logits_only(backend):
    logits, *rest = *problem(4, 10), torch.tensor(0.3)
    for tensor in (logits, *rest[1:]):
        tensor.requires_grad_()
    taylorglo_loss(logits, *rest).backward()
    assert logits.grad is not None and all(tensor.grad is None for tensor in rest)
    assert not taylorglo_loss(logits.detach(), *rest).requires_grad
    labels, theta, *_ = rest
    with torch.no_grad():
        assert not taylorglo_loss(logits, labels, theta).requires_grad


def test_on_other_devices_the_loss_is_plain_pytorch(backend):
    meta = [tensor.to("meta") for tensor in problem(4, 10)]
    meta[0].requires_grad_()
    loss = taylorglo_loss(*meta, 0.3)
    loss.backward()
    assert loss.shape == () and meta[0].grad.shape == (4, 10)


def test_backward_twice():
    logits, labels, theta, _ = problem(4, 10)
    logits.requires_grad_()
    loss = taylorglo_loss(logits, labels, theta)
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    expected = first.clone()
    first.zero_()  # the result is the caller's
    for factor, keep in ((3, True), (1, False)):
        (again,) = torch.autograd.grad(factor * loss, logits, retain_graph=keep)
        torch.testing.assert_close(again, factor * expected)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # in PyTorch's forward mode
def test_other_derivatives_are_refused_and_not_wrong():
    logits, labels, theta, _ = problem(4, 10)

    def loss(z):
        return taylorglo_loss(z, labels, theta)

    with pytest.raises(RuntimeError, match="differentiable only once"):
        torch.autograd.grad(loss(z := logits.clone().requires_grad_()), z, create_graph=True)
    with pytest.raises(RuntimeError, match="torch.func.grad are not supported"):
        torch.func.grad(loss)(logits)
    forward_mode = pytest.raises(NotImplementedError, match="no forward-mode derivative")
    with forward_mode:
        torch.func.jvp(loss, (logits,), (logits,))
    with torch.autograd.forward_ad.dual_level(), forward_mode:
        loss(torch.autograd.forward_ad.make_dual(logits, logits))


Z, L, T = torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64), torch.zeros(8)
NUMBER = "alpha: expected a number"


@pytest.mark.parametrize("arguments, error, message", [
    (((Z, Z), L, T), TypeError, "logits: expected a tensor, got tuple"),
    ((Z, [0, 1, 2], T), TypeError, "labels: expected a tensor, got list"),
    ((Z, L, [0.0] * 8), TypeError, "theta: expected a tensor, got list"),
    ((Z, L, T, {"logits": Z}, 0.5), TypeError, "teacher_logits: expected a tensor, got dict"),
    ((Z.long(), L, T), TypeError, "logits: .* got torch.int64"),
    ((Z[0], L, T), ValueError, r"logits: expected shape .* got \(4,\)"),
    ((Z[:, :0], L, T), ValueError, r"logits: .* C >= 1, got \(3, 0\)"),
    ((Z, L.float(), T), TypeError, "labels: expected int64, got torch.float32"),
    ((Z, L.int(), T), TypeError, "labels: expected int64, got torch.int32"),
    ((Z, L[:2], T), ValueError, r"labels: expected shape .* got \(2,\)"),
    ((Z[..., None], L, T), ValueError, r"labels: expected shape .* got \(3,\)"),
    ((Z, Z.long(), T), ValueError, r"labels: expected shape .* got \(3, 4\)"),
    ((Z, L + 4, T), ValueError, r"labels: expected in \[0, 4\), got 4 in row 0"),
    ((Z, L - 1, T), ValueError, r"labels: expected in \[0, 4\), got -1 in row 0"),
    ((Z, L, T.half()), TypeError, "theta: .* got torch.float16"),
    ((Z, L, T.long()), TypeError, "theta: .* got torch.int64"),
    ((Z, L, T[:7]), ValueError, r"theta: expected shape \(8,\), got \(7,\)"),
    ((Z, L, T[None]), ValueError, r"theta: expected shape \(8,\), got \(1, 8\)"),
    ((Z, L, T.to("meta")), ValueError, "theta: expected the device of logits, got meta"),
    ((Z, L, T, Z[:, :3], 0.5), ValueError, "teacher_logits: expected the shape of logits"),
    ((Z, L, T, Z.double(), 0.5), TypeError, "teacher_logits: expected the dtype of logits"),
    ((Z, L, T, Z), ValueError, "alpha: expected one if and only if teacher_logits, got None"),
    ((Z, L, T, None, 0.5), ValueError, "alpha: expected one if and only if teacher_logits"),
    *(((Z, L, T, Z, alpha), ValueError, NUMBER)
      for alpha in (1.5, -0.1, float("nan"), "0.5", T[:1], L[0]))])
def test_bad_input_is_named(backend, arguments, error, message):
    for function in (taylorglo_loss, loss_and_gradient):
        with pytest.raises(error, match=message):
            function(*arguments)


def test_bad_options_are_named(backend):
    with pytest.raises(ValueError, match=r"logits: expected at most 2 dimensions, got \(3, 4, 1\)"):
        loss_and_gradient(Z[..., None], L[:, None], T)
    with pytest.raises(ValueError, match="reduction: expected"):
        taylorglo_loss(Z, L, T, reduction="average")
    with pytest.raises(ValueError, match="labels: expected in .* got -100 in row 2"):
        taylorglo_loss(Z, torch.tensor([0, 1, -100]), T, ignore_index=None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [(None, 1), (-100, 1), (2, 2), (-100, 0)], ids=str)
def test_opcheck(dtype, options):
    for classes, rest in ((10, (None, None)), (70, (torch.tensor(0.3), None)), (3, (None, 0.3))):
        logits, *given = problem(6, classes, dtype, teacher=rest != (None, None))
        given, operators = (*given, *rest, *options), torch.ops.taylorglo
        torch.library.opcheck(operators.loss.default, (logits.clone().requires_grad_(), *given))
        torch.library.opcheck(operators.loss_and_gradient.default, (logits, *given))


def test_batched_gradients_and_batched_losses(backend):
    logits, labels, theta, _ = problem(6, 10)
    weights, x = torch.randn(3, 10, 10), torch.randn(6, 10)

    def of_weights(weights):
        return torch.stack([taylorglo_loss(x @ w, labels, theta) for w in weights])

    jacobian = torch.autograd.functional.jacobian
    torch.testing.assert_close(jacobian(of_weights, weights, vectorize=True),
                               jacobian(of_weights, weights))
    z = logits.clone().requires_grad_()
    rows = taylorglo_loss(z, labels, theta, reduction="none")
    (gradients,) = torch.autograd.grad(rows, z, torch.eye(6), is_grads_batched=True)
    _, gradient = with_gradient(taylorglo_loss, logits, labels, theta)
    torch.testing.assert_close(gradients.sum(0), 6 * gradient)
    stacked = torch.stack([logits, -logits])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the fused operator is called once for each
        batched = torch.vmap(lambda z: taylorglo_loss(z, labels, theta))(stacked)
    expected = torch.stack([taylorglo_loss(z, labels, theta) for z in stacked])
    torch.testing.assert_close(batched, expected)


def test_exports_and_compiles_without_a_graph_break(backend):
    logits, labels, theta, teacher_logits = problem(6, 10)
    program = torch.export.export(TaylorGLOLoss(theta, reduction="none"), (logits, labels))
    expected = taylorglo_loss(-logits, labels, theta, reduction="none")
    torch.testing.assert_close(program.module()(-logits, labels), expected)
    torch._dynamo.reset()

    def step(logits, alpha):
        return 2 * taylorglo_loss(torch.relu(logits), labels, theta, teacher_logits, alpha)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for alpha in (torch.tensor(0.3), torch.tensor(0.4), 0.3):
        torch.testing.assert_close(with_gradient(compiled, logits, alpha),
                                   with_gradient(step, logits, alpha))


def test_the_first_loss_of_a_process_may_be_compiled():
    code = (
        "import sys, torch; from taylorglo_ext import taylorglo_loss;"
        "assert 'torch._dynamo' not in sys.modules;"
        "loss = torch.compile(taylorglo_loss, fullgraph=True, backend='aot_eager');"
        "loss(torch.randn(6, 10, requires_grad=True), torch.arange(6), torch.randn(8)).backward()")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
