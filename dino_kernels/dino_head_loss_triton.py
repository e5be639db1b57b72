"""Triton kernels of dino_head_loss, where the formulas are.

1. Averages: each tile of rows walks a share of the outputs as flash attention does, W being keys and values.
2. Rows: merges a row's shares into statistics, loss and dL/dz, and weighs the row for
3. Weights: each block of outputs computes its logits once more, for all rows, and from them dL/dW.
"""

import torch
import triton
import triton.language as tl

from dino_kernels._triton import LOG2_E, LOWEST, argument, operand, scalar, shared_memory

__all__ = ["forward_triton"]

_SPLITS = 9  # shares of the outputs: at 768 rows of 256 channels in 16 bit all that is kept stays under 4 MB
_LIFT = tl.constexpr(1024.0)  # keeps row weights of 1 / K out of float16's subnormal numbers


@triton.jit
def _tile(x, rows, d, count, D, WIDEN: tl.constexpr):
    """Rows of a matrix [count, D] as an operand."""
    mask = (rows < count)[:, None] & (d < D)[None, :]
    return operand(tl.load(x + rows[:, None].to(tl.int64) * D + d[None, :], mask, other=0.0), WIDEN)


@triton.jit
def _average_kernel(
    z, weight, values, center, temp, averages, stats, rows, first_row, all_rows, outputs, D, share,
    TEACHER: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Of a tile of rows and `share` outputs: their softmax average of values' rows, and (max, sum of exponentials)."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    scale = LOG2_E / scalar(temp)
    q = _tile(z, r, d, rows, D, WIDEN)
    high = tl.full((ROWS,), LOWEST, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    average = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for start in range(split * share, tl.minimum((split + 1) * share, outputs), BLOCK):
        k = start + tl.arange(0, BLOCK)
        w = _tile(weight, k, d, outputs, D, WIDEN)
        x = tl.dot(q, tl.trans(w), input_precision=PRECISION)
        if TEACHER:
            x -= tl.load(center + k, k < outputs, other=0.0)[None, :]
            w = _tile(values, k, d, outputs, D, WIDEN)
        x = tl.where((k < outputs)[None, :], x, float("-inf"))
        higher = tl.maximum(high, tl.max(x, axis=1))
        p = tl.exp2((x - higher[:, None]) * scale)
        shrink = tl.exp2((high - higher) * scale)
        total = total * shrink + tl.sum(p, axis=1)
        average = average * shrink[:, None] + tl.dot(p.to(w.dtype), w, input_precision=PRECISION)
        high = higher
    at = split.to(tl.int64) * all_rows + first_row + r
    average = (average / total[:, None]).to(averages.dtype.element_ty)
    tl.store(averages + at[:, None] * D + d[None, :], average, (r < rows)[:, None] & (d < D)[None, :])
    tl.store(stats + 2 * at, high, r < rows)
    tl.store(stats + 2 * at + 1, total, r < rows)


@triton.jit
def _merge(averages, stats, row, all_rows, d, D, scale, splits, SPLITS: tl.constexpr):
    """(average, max, sum of exponentials) of a row over all outputs."""
    i = tl.arange(0, SPLITS)
    at = i.to(tl.int64) * all_rows + row
    high = tl.load(stats + 2 * at, i < splits, other=LOWEST)
    top = tl.max(high, axis=0)
    part = tl.load(stats + 2 * at + 1, i < splits, other=0.0) * tl.exp2((high - top) * scale)
    total = tl.sum(part, axis=0)
    mask = (i < splits)[:, None] & (d < D)[None, :]
    average = tl.load(averages + at[:, None] * D + d[None, :], mask, other=0.0).to(tl.float32)
    return tl.sum(average * part[:, None], axis=0) / total, top, total


@triton.jit
def _row_kernel(
    z, averages, stats, student_temp, teacher_temp, grad_z, losses, tops, weighted,
    batch, views, D, splits, norm, SPLITS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One row a program, the students' first: loss, dL/dz, its maximum, and the row as dL/dW multiplies it."""
    row = tl.program_id(0)
    all_rows = tl.num_programs(0)
    students = views * batch
    d = tl.arange(0, BLOCK_D)
    image = row % batch
    scale = 1.0 / scalar(student_temp)
    teacher_scale = LOG2_E / scalar(teacher_temp)
    at = row.to(tl.int64) * D + d
    if row < students:
        view = row // batch
        both = view >= 2
        first = students + tl.where(view == 0, batch + image, image)  # view 0 learns from 1, view 1 from 0
        pairs = tl.where(both, 2.0, 1.0)
        average, top, total = _merge(averages, stats, row, all_rows, d, D, scale * LOG2_E, splits, SPLITS)
        target = _merge(averages, stats, first, all_rows, d, D, teacher_scale, splits, SPLITS)[0]
        if both:
            target += _merge(averages, stats, students + batch + image, all_rows, d, D, teacher_scale, splits, SPLITS)[
                0
            ]
        x = tl.load(z + at, d < D, other=0.0).to(tl.float32)
        loss = pairs * (top * scale + tl.log(total)) - tl.sum(x * target, axis=0) * scale
        tl.store(losses + row, loss * norm)
        tl.store(grad_z + at, ((pairs * average - target) * (scale * norm)).to(grad_z.dtype.element_ty), d < D)
        x *= _LIFT * pairs / total
    else:
        average, top, total = _merge(averages, stats, row, all_rows, d, D, teacher_scale, splits, SPLITS)
        x = tl.zeros((BLOCK_D,), tl.float32)
        for v in range(0, views):
            if v != (row - students) // batch:
                x += tl.load(z + (v * batch + image).to(tl.int64) * D + d, d < D, other=0.0).to(tl.float32)
        x *= -_LIFT / total
    tl.store(weighted + at, x.to(weighted.dtype.element_ty), d < D)
    tl.store(tops + row, top)


@triton.jit
def _add_outer(
    acc, w, c, z, tops, weighted, d, rows, D, scale,
    ROWS: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """acc [outputs, D] + exponentials [outputs, rows] weighted [rows, D]"""
    for start in range(0, rows, ROWS):
        r = start + tl.arange(0, ROWS)
        x = tl.dot(w, tl.trans(_tile(z, r, d, rows, D, WIDEN)), input_precision=PRECISION) - c[:, None]
        e = tl.exp2((x - tl.load(tops + r, r < rows, other=0.0)[None, :]) * scale)
        e = tl.where((r < rows)[None, :], e, 0.0)
        y = _tile(weighted, r, d, rows, D, WIDEN)
        acc += tl.dot(e.to(y.dtype), y, input_precision=PRECISION)
    return acc


@triton.jit
def _weight_kernel(
    student_z, teacher_z, student_weight, teacher_weight, center, student_temp, teacher_temp, tops, weighted, grad,
    students, teachers, outputs, D, norm,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """dL/dW of a block of outputs."""
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_D)
    scale = 1.0 / scalar(student_temp)
    acc = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    w = _tile(student_weight, k, d, outputs, D, WIDEN)
    c = tl.zeros((BLOCK,), tl.float32)
    acc = _add_outer(
        acc, w, c, student_z, tops, weighted, d, students, D, scale * LOG2_E, ROWS, PRECISION, WIDEN
    )  # fmt: skip
    w = _tile(teacher_weight, k, d, outputs, D, WIDEN)
    c = tl.load(center + k, k < outputs, other=0.0)
    acc = _add_outer(
        acc, w, c, teacher_z, tops + students, weighted + students.to(tl.int64) * D, d, teachers, D,
        LOG2_E / scalar(teacher_temp), ROWS, PRECISION, WIDEN,
    )  # fmt: skip
    at = grad + k[:, None].to(tl.int64) * D + d[None, :]
    mask = (k < outputs)[:, None] & (d < D)[None, :]
    tl.store(at, (acc * (scale * norm / _LIFT)).to(grad.dtype.element_ty), mask)


@triton.jit
def _center_kernel(z, weight, center, rows, outputs, D, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """center = weight mean(z)"""
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_D)
    mean = tl.zeros((BLOCK_D,), tl.float32)
    for row in range(0, rows):
        mean += tl.load(z + tl.cast(row, tl.int64) * D + d, d < D, other=0.0).to(tl.float32)
    w = _tile(weight, k, d, outputs, D, True)
    tl.store(center + k, tl.sum(w * (mean / rows)[None, :], axis=1), k < outputs)


def forward_triton(
    student_z, teacher_z, weight_student, weight_teacher, center, student_temp, teacher_temp, weight_grad
):
    center = center.contiguous()
    (outputs, channels), students, teachers = weight_student.shape, len(student_z), len(teacher_z)
    batch, rows = teachers // 2, students + teachers
    temps = argument(student_temp), argument(teacher_temp)
    wide = student_z.dtype == torch.float32
    block_d = max(16, triton.next_power_of_2(channels))
    common = {
        "BLOCK_D": block_d,
        "PRECISION": "ieee" if wide else "tf32",
        "WIDEN": triton.knobs.runtime.interpret,
    }
    # Chosen so that nothing spills; the wider ones need Hopper's shared memory and matrix instruction.
    wgmma = shared_memory() > 200 << 10
    share = triton.cdiv(triton.cdiv(outputs, 64), _SPLITS) * 64
    splits = triton.cdiv(outputs, share)
    averages = student_z.new_empty(splits, rows, channels, dtype=torch.float32 if wide else torch.float16)
    stats = center.new_empty(splits, rows, 2)
    for z, weight, temp, first in (
        (student_z, weight_student, temps[0], 0),
        (teacher_z, weight_teacher, temps[1], students),
    ):
        _average_kernel[(triton.cdiv(len(z), 64), splits)](
            z, weight, weight_student, center, temp, averages, stats, len(z), first, rows, outputs, channels, share,
            TEACHER=first > 0, ROWS=64, BLOCK=64 if wgmma and not first else 32, **common,
            num_warps=4 if wgmma else 8, num_stages=2,
        )  # fmt: skip
    losses, tops = center.new_empty(students), center.new_empty(rows)
    grad_z, weighted = torch.empty_like(student_z), student_z.new_empty(rows, channels)
    norm = 1 / ((2 * students // batch - 2) * batch)
    _row_kernel[(rows,)](
        student_z, averages, stats, *temps, grad_z, losses, tops, weighted,
        batch, students // batch, channels, splits, norm,
        SPLITS=triton.next_power_of_2(splits), BLOCK_D=block_d, num_warps=4,
    )  # fmt: skip
    grad_weight = weight_student.new_empty(outputs if weight_grad else 0, channels)
    if weight_grad:
        block = 128 if wgmma else 64
        _weight_kernel[(triton.cdiv(outputs, block),)](
            student_z, teacher_z, weight_student, weight_teacher, center, *temps, tops, weighted, grad_weight,
            students, teachers, outputs, channels, norm, ROWS=32, BLOCK=block, **common, num_warps=8, num_stages=2,
        )  # fmt: skip
    batch_center = torch.empty_like(center)
    _center_kernel[(triton.cdiv(outputs, 64),)](
        teacher_z, weight_teacher, batch_center, teachers, outputs, channels, BLOCK=64, BLOCK_D=block_d, num_warps=8
    )
    return losses.sum(), batch_center, grad_z, grad_weight
