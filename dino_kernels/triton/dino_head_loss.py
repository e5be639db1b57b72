"""Triton kernels of dino_head_loss, where the formulas are.

1. Averages: each tile of rows, of teacher or student, walks a share of the outputs as flash attention does, W being
   keys and values.
2. Rows: merges a row's shares into statistics, loss and dL/dz, and weighs the row for
3. Weights: each block of outputs computes its logits once more, for all rows, and from them dL/dW.
"""

import torch
import triton
import triton.language as tl

from dino_kernels.triton.common import LOG2_E, argument, scalar, shared_memory
from dino_kernels.triton.softmax_average import average, merge, shares, tile

__all__ = ["forward_triton"]

_SPLITS = 32  # shares of the outputs at most, which a row's program merges at once
_LIFT = tl.constexpr(1024.0)  # keeps row weights of 1 / K out of float16's subnormal numbers


@triton.jit
def _average_kernel(
    student_z, teacher_z, student_weight, teacher_weight, center, student_temp, teacher_temp, averages, stats,
    students, teachers, outputs, share, teacher_share, splits, teacher_splits,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, TEACHER_BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Averages of the teacher's tiles and shares, then of the student's."""
    i = tl.program_id(0)
    first = tl.cdiv(teachers, ROWS) * teacher_splits
    if i < first:
        rows = splits * students.to(tl.int64)
        average(
            teacher_z, teacher_weight, student_weight, center, teacher_temp, averages + rows * D, stats + 2 * rows,
            teachers, i // teacher_splits, i % teacher_splits, outputs, teacher_share,
            D, True, ROWS, TEACHER_BLOCK, BLOCK_D, PRECISION, WIDEN,
        )  # fmt: skip
    else:
        i -= first
        average(
            student_z, student_weight, student_weight, center, student_temp, averages, stats,
            students, i // splits, i % splits, outputs, share,
            D, False, ROWS, BLOCK, BLOCK_D, PRECISION, WIDEN,
        )  # fmt: skip


@triton.jit
def _row_kernel(
    z, averages, stats, student_temp, grad_z, losses, tops, weighted,
    batch, views, D, splits, teacher_splits, norm,
    VIEWS: tl.constexpr, SPLITS: tl.constexpr, TEACHER_SPLITS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One row a program, the students' first: loss, dL/dz, its maximum, and the row as dL/dW multiplies it."""
    row = tl.program_id(0)
    students = views * batch
    teacher_averages = averages + splits * students.to(tl.int64) * D
    teacher_stats = stats + 2 * splits * students.to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    image = row % batch
    at = row.to(tl.int64) * D + d
    if row < students:
        view = row // batch
        both = view >= 2
        pairs = tl.where(both, 2.0, 1.0)
        scale = 1.0 / scalar(student_temp)
        average, top, total = merge(averages, stats, row, students, d, D, splits, SPLITS)
        first = tl.where(view == 0, batch + image, image)  # view 0 learns from 1, view 1 from 0, others from both
        target = merge(teacher_averages, teacher_stats, first, 2 * batch, d, D, teacher_splits, TEACHER_SPLITS)[0]
        if both:
            target += merge(
                teacher_averages, teacher_stats, batch + image, 2 * batch, d, D, teacher_splits, TEACHER_SPLITS
            )[0]
        x = tl.load(z + at, d < D, other=0.0).to(tl.float32)
        loss = pairs * ((top + tl.log2(total)) / LOG2_E) - tl.sum(x * target, axis=0) * scale
        tl.store(losses + row, loss * norm)
        tl.store(grad_z + at, ((pairs * average - target) * (scale * norm)).to(grad_z.dtype.element_ty), d < D)
        x *= _LIFT * pairs / total
    else:
        teacher = row - students
        average, top, total = merge(
            teacher_averages, teacher_stats, teacher, 2 * batch, d, D, teacher_splits, TEACHER_SPLITS
        )
        v = tl.arange(0, VIEWS)
        mask = ((v < views) & (v != teacher // batch))[:, None] & (d < D)[None, :]
        others = tl.load(z + (v * batch + image).to(tl.int64)[:, None] * D + d[None, :], mask, other=0.0)
        x = tl.sum(others.to(tl.float32), axis=0) * (-_LIFT / total)
    tl.store(weighted + at, x.to(weighted.dtype.element_ty), d < D)
    tl.store(tops + row, top)


@triton.jit
def _add_outer(
    acc, w, c, z, tops, weighted, d, rows, scale,
    D: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """acc [outputs, D] + exponentials [outputs, rows] weighted [rows, D]"""
    i = tl.arange(0, ROWS)
    for start in range(0, rows, ROWS):
        r = start + i
        x = tl.dot(w, tl.trans(tile(z, start, i, d, rows, D, WIDEN)), input_precision=PRECISION) - c[:, None]
        e = tl.exp2(tl.fma(x, scale, -tl.load(tops + r, r < rows, other=0.0)[None, :]))
        e = tl.where((r < rows)[None, :], e, 0.0)
        y = tile(weighted, start, i, d, rows, D, WIDEN)
        acc += tl.dot(e.to(y.dtype), y, input_precision=PRECISION)
    return acc


@triton.jit
def _weight_kernel(
    student_z, teacher_z, student_weight, teacher_weight, center, student_temp, teacher_temp, tops, weighted, grad,
    students, teachers, outputs, norm, D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """dL/dW of a block of outputs."""
    first = tl.program_id(0) * BLOCK
    j, d = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    k = first + j
    scale = 1.0 / scalar(student_temp)
    acc = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    w = tile(student_weight, first, j, d, outputs, D, WIDEN)
    c = tl.zeros((BLOCK,), tl.float32)
    acc = _add_outer(
        acc, w, c, student_z, tops, weighted, d, students, scale * LOG2_E, D, ROWS, PRECISION, WIDEN
    )  # fmt: skip
    w = tile(teacher_weight, first, j, d, outputs, D, WIDEN)
    c = tl.load(center + k, k < outputs, other=0.0)
    acc = _add_outer(
        acc, w, c, teacher_z, tops + students, weighted + students.to(tl.int64) * D, d, teachers,
        LOG2_E / scalar(teacher_temp), D, ROWS, PRECISION, WIDEN,
    )  # fmt: skip
    at = grad + k[:, None].to(tl.int64) * D + d[None, :]
    mask = (k < outputs)[:, None] & (d < D)[None, :]
    tl.store(at, (acc * (scale * norm / _LIFT)).to(grad.dtype.element_ty), mask)


@triton.jit
def _center_kernel(
    z, weight, center, rows, outputs, D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """center = weight mean(z), by programs that each take several blocks of outputs."""
    i, j, d = tl.arange(0, ROWS), tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    mean = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, rows, ROWS):
        mean += tl.sum(tile(z, start, i, d, rows, D, True), axis=0)
    for start in range(tl.program_id(0) * BLOCK, outputs, tl.num_programs(0) * BLOCK):
        w = tile(weight, start, j, d, outputs, D, True)
        tl.store(center + start + j, tl.sum(w * (mean / rows)[None, :], axis=1), start + j < outputs)


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
        "D": channels,
        "BLOCK_D": block_d,
        "PRECISION": "ieee" if wide else "tf32",
        "WIDEN": triton.knobs.runtime.interpret,
    }
    # Chosen so that nothing spills; the wider ones need Hopper's shared memory and matrix instruction.
    wgmma = shared_memory() > 200 << 10
    # All programs run at once, two a multiprocessor on Hopper, and the teacher's blocks, there of half the width, take
    # 5 : 3 as long as the student's.
    programs, slower = (264, 5 / 3) if wgmma else (108, 1)
    tiles, teacher_tiles = triton.cdiv(students, 64), triton.cdiv(teachers, 64)
    share, splits = shares(outputs, min(_SPLITS, round(programs / (tiles + slower * teacher_tiles))))
    teacher_share, teacher_splits = shares(outputs, min(_SPLITS, (programs - tiles * splits) // teacher_tiles))
    parts = splits * students + teacher_splits * teachers
    stats = center.new_empty(parts, 2)
    grad_weight = weight_student.new_empty(outputs if weight_grad else 0, channels)
    # The averages are merged before the weights' gradient is written: they lie in its memory.
    memory = grad_weight if outputs >= parts and weight_grad else student_z.new_empty(parts, channels)
    averages = memory if wide else memory.view(torch.float16)
    _average_kernel[(tiles * splits + teacher_tiles * teacher_splits,)](
        student_z, teacher_z, weight_student, weight_teacher, center, *temps, averages, stats,
        students, teachers, outputs, share, teacher_share, splits, teacher_splits,
        ROWS=64, BLOCK=64 if wgmma else 32, TEACHER_BLOCK=32, **common, num_warps=4 if wgmma else 8, num_stages=2,
    )  # fmt: skip
    losses, tops = center.new_empty(students), center.new_empty(rows)
    grad_z, weighted = torch.empty_like(student_z), student_z.new_empty(rows, channels)
    views = students // batch
    norm = 1 / ((2 * views - 2) * batch)
    # Without fusion a sum of products is the same in all lanes that hold it.
    _row_kernel[(rows,)](
        student_z, averages, stats, temps[0], grad_z, losses, tops, weighted,
        batch, views, channels, splits, teacher_splits, norm,
        VIEWS=triton.next_power_of_2(views), SPLITS=triton.next_power_of_2(splits),
        TEACHER_SPLITS=triton.next_power_of_2(teacher_splits), BLOCK_D=block_d, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    if weight_grad:
        block = 128 if wgmma else 64
        _weight_kernel[(triton.cdiv(outputs, block),)](
            student_z, teacher_z, weight_student, weight_teacher, center, *temps, tops, weighted, grad_weight,
            students, teachers, outputs, norm, ROWS=32, BLOCK=block, **common,
            num_warps=8, num_stages=2 if shared_memory() > 64 << 10 else 1,  # or AMD would spill
        )  # fmt: skip
    batch_center = torch.empty_like(center)
    _center_kernel[(min(triton.cdiv(outputs, 64), 264),)](
        teacher_z, weight_teacher, batch_center, teachers, outputs,
        D=channels, ROWS=32, BLOCK=64, BLOCK_D=block_d, num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip
    return losses.sum(), batch_center, grad_z, grad_weight
