"""Triton kernels of dino_loss, where the formulas are.

1. Teacher: a sweep by columns, for the rows' statistics and the mean row.
2. Targets: each image's probabilities q_0, q_1 and q_0 + q_1, once for all of its student rows.
3. Student: a program a row, for its loss and gradient.

A repeated call is bitwise equal. Rows of another stride may differ in a sum's last bits: how many adjacent elements a
thread loads at once, and so the order of its sums, depends on whether rows begin at multiples of 16 elements.
"""

import torch
import triton
import triton.language as tl

from dino_kernels.triton.common import LOG2_E, LOWEST, argument, scalar, warp_size

__all__ = ["forward_triton", "scale_triton"]

_LIFT = tl.constexpr(16384.0)  # keeps float16 targets down to 2^-28 normal, and their greatest, 2, below 65504
_SCALE_PROGRAMS = 528


@triton.jit
def _teacher_kernel(
    teacher, center, temp, partials, batch_center, arrived, batch, outputs, stride, center_stride,
    IMAGES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Mean of a block of columns, and of each row over them (max, sum of exp((x - max) / temp)), x = row - center.

    partials [rows, 2, programs]. Also sets the counter of the next kernel to zero.
    """
    block, blocks = tl.program_id(0), tl.num_programs(0)
    k = block * COLUMNS + tl.arange(0, COLUMNS)
    scale = LOG2_E / scalar(temp)
    first = tl.load(center + k, k < outputs, other=0.0)
    second = tl.load(center + center_stride + k, k < outputs, other=0.0)
    mean = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, batch, IMAGES):
        image = start + tl.arange(0, IMAGES)
        mask = (image < batch)[:, None] & (k < outputs)[None, :]
        both = tl.zeros((IMAGES, COLUMNS), tl.float32)
        for view in tl.static_range(2):
            r = view * batch + image
            t = tl.load(teacher + r[:, None].to(tl.int64) * stride + k[None, :], mask, other=0.0).to(tl.float32)
            both += t
            x = tl.where(mask, t - (second if view else first)[None, :], float("-inf"))
            high = tl.maximum(tl.max(x, axis=1), LOWEST)
            at = partials + r.to(tl.int64) * 2 * blocks + block
            tl.store(at, high, image < batch)
            tl.store(at + blocks, tl.sum(tl.exp2((x - high[:, None]) * scale), axis=1), image < batch)
        mean += tl.sum(both, axis=0)
    tl.store(batch_center + k, mean / (2 * batch), k < outputs)
    if block == 0:
        tl.store(arrived, 0)


@triton.jit
def _row_statistics(partials, row, scale, blocks, BLOCKS: tl.constexpr):
    """(max, 1 / sum) of a teacher row from its partial ones."""
    i = tl.arange(0, BLOCKS)
    at = partials + row.to(tl.int64) * 2 * blocks + i
    high = tl.load(at, i < blocks, other=LOWEST)
    top = tl.max(high, axis=0)
    return top, 1.0 / tl.sum(tl.load(at + blocks, i < blocks, other=0.0) * tl.exp2((high - top) * scale), axis=0)


@triton.jit
def _target_kernel(
    teacher, center, temp, partials, targets, batch, outputs, teacher_stride, center_stride, target_stride, blocks,
    BLOCKS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """_LIFT times q_0, q_1 and q_0 + q_1 of a block of columns of an image: targets [3, batch, target_stride]."""
    image = tl.program_id(1)
    k = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    mask = k < outputs
    scale = LOG2_E / scalar(temp)
    at = targets + image.to(tl.int64) * target_stride + k
    step = tl.cast(batch, tl.int64) * target_stride
    both = tl.zeros((COLUMNS,), tl.float32)
    for view in tl.static_range(2):
        row = view * batch + image
        top, weight = _row_statistics(partials, row, scale, blocks, BLOCKS)
        c = tl.load(center + view * center_stride + k, mask, other=0.0)
        t = tl.load(teacher + row.to(tl.int64) * teacher_stride + k, mask, other=0.0).to(tl.float32)
        q = tl.exp2((t - c - top) * scale) * (weight * _LIFT)
        tl.store(at + view * step, q.to(targets.dtype.element_ty), mask)
        both += q
    tl.store(at + 2 * step, both.to(targets.dtype.element_ty), mask)


@triton.jit
def row_exponentials(row, center, outputs, log2_scale, STEP: tl.constexpr, LANES: tl.constexpr):
    """(top, sum of 2^(x log2_scale - top)) of x = row - center, or of x = row; top is the greatest exponent."""
    # Exponents, and the maxima in their unit, come out of one fma: x * scale alone would already have lost digits.
    tile = tl.arange(0, STEP)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    high = tl.full((LANES,), LOWEST, tl.float32)
    total = tl.zeros((LANES,), tl.float32)
    for start in range(0, outputs, STEP * LANES):
        k = start + tile
        x = tl.load(row + k, k < outputs, other=float("-inf")).to(tl.float32)
        if center is not None:
            x -= tl.load(center + k, k < outputs, other=0.0)
        higher = tl.maximum(high, tl.max(x, axis=0) * log2_scale)
        total *= tl.exp2(high - higher)
        total += tl.sum(tl.exp2(tl.fma(x, log2_scale, -higher[None, :])), axis=0)
        high = higher
    top = tl.max(high, axis=0)
    return top, tl.sum(total * tl.exp2(high - top), axis=0)


@triton.jit
def add_losses(row_loss, losses, loss, arrived, row, rows):
    """Of a program a row: the one that arrives last adds their losses up, in the order of the rows."""
    tl.store(losses + row, row_loss)
    tl.debug_barrier()
    if tl.atomic_add(arrived, 1, sem="acq_rel") == rows - 1:
        sums = tl.zeros((1024,), tl.float32)
        for start in range(0, rows, 1024):
            r = start + tl.arange(0, 1024)
            sums += tl.load(losses + r, r < rows, other=0.0, volatile=True)
        tl.store(loss, tl.sum(sums, axis=0))


@triton.jit
def _student_kernel(
    student, targets, student_temp, grad, losses, loss, arrived,
    batch, outputs, student_stride, target_stride, grad_stride, norm,
    STEP: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Loss and gradient of one student row a program: log-sum-exp in one sweep, the gradient in a second.

    Rows are taken from the last to the first, and each from its end in the second sweep: what was written or read
    last is still in a cache.
    """
    rows = tl.num_programs(0)
    row = rows - 1 - tl.program_id(0)
    view, image = row // batch, row % batch
    first = tl.where(view < 2, 1 - view, 2) * batch + image  # view 0 learns from 1, view 1 from 0, others from both
    pairs = tl.where(view < 2, 1.0, 2.0)
    scale = 1.0 / scalar(student_temp)
    log2_scale = scale * LOG2_E
    student += row.to(tl.int64) * student_stride
    grad += row.to(tl.int64) * grad_stride
    targets += first.to(tl.int64) * target_stride
    top, total_exp = row_exponentials(student, None, outputs, log2_scale, STEP, LANES)
    weight = pairs / total_exp * (scale * norm)
    target_weight = scale * norm / _LIFT
    dot = tl.zeros((LANES,), tl.float32)
    last = (outputs - 1) // LANES
    for i in range(0, last + 1):
        k = (last - i) * LANES + tl.arange(0, LANES)
        mask = k < outputs
        q = tl.load(targets + k, mask, other=0.0).to(tl.float32)
        s = tl.load(student + k, mask, other=0.0).to(tl.float32)
        dot = tl.fma(q, s, dot)
        g = tl.fma(tl.exp2(tl.fma(s, log2_scale, -top)), weight, -target_weight * q)
        tl.store(grad + k, g.to(grad.dtype.element_ty), mask)
    row_loss = pairs * ((top + tl.log2(total_exp)) / LOG2_E) - tl.sum(dot, axis=0) * (scale / _LIFT)
    add_losses(row_loss * norm, losses, loss, arrived, row, rows)


@triton.jit
def _scale_kernel(grad, upstream, rows, columns, stride, BLOCK: tl.constexpr):
    """grad *= upstream by a few programs, which for the usual upstream of one end at once."""
    factor = tl.load(upstream)
    if factor != 1.0:
        across = tl.cdiv(columns, BLOCK)
        for block in range(tl.program_id(0), rows * across, tl.num_programs(0)):
            k = block % across * BLOCK + tl.arange(0, BLOCK)
            at = grad + (block // across).to(tl.int64) * stride + k
            g = tl.load(at, k < columns, other=0.0).to(tl.float32)
            tl.store(at, (g * factor).to(grad.dtype.element_ty), k < columns)


def row_launch(outputs):
    """The blocks of a program that owns a row.

    Each lane is one thread's: threads that share an element would race in place, reading it after another of them wrote
    its gradient. At K = 65536 a multiprocessor holds one program: all rows in flight stay in the L2 cache.
    """
    lanes = max(512, min(8192, triton.next_power_of_2(triton.cdiv(outputs, 4))))
    return {"STEP": 4, "LANES": lanes, "num_warps": lanes // (8 * warp_size())}


def forward_triton(student, teacher, center, student_temp, teacher_temp, grad):
    (rows, outputs), batch = student.shape, teacher.shape[0] // 2
    temps = argument(student_temp), argument(teacher_temp)
    blocks = triton.cdiv(outputs, 256)
    partials = center.new_empty(2 * batch, 2, blocks)
    # Of a float32 gradient float32 targets; in 16 bit 2^-12 relative is less than the gradient's own rounding.
    stored = torch.float32 if student.dtype == torch.float32 else torch.float16
    targets = student.new_empty(3, batch, triton.cdiv(outputs, 16) * 16, dtype=stored)
    losses, loss = center.new_empty(rows), center.new_empty(())
    arrived = center.new_empty((), dtype=torch.int32)
    batch_center = center.new_empty(outputs)
    _teacher_kernel[(blocks,)](
        teacher, center, temps[1], partials, batch_center, arrived, batch, outputs, teacher.stride(0), center.stride(0),
        IMAGES=16, COLUMNS=256, num_warps=8,
    )  # fmt: skip
    # Without fusion a sum of products is the same in all lanes that hold it.
    _target_kernel[(triton.cdiv(outputs, 8192), batch)](
        teacher, center, temps[1], partials, targets, batch, outputs, teacher.stride(0), center.stride(0),
        targets.stride(1), blocks,
        BLOCKS=triton.next_power_of_2(blocks), COLUMNS=8192, num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip
    _student_kernel[(rows,)](
        student, targets, temps[0], grad, losses, loss, arrived,
        batch, outputs, student.stride(0), targets.stride(1), grad.stride(0), 1 / ((2 * rows // batch - 2) * batch),
        **row_launch(outputs),
    )  # fmt: skip
    return loss, batch_center


def scale_triton(grad, upstream):
    rows, columns = grad.shape
    programs = min(rows * triton.cdiv(columns, 4096), _SCALE_PROGRAMS)
    _scale_kernel[(programs,)](grad, upstream, rows, columns, grad.stride(0), BLOCK=4096)
