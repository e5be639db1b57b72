"""Triton kernels of adamw_ema_step_; formulas in dino_kernels/ops/adamw_ema.py.

1. Norms: the sum of squares of each block's gradient.
2. Segments: a program a segment adds those up and makes the factors of its update.
3. Update: each block of weights, moments, teacher and copies; and of a weight-normed layer whole rows with their norms.
"""

import math
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from dino_kernels._core.results import last_segments
from dino_kernels.triton.common import argument, blend, blend_arguments, scalar
from dino_kernels.triton.weight_norm import forward_triton

__all__ = ["step_triton"]

_BLOCK = 4096  # elements a program


@triton.jit
def _locate(blocks, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """(segment, first element, offsets from it, mask, whether it is its segment's first) of a program's block.

    A row of blocks [programs, 4] says so: the host knows, and a search would wait for memory several times. Offsets
    from a scalar need an address a tensor and not one an element.
    """
    row = blocks + 4 * tl.program_id(0)
    begin = tl.load(row + 1)
    count = tl.load(row + 2).to(tl.int32)
    if ALIGNED:  # lets the compiler access 16 bytes at a time
        begin = tl.multiple_of(begin, 16)
        count = tl.multiple_of(count, 16)
    i = tl.arange(0, BLOCK)
    return tl.load(row), begin, i, i < count, tl.load(row + 3) != 0


@triton.jit
def _norm_kernel(grad, blocks, frozen, partials, nonfinite, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """Sum of squares of a block's gradient; zero where it is frozen, whatever is there."""
    segment, begin, i, mask, _ = _locate(blocks, ALIGNED, BLOCK)
    total = 0.0
    if tl.load(frozen + segment) == 0:
        g = tl.load(grad + begin + i, mask, other=0.0).to(tl.float32)
        total = tl.sum(g * g, axis=0)
    tl.store(partials + tl.program_id(0), total)
    if tl.program_id(0) == 0:
        tl.store(nonfinite, 0)


@triton.jit
def _segment_kernel(
    programs, frozen, decayed, steps, partials, factors, nonfinite, lr, weight_decay, clip_norm,
    log_beta1, log_beta2, BLOCK: tl.constexpr,
):  # fmt: skip
    """factors[segment] = clip, lr / (1 - beta1^n), 1 / sqrt(1 - beta2^n), 1 - lr weight_decay

    programs: the first of each segment's, [segments + 1].
    """
    segment = tl.program_id(0)
    total = tl.zeros((BLOCK,), tl.float32)
    first, end = tl.load(programs + segment), tl.load(programs + segment + 1)
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
def _advance(
    student, grad, exp_avg, exp_avg_sq, teacher, student_16, teacher_16, frozen, factors, m, one_minus_m,
    beta1, beta2, one_minus_beta1, one_minus_beta2, eps, segment, begin, i, mask, SHARED: tl.constexpr,
):  # fmt: skip
    """New weights of the student and the teacher at begin + i. SHARED: several threads hold an element, and all must
    have read it before one of them replaces it."""
    s = tl.load(student + begin + i, mask, other=0.0)
    if tl.load(frozen + segment) == 0:
        at = factors + 4 * segment
        g = tl.load(grad + begin + i, mask, other=0.0).to(tl.float32) * tl.load(at)
        m1 = beta1 * tl.load(exp_avg + begin + i, mask, other=0.0) + one_minus_beta1 * g
        m2 = beta2 * tl.load(exp_avg_sq + begin + i, mask, other=0.0) + one_minus_beta2 * g * g
        s = s * tl.load(at + 3) - tl.load(at + 1) * m1 / (tl.sqrt(m2) * tl.load(at + 2) + eps)
        if SHARED:
            tl.debug_barrier()
        tl.store(exp_avg + begin + i, m1, mask)
        tl.store(exp_avg_sq + begin + i, m2, mask)
        tl.store(student + begin + i, s, mask)
    t = m * tl.load(teacher + begin + i, mask, other=0.0) + one_minus_m * s
    if SHARED:
        tl.debug_barrier()
    tl.store(teacher + begin + i, t, mask)
    if student_16 is not None:
        tl.store(student_16 + begin + i, s.to(student_16.dtype.element_ty), mask)
    if teacher_16 is not None:
        tl.store(teacher_16 + begin + i, t.to(teacher_16.dtype.element_ty), mask)
    return s, t


@triton.jit
def _count_step(steps, frozen, segment, first):
    if first & (tl.load(frozen + segment) == 0):  # one program a segment
        count = tl.load(steps + segment) + 1
        tl.debug_barrier()  # all threads have read it before one of them replaces it
        tl.store(steps + segment, count)


@triton.jit
def _clear(grad, cleared, segment, begin, i, mask):
    if segment < cleared:
        tl.debug_barrier()  # as above
        tl.store(grad + begin + i, tl.zeros_like(i).to(grad.dtype.element_ty), mask)


@triton.jit
def _update_kernel(
    student, grad, exp_avg, exp_avg_sq, teacher, student_16, teacher_16, blocks, frozen, steps, factors, nonfinite,
    momentum, rest, cleared, beta1, beta2, one_minus_beta1, one_minus_beta2, eps,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    segment, begin, i, mask, first = _locate(blocks, ALIGNED, BLOCK)
    if tl.load(nonfinite) == 0:
        m, one_minus_m = blend(momentum, rest)
        _advance(
            student, grad, exp_avg, exp_avg_sq, teacher, student_16, teacher_16, frozen, factors, m, one_minus_m,
            beta1, beta2, one_minus_beta1, one_minus_beta2, eps, segment, begin, i, mask, False,
        )  # fmt: skip
        _count_step(steps, frozen, segment, first)
    _clear(grad, cleared, segment, begin, i, mask)


@triton.jit
def _rows_kernel(
    student, grad, exp_avg, exp_avg_sq, teacher, student_16, teacher_16, student_rows, teacher_rows, frozen, steps,
    factors, nonfinite, momentum, rest, cleared, beta1, beta2, one_minus_beta1, one_minus_beta2, eps,
    segment, begin_g, begin_v, ROWS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """ROWS norms g and directions v of a weight-normed layer, segments `segment` and `segment + 1`, and its rows."""
    first = tl.program_id(0) == 0
    row, i = tl.arange(0, ROWS), tl.arange(0, ROWS * D)
    begin_g += tl.program_id(0).to(tl.int64) * ROWS
    begin_v += tl.program_id(0).to(tl.int64) * (ROWS * D)
    if tl.load(nonfinite) == 0:
        m, one_minus_m = blend(momentum, rest)
        student_g, teacher_g = _advance(
            student, grad, exp_avg, exp_avg_sq, teacher, student_16, teacher_16, frozen, factors, m, one_minus_m,
            beta1, beta2, one_minus_beta1, one_minus_beta2, eps, segment, begin_g, row, row < ROWS, True,
        )  # fmt: skip
        student_v, teacher_v = _advance(
            student, grad, exp_avg, exp_avg_sq, teacher, None, None, frozen, factors, m, one_minus_m,
            beta1, beta2, one_minus_beta1, one_minus_beta2, eps, segment + 1, begin_v, i, i < ROWS * D, False,
        )  # fmt: skip
        at = (tl.program_id(0) * ROWS + row)[:, None].to(tl.int64) * D + tl.arange(0, D)[None, :]
        v = tl.reshape(student_v, (ROWS, D))
        scale = student_g / tl.sqrt(tl.sum(v * v, axis=1))
        tl.store(student_rows + at, (v * scale[:, None]).to(student_rows.dtype.element_ty))
        v = tl.reshape(teacher_v, (ROWS, D))
        scale = teacher_g / tl.sqrt(tl.sum(v * v, axis=1))
        tl.store(teacher_rows + at, (v * scale[:, None]).to(teacher_rows.dtype.element_ty))
        _count_step(steps, frozen, segment, first)
        _count_step(steps, frozen, segment + 1, first)
    _clear(grad, cleared, segment, begin_g, row, row < ROWS)


@cache
def _table(offsets: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor, list[int], bool]:
    """Of each program `_locate`'s row; of each segment its first program, here and on the host; whether segments are
    aligned. Kept: a run uploads them once, and a captured CUDA graph finds them where they were."""
    blocks, first = [], [0]
    for segment, (begin, end) in enumerate(zip(offsets, offsets[1:], strict=False)):
        for start in range(begin, end, _BLOCK):
            blocks.append((segment, start, min(_BLOCK, end - start), start == begin))
        first.append(len(blocks))
    rows, programs = (torch.tensor(table, dtype=torch.int64, device="cpu").to(device) for table in (blocks, first))
    return rows, programs, first, all(offset % 16 == 0 for offset in offsets)


def step_triton(
    student, grad, exp_avg, exp_avg_sq, teacher, student_16, teacher_16, student_rows, teacher_rows, offsets, steps,
    decayed, frozen, nonfinite, lr, weight_decay, momentum, clip_norm, beta1, beta2, eps, cleared,
):  # fmt: skip
    blocks, programs, first, aligned = _table(tuple(offsets), student.device)
    segments = len(offsets) - 1
    layout = {"ALIGNED": aligned, "BLOCK": _BLOCK, "num_warps": 8}
    frozen, decayed = frozen.view(torch.uint8), decayed.view(torch.uint8)
    partials, factors = student.new_empty(len(blocks)), student.new_empty(segments, 4)
    _norm_kernel[(len(blocks),)](grad, blocks, frozen, partials, nonfinite, **layout)
    _segment_kernel[(segments,)](
        programs, frozen, decayed, steps, partials, factors, nonfinite, argument(lr), argument(weight_decay),
        clip_norm, math.log(beta1) if beta1 else -1e9, math.log(beta2) if beta2 else -1e9, BLOCK=1024,
    )  # fmt: skip
    weights = student, grad, exp_avg, exp_avg_sq, teacher, student_16, teacher_16
    state = frozen, steps, factors, nonfinite, *blend_arguments(momentum), cleared, beta1, beta2, 1 - beta1, 1 - beta2
    width = 0 if student_rows is None else student_rows.shape[1]
    whole = width > 0 and _fits(offsets, *student_rows.shape)
    count = first[-3] if whole else first[-1]
    if count:
        _update_kernel[(count,)](*weights, blocks, *state, eps, **layout)
    if whole:
        grid = (2 * student_rows.numel() // _BLOCK,)  # four elements a thread: two nets' rows take registers
        _rows_kernel[grid](
            *weights, student_rows, teacher_rows, *state, eps, segments - 2, *offsets[-3:-1],
            ROWS=_BLOCK // (2 * width), D=width, num_warps=16, enable_fp_fusion=False,
        )  # fmt: skip
    elif width:
        forward_triton(student_rows, *last_segments(student, offsets, student_rows))
        forward_triton(teacher_rows, *last_segments(teacher, offsets, teacher_rows))


def _fits(offsets, rows, width):
    """Whether the last two segments are not padded and programs own whole rows."""
    exact = [offsets[-2] - offsets[-3], offsets[-1] - offsets[-2]] == [rows, rows * width]
    return exact and width & (width - 1) == 0 and 2 * width <= _BLOCK and rows * width % _BLOCK == 0
