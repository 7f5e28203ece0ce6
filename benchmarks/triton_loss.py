"""The loss of Eq. 2 and Eq. 3 and its gradient as a plain Triton kernel, for comparison with the
CUDA kernel on a GPU.

A program has some whole rows in registers and evaluates Eq. 2 as it is printed. It adds its rows to
the loss atomically, so the loss's last bits vary. Triton tunes the rows and warps of a program for
each problem before it is timed.
"""

import torch
import triton
import triton.language as tl

CONFIGS = [triton.Config({"ROWS": rows}, num_warps=warps)
           for rows in (1, 2, 4, 8, 16, 32) for warps in (1, 2, 4, 8)]


def fitting(configs, arguments, **_):
    """The configurations with 2 to 64 numbers in a thread, or the nearest to that."""

    def in_a_thread(config):
        columns = triton.next_power_of_2(arguments["classes"])
        return config.kwargs["ROWS"] * columns / (32 * config.num_warps)

    return [c for c in configs if 2 <= in_a_thread(c) <= 64] or [min(configs, key=in_a_thread)]


@triton.autotune(CONFIGS, key=["rows", "classes", "DISTILLED"], reset_to_zero=["loss"],
                 prune_configs_by={"early_config_prune": fitting})
@triton.jit
def kernel(logits, labels, theta, teacher, alpha, gradient, loss, rows, classes,
           DISTILLED: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    t0, t1, t2, t3 = tl.load(theta), tl.load(theta + 1), tl.load(theta + 2), tl.load(theta + 3)
    t4, t5, t6, t7 = tl.load(theta + 4), tl.load(theta + 5), tl.load(theta + 6), tl.load(theta + 7)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)[None, :]
    there = (row < rows)[:, None] & (column < classes)
    place = row.to(tl.int64)[:, None] * classes + column
    z = tl.load(logits + place, mask=there, other=-float("inf")).to(tl.float32)
    x = tl.where(column == tl.load(labels + row, mask=row < rows, other=0)[:, None], 1.0, 0.0)
    if DISTILLED:  # Eq. 3
        a = tl.load(alpha)
        z_teacher = tl.load(teacher + place, mask=there, other=-float("inf")).to(tl.float32)
        h = tl.exp(z_teacher - tl.max(z_teacher, 1)[:, None])
        x = h * (a / tl.sum(h, 1))[:, None] + (1 - a) * x
    e = tl.exp(z - tl.max(z, 1)[:, None])
    y = e * (1 / tl.sum(e, 1))[:, None]
    a, b = y - t1, x - t0
    p, q = t2 + b * (t5 + b * t7 * 0.5), t3 + b * t6
    f = a * (p + a * (q * 0.5 + a * (t4 * (1 / 6))))  # Eq. 2
    df = p + a * (q + a * (t4 * 0.5))
    scale = -1.0 / (rows * classes.to(tl.float32))
    slope = scale * y * (df - tl.sum(df * y, 1)[:, None])
    tl.store(gradient + place, slope.to(gradient.dtype.element_ty), mask=there)
    tl.atomic_add(loss, scale * tl.sum(tl.where(there, f, 0.0)))


def triton_loss(logits, labels, theta, teacher_logits=None, alpha=None):
    """As ``taylorglo_ext.loss_and_gradient``, for contiguous float32 or bfloat16 logits (B, C) on a
    GPU."""
    rows, classes = logits.shape
    loss, gradient = torch.zeros((), device=logits.device), torch.empty_like(logits)
    distilled = teacher_logits is not None
    rest = (teacher_logits, alpha) if distilled else (logits, theta)  # which are not read then
    kernel[lambda meta: (triton.cdiv(rows, meta["ROWS"]),)](
        logits, labels, theta, *rest, gradient, loss, rows, classes,
        DISTILLED=distilled, COLUMNS=triton.next_power_of_2(classes),
    )  # fmt: skip
    return loss, gradient
