"""Triton kernels of dino_loss, where the formulas are: a column sweep of the teacher, then a program a student row."""

import torch
import triton
import triton.language as tl

from dino_kernels._triton import LOG2_E, LOWEST, argument, scalar

__all__ = ["forward_triton", "scale_triton"]


@triton.jit
def _teacher_kernel(
    teacher, center, temp, partials, batch_center, arrived, rows, outputs, stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Mean of a block of columns, and of each row over them (max, sum of exp((x - max) / temp)), x = row - center.

    partials [rows, 2, programs]. Also sets the counter of the next kernel to zero.
    """
    block, blocks = tl.program_id(0), tl.num_programs(0)
    k = block * COLUMNS + tl.arange(0, COLUMNS)
    scale = LOG2_E / scalar(temp)
    c = tl.load(center + k, k < outputs, other=0.0)
    mean = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, rows, ROWS):
        r = start + tl.arange(0, ROWS)
        mask = (r < rows)[:, None] & (k < outputs)[None, :]
        t = tl.load(teacher + r[:, None].to(tl.int64) * stride + k[None, :], mask, other=0.0).to(tl.float32)
        mean += tl.sum(t, axis=0)
        x = tl.where(mask, t - c[None, :], float("-inf"))
        high = tl.maximum(tl.max(x, axis=1), LOWEST)
        at = partials + r.to(tl.int64) * 2 * blocks + block
        tl.store(at, high, r < rows)
        tl.store(at + blocks, tl.sum(tl.exp2((x - high[:, None]) * scale), axis=1), r < rows)
    tl.store(batch_center + k, mean / rows, k < outputs)
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
def _student_kernel(
    student, teacher, center, student_temp, teacher_temp, partials, grad, losses, loss, arrived,
    batch, outputs, student_stride, teacher_stride, grad_stride, blocks, norm,
    BLOCKS: tl.constexpr, STEP: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Loss and gradient of one student row a program: log-sum-exp in one sweep, targets and gradient in a second.

    Rows are taken from the last to the first, and each from its end in the second sweep: what was written or read
    last is still in a cache.
    """
    rows = tl.num_programs(0)
    row = rows - 1 - tl.program_id(0)
    view, image = row // batch, row % batch
    both = view >= 2
    first = tl.where(view == 0, batch + image, image)  # view 0 learns from 1, view 1 from 0, others from both
    pairs = tl.where(both, 2.0, 1.0)
    scale = 1.0 / scalar(student_temp)
    log2_scale = scale * LOG2_E
    teacher_scale = LOG2_E / scalar(teacher_temp)
    student += row.to(tl.int64) * student_stride
    grad += row.to(tl.int64) * grad_stride
    first_teacher = teacher + first.to(tl.int64) * teacher_stride
    second_teacher = teacher + (batch + image).to(tl.int64) * teacher_stride
    # Differences are taken before the temperature: exact, where x / temp would already have lost digits.
    tile = tl.arange(0, STEP)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    high = tl.full((LANES,), LOWEST, tl.float32)
    total = tl.zeros((LANES,), tl.float32)
    for start in range(0, outputs, STEP * LANES):
        k = start + tile
        x = tl.load(student + k, k < outputs, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(high, tl.max(x, axis=0))
        total *= tl.exp2((high - higher) * log2_scale)
        total += tl.sum(tl.exp2((x - higher[None, :]) * log2_scale), axis=0)
        high = higher
    top = tl.max(high, axis=0)
    total_exp = tl.sum(total * tl.exp2((high - top) * log2_scale), axis=0)
    weight = pairs / total_exp
    first_top, first_weight = _row_statistics(partials, first, teacher_scale, blocks, BLOCKS)
    second_top, second_weight = _row_statistics(partials, batch + image, teacher_scale, blocks, BLOCKS)
    dot = tl.zeros((LANES,), tl.float32)
    last = (outputs - 1) // LANES
    for i in range(0, last + 1):
        k = (last - i) * LANES + tl.arange(0, LANES)
        mask = k < outputs
        c = tl.load(center + k, mask, other=0.0)
        t = tl.load(first_teacher + k, mask, other=0.0).to(tl.float32)
        q = tl.exp2((t - c - first_top) * teacher_scale) * first_weight
        if both:
            t = tl.load(second_teacher + k, mask, other=0.0).to(tl.float32)
            q += tl.exp2((t - c - second_top) * teacher_scale) * second_weight
        s = tl.load(student + k, mask, other=0.0).to(tl.float32)
        dot += tl.where(mask, q * s, 0.0)
        g = (tl.exp2((s - top) * log2_scale) * weight - q) * (scale * norm)
        tl.store(grad + k, g.to(grad.dtype.element_ty), mask)
    row_loss = pairs * (top * scale + tl.log(total_exp)) - tl.sum(dot, axis=0) * scale
    tl.store(losses + row, row_loss * norm)
    tl.debug_barrier()
    # The count tells which program is the last; that one adds the losses up, in the order of the rows.
    if tl.atomic_add(arrived, 1, sem="acq_rel") == rows - 1:
        sums = tl.zeros((1024,), tl.float32)
        for start in range(0, rows, 1024):
            r = start + tl.arange(0, 1024)
            sums += tl.load(losses + r, r < rows, other=0.0, volatile=True)
        tl.store(loss, tl.sum(sums, axis=0))


@triton.jit
def _scale_kernel(grad, upstream, columns, stride, BLOCK: tl.constexpr):
    factor = tl.load(upstream)
    if factor != 1.0:
        k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        at = grad + tl.program_id(0).to(tl.int64) * stride + k
        g = tl.load(at, k < columns, other=0.0).to(tl.float32)
        tl.store(at, (g * factor).to(grad.dtype.element_ty), k < columns)


def forward_triton(student, teacher, center, student_temp, teacher_temp, grad):
    center = center.contiguous()
    (rows, outputs), batch = student.shape, teacher.shape[0] // 2
    temps = argument(student_temp), argument(teacher_temp)
    blocks = triton.cdiv(outputs, 256)
    # At least one lane a thread (512 on AMD): threads that share an element would race in place, reading it after
    # another of them wrote its gradient.
    lanes = max(512, min(2048, triton.next_power_of_2(outputs)))
    partials = center.new_empty(2 * batch, 2, blocks)
    losses, loss = center.new_empty(rows), center.new_empty(())
    arrived = center.new_empty((), dtype=torch.int32)
    batch_center = torch.empty_like(center)
    _teacher_kernel[(blocks,)](
        teacher, center, temps[1], partials, batch_center, arrived, 2 * batch, outputs, teacher.stride(0),
        ROWS=32, COLUMNS=256, num_warps=8,
    )  # fmt: skip
    _student_kernel[(rows,)](
        student, teacher, center, *temps, partials, grad, losses, loss, arrived,
        batch, outputs, student.stride(0), teacher.stride(0), grad.stride(0), blocks,
        1 / ((2 * rows // batch - 2) * batch),
        BLOCKS=triton.next_power_of_2(blocks), STEP=4, LANES=lanes, num_warps=8,
    )  # fmt: skip
    return loss, batch_center


def scale_triton(grad, upstream):
    rows, columns = grad.shape
    grid = (rows, triton.cdiv(columns, 4096))
    _scale_kernel[grid](grad, upstream, columns, grad.stride(0), BLOCK=4096)
