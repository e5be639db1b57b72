"""Triton kernels of adamw_ema_step_; formulas in dino_kernels/adamw_ema.py.

1. Norms: the sum of squares of each block's gradient.
2. Segments: a program a segment adds those up and makes the factors of its update.
3. Update: each block of weights, moments, teacher and copies.
"""

import math
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from dino_kernels._triton import argument, blend, blend_arguments, owner, scalar
from dino_kernels.adamw_ema import last_layer
from dino_kernels.weight_norm_triton import forward_triton

__all__ = ["step_triton"]

_BLOCK = 4096  # elements a program


@triton.jit
def _locate(table, segments, STEPS: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """(segment, first element, offsets from it, mask) of a program's block. table [2, segments + 1]: first programs,
    first elements. Offsets from a scalar need an address a tensor and not one an element."""
    program = tl.program_id(0)
    low = owner(table, segments, program, STEPS)
    begin = tl.load(table + segments + 1 + low) + (program - tl.load(table + low)) * BLOCK
    count = tl.minimum(tl.load(table + segments + 2 + low) - begin, BLOCK).to(tl.int32)
    if ALIGNED:  # lets the compiler access 16 bytes at a time
        begin = tl.multiple_of(begin, 16)
        count = tl.multiple_of(count, 16)
    i = tl.arange(0, BLOCK)
    return low, begin, i, i < count


@triton.jit
def _norm_kernel(
    grad, table, frozen, partials, nonfinite, segments,
    STEPS: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum of squares of a block's gradient; zero where it is frozen, whatever is there."""
    segment, begin, i, mask = _locate(table, segments, STEPS, ALIGNED, BLOCK)
    total = 0.0
    if tl.load(frozen + segment) == 0:
        g = tl.load(grad + begin + i, mask, other=0.0).to(tl.float32)
        total = tl.sum(g * g, axis=0)
    tl.store(partials + tl.program_id(0), total)
    if tl.program_id(0) == 0:
        tl.store(nonfinite, 0)


@triton.jit
def _segment_kernel(
    table, frozen, decayed, steps, partials, factors, nonfinite, lr, weight_decay, segments, clip_norm,
    log_beta1, log_beta2, BLOCK: tl.constexpr,
):  # fmt: skip
    """factors[segment] = clip, lr / (1 - beta1^n), 1 / sqrt(1 - beta2^n), 1 - lr weight_decay"""
    segment = tl.program_id(0)
    total = tl.zeros((BLOCK,), tl.float32)
    first, end = tl.load(table + segment), tl.load(table + segment + 1)
    for start in range(first, end, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(partials + i, i < end, other=0.0)
    norm = tl.sqrt(tl.sum(total, axis=0))
    if (norm - norm) != 0.0:  # infinite or NaN
        tl.store(nonfinite, 1)
    factor = tl.where(clip_norm > 0.0, tl.minimum(clip_norm / (norm + 1e-6), 1.0), 1.0)
    n = (tl.load(steps + segment) + 1).to(tl.float64)
    correction1 = (1.0 - tl.exp(n * log_beta1)).to(tl.float32)
    correction2 = (1.0 - tl.exp(n * log_beta2)).to(tl.float32)
    rate = scalar(lr).to(tl.float32)
    decay = 1.0 - rate * scalar(weight_decay).to(tl.float32) * tl.load(decayed + segment).to(tl.float32)
    tl.store(factors + 4 * segment, factor)
    tl.store(factors + 4 * segment + 1, rate / correction1)
    tl.store(factors + 4 * segment + 2, 1.0 / tl.sqrt(correction2))
    tl.store(factors + 4 * segment + 3, decay)


@triton.jit
def _update_kernel(
    student, grad, exp_avg, exp_avg_sq, teacher, student_16, teacher_16, table, frozen, steps, factors, nonfinite,
    momentum, rest, segments, beta1, beta2, one_minus_beta1, one_minus_beta2, eps,
    STEPS: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if tl.load(nonfinite) == 0:
        segment, begin, i, mask = _locate(table, segments, STEPS, ALIGNED, BLOCK)
        s = tl.load(student + begin + i, mask, other=0.0)
        if tl.load(frozen + segment) == 0:
            at = factors + 4 * segment
            g = tl.load(grad + begin + i, mask, other=0.0).to(tl.float32) * tl.load(at)
            m1 = beta1 * tl.load(exp_avg + begin + i, mask, other=0.0) + one_minus_beta1 * g
            m2 = beta2 * tl.load(exp_avg_sq + begin + i, mask, other=0.0) + one_minus_beta2 * g * g
            s = s * tl.load(at + 3) - tl.load(at + 1) * m1 / (tl.sqrt(m2) * tl.load(at + 2) + eps)
            tl.store(exp_avg + begin + i, m1, mask)
            tl.store(exp_avg_sq + begin + i, m2, mask)
            tl.store(student + begin + i, s, mask)
            if tl.program_id(0) == tl.load(table + segment):  # once a segment; nobody reads it in this kernel
                tl.store(steps + segment, tl.load(steps + segment) + 1)
        m, one_minus_m = blend(momentum, rest)
        t = m * tl.load(teacher + begin + i, mask, other=0.0) + one_minus_m * s
        tl.store(teacher + begin + i, t, mask)
        if student_16 is not None:
            tl.store(student_16 + begin + i, s.to(student_16.dtype.element_ty), mask)
        if teacher_16 is not None:
            tl.store(teacher_16 + begin + i, t.to(teacher_16.dtype.element_ty), mask)


@cache
def _table(offsets: tuple[int, ...], device: torch.device) -> tuple[Tensor, int, bool]:
    """`_locate`'s table, the number of programs, whether segments are aligned; kept: a run uploads the table once."""
    first, aligned = [0], all(offset % 16 == 0 for offset in offsets)
    for begin, end in zip(offsets, offsets[1:], strict=False):
        first.append(first[-1] + triton.cdiv(end - begin, _BLOCK))
    return torch.tensor([first, offsets], dtype=torch.int64, device="cpu").to(device), first[-1], aligned


def step_triton(
    student, grad, exp_avg, exp_avg_sq, teacher, student_16, teacher_16, student_rows, teacher_rows, offsets, steps,
    decayed, frozen, nonfinite, lr, weight_decay, momentum, clip_norm, beta1, beta2, eps, cleared,
):  # fmt: skip
    table, blocks, aligned = _table(tuple(offsets), student.device)
    segments = len(offsets) - 1
    layout = {"STEPS": segments.bit_length(), "ALIGNED": aligned, "BLOCK": _BLOCK, "num_warps": 8}
    frozen, decayed = frozen.view(torch.uint8), decayed.view(torch.uint8)
    partials, factors = student.new_empty(blocks), student.new_empty(segments, 4)
    _norm_kernel[(blocks,)](grad, table, frozen, partials, nonfinite, segments, **layout)
    _segment_kernel[(segments,)](
        table, frozen, decayed, steps, partials, factors, nonfinite, argument(lr), argument(weight_decay), segments,
        clip_norm, math.log(beta1) if beta1 else -1e9, math.log(beta2) if beta2 else -1e9, BLOCK=1024,
    )  # fmt: skip
    _update_kernel[(blocks,)](
        student, grad, exp_avg, exp_avg_sq, teacher, student_16, teacher_16, table, frozen, steps, factors, nonfinite,
        *blend_arguments(momentum), segments, beta1, beta2, 1 - beta1, 1 - beta2, eps, **layout,
    )  # fmt: skip
    grad[: offsets[cleared]].zero_()
    for rows, weights in ((student_rows, student), (teacher_rows, teacher)):
        if rows is not None:
            forward_triton(rows, *last_layer(weights, offsets, rows))
