"""Triton kernels of patch_loss; formulas in dino_kernels/ops/patch_loss.py.

1. Columns: each program sums a block of columns over a share of the teacher's rows; then the shares are added up in
   their order, which gives the mean row.
2. Rows: a program a row, for its loss and gradient. Each row is read twice, the second time from a cache.

A repeated call is bitwise equal.
"""

import torch
import triton
import triton.language as tl

from dino_kernels.triton.common import LOG2_E, argument, scalar
from dino_kernels.triton.dino_loss import add_losses, row_exponentials, row_launch

__all__ = ["forward_triton"]

_PROGRAMS = 528  # four on each multiprocessor of an H100 or H200


@triton.jit
def _column_kernel(
    teacher, weights, partial, arrived, rows, outputs, stride, share,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """partial [shares, K]: sums of a share of the rows. Also sets the counter of the last kernel to zero."""
    k = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    part = tl.program_id(1)
    end = tl.minimum((part + 1) * share, rows)
    total = tl.zeros((COLUMNS,), tl.float32)
    for start in range(part * share, end, ROWS):
        r = start + tl.arange(0, ROWS)
        counted = tl.load(weights + r, r < end, other=0.0) != 0
        mask = counted[:, None] & (k < outputs)[None, :]
        t = tl.load(teacher + r[:, None].to(tl.int64) * stride + k[None, :], mask, other=0.0)
        total += tl.sum(t.to(tl.float32), axis=0)
    tl.store(partial + part.to(tl.int64) * outputs + k, total, k < outputs)
    if tl.program_id(0) + part == 0:
        tl.store(arrived, 0)


@triton.jit
def _mean_kernel(partial, weights, batch_center, shares, rows, outputs, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """batch_center of a block of columns: the shares' sum over the number of rows that count, or over one."""
    k = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float32)
    for i in range(0, shares):
        total += tl.load(partial + tl.cast(i, tl.int64) * outputs + k, k < outputs, other=0.0)
    counted = tl.zeros((ROWS,), tl.int32)
    for start in range(0, rows, ROWS):
        r = start + tl.arange(0, ROWS)
        counted += (tl.load(weights + r, r < rows, other=0.0) != 0).to(tl.int32)
    tl.store(batch_center + k, total / tl.maximum(tl.sum(counted, axis=0), 1), k < outputs)


@triton.jit
def _patch_kernel(
    student, teacher, center, weights, student_temp, teacher_temp, grad, losses, loss, arrived,
    outputs, student_stride, teacher_stride, grad_stride,
    STEP: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Loss and gradient of one row a program: log-sum-exp of teacher and student, then the gradient.

    Rows are taken from the last to the first, and each from its end in the second sweep: what was written or read
    last is still in a cache.
    """
    rows = tl.num_programs(0)
    row = rows - 1 - tl.program_id(0)
    weight = tl.load(weights + row)
    grad += row.to(tl.int64) * grad_stride
    blocks = tl.cdiv(outputs, LANES)
    row_loss = 0.0
    if weight != 0:
        student += row.to(tl.int64) * student_stride
        teacher += row.to(tl.int64) * teacher_stride
        scale = 1.0 / scalar(student_temp)
        log2_scale = scale * LOG2_E
        teacher_log2_scale = LOG2_E / scalar(teacher_temp)
        # In smaller steps than the student's, since the center needs registers too.
        teacher_top, teacher_sum = row_exponentials(teacher, center, outputs, teacher_log2_scale, STEP // 2, LANES)
        top, total = row_exponentials(student, None, outputs, log2_scale, STEP, LANES)
        inverse, teacher_inverse = 1.0 / total, 1.0 / teacher_sum
        dot = tl.zeros((LANES,), tl.float32)
        for i in range(0, blocks):
            k = (blocks - 1 - i) * LANES + tl.arange(0, LANES)
            mask = k < outputs
            t = tl.load(teacher + k, mask, other=float("-inf")).to(tl.float32)
            x = t - tl.load(center + k, mask, other=0.0)
            q = tl.exp2(tl.fma(x, teacher_log2_scale, -teacher_top)) * teacher_inverse
            s = tl.load(student + k, mask, other=0.0).to(tl.float32)
            dot = tl.fma(q, s, dot)
            p = tl.exp2(tl.fma(s, log2_scale, -top))
            tl.store(grad + k, (tl.fma(p, inverse, -q) * (weight * scale)).to(grad.dtype.element_ty), mask)
        row_loss = weight * ((top + tl.log2(total)) / LOG2_E - tl.sum(dot, axis=0) * scale)
    else:
        for i in range(0, blocks):
            k = i * LANES + tl.arange(0, LANES)
            tl.store(grad + k, tl.zeros((LANES,), grad.dtype.element_ty), k < outputs)
    add_losses(row_loss, losses, loss, arrived, row, rows)


def forward_triton(student, teacher, center, weights, student_temp, teacher_temp, grad):
    rows, outputs = student.shape
    if not rows:
        return center.new_zeros(()), center.new_zeros(outputs)
    loss, losses, batch_center = center.new_empty(()), center.new_empty(rows), center.new_empty(outputs)
    arrived = center.new_empty((), dtype=torch.int32)
    columns, step = 512, 8
    blocks = triton.cdiv(outputs, columns)
    share = step * triton.cdiv(rows, step * triton.cdiv(_PROGRAMS, blocks))
    shares = triton.cdiv(rows, share)
    partial = center.new_empty(shares, outputs)
    _column_kernel[(blocks, shares)](
        teacher, weights, partial, arrived, rows, outputs, teacher.stride(0), share,
        ROWS=step, COLUMNS=columns, num_warps=4,
    )  # fmt: skip
    _mean_kernel[(triton.cdiv(outputs, 128),)](
        partial, weights, batch_center, shares, rows, outputs, ROWS=1024, COLUMNS=128, num_warps=4
    )
    _patch_kernel[(rows,)](
        student, teacher, center, weights, argument(student_temp), argument(teacher_temp), grad, losses, loss, arrived,
        outputs, student.stride(0), teacher.stride(0), grad.stride(0), **row_launch(outputs),
    )  # fmt: skip
    return loss, batch_center
