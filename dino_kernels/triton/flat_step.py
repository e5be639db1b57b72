"""Triton kernels of a step over flat buffers, shared by the ops adamw_ema_step_ and sgd_ema_step_.

1. Norms, of each op: sums of squares over each block.
2. Segments, of each op: a program a segment adds those up and makes the four factors of its update.
3. Update, `update_triton`: each block of weights, moments, teacher and copies; and of a weight-normed layer whole rows
   with their norms.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from dino_kernels._core.results import last_segments
from dino_kernels.triton.common import blend, blend_arguments
from dino_kernels.triton.weight_norm import forward_triton

__all__ = ["locate", "sum_of_blocks", "sum_of_group", "table", "update_triton"]

_BLOCK = 4096  # elements a program


@triton.jit
def locate(blocks, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
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
def sum_of_blocks(partials, first, end, BLOCK: tl.constexpr):
    """Of partials[first:end], in an order that depends on their number alone."""
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(first, end, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(partials + i, i < end, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit
def sum_of_group(partials, blocks, groups, group, programs, BLOCK: tl.constexpr):
    """Of the partials of all segments for which groups [segments] is `group`; their order is the same for each."""
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, programs, BLOCK):
        i = start + tl.arange(0, BLOCK)
        segment = tl.load(blocks + 4 * i, i < programs, other=0)
        total += tl.load(partials + i, (i < programs) & (tl.load(groups + segment) == group), other=0.0)
    return tl.sum(total, axis=0)


@triton.jit
def _advance(
    student, grad, average, square, teacher, student_16, teacher_16, frozen, factors, m, one_minus_m,
    beta1, beta2, one_minus_beta1, one_minus_beta2, eps, segment, begin, i, mask, SHARED: tl.constexpr,
):  # fmt: skip
    """New weights of the student and the teacher at begin + i. SHARED: several threads hold an element, and all must
    have read it before one of them replaces it.

    square: AdamW's moments are average and square. None: average is the momentum buffer of SGD, beta1 its momentum.
    """
    s = tl.load(student + begin + i, mask, other=0.0)
    if tl.load(frozen + segment) == 0:
        at = factors + 4 * segment
        g = tl.load(grad + begin + i, mask, other=0.0).to(tl.float32) * tl.load(at)
        if square is not None:
            m1 = beta1 * tl.load(average + begin + i, mask, other=0.0) + one_minus_beta1 * g
            m2 = beta2 * tl.load(square + begin + i, mask, other=0.0) + one_minus_beta2 * g * g
            s = s * tl.load(at + 3) - tl.load(at + 1) * m1 / (tl.sqrt(m2) * tl.load(at + 2) + eps)
        else:
            m1 = beta1 * tl.load(average + begin + i, mask, other=0.0) + (g + tl.load(at + 3) * s)
            s = s - tl.load(at + 1) * m1
        if SHARED:
            tl.debug_barrier()
        tl.store(average + begin + i, m1, mask)
        if square is not None:
            tl.store(square + begin + i, m2, mask)
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
    if steps is not None and first & (tl.load(frozen + segment) == 0):  # one program a segment
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
    student, grad, average, square, teacher, student_16, teacher_16, blocks, frozen, steps, factors, nonfinite,
    momentum, rest, cleared, beta1, beta2, one_minus_beta1, one_minus_beta2, eps,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    segment, begin, i, mask, first = locate(blocks, ALIGNED, BLOCK)
    if tl.load(nonfinite) == 0:
        m, one_minus_m = blend(momentum, rest)
        _advance(
            student, grad, average, square, teacher, student_16, teacher_16, frozen, factors, m, one_minus_m,
            beta1, beta2, one_minus_beta1, one_minus_beta2, eps, segment, begin, i, mask, False,
        )  # fmt: skip
        _count_step(steps, frozen, segment, first)
    _clear(grad, cleared, segment, begin, i, mask)


@triton.jit
def _rows_kernel(
    student, grad, average, square, teacher, student_16, teacher_16, student_rows, teacher_rows, frozen, steps,
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
            student, grad, average, square, teacher, student_16, teacher_16, frozen, factors, m, one_minus_m,
            beta1, beta2, one_minus_beta1, one_minus_beta2, eps, segment, begin_g, row, row < ROWS, True,
        )  # fmt: skip
        student_v, teacher_v = _advance(
            student, grad, average, square, teacher, None, None, frozen, factors, m, one_minus_m,
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
def table(offsets: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor, list[int], dict]:
    """Of each program `locate`'s row; of each segment its first program, here and on the host; the options of a kernel
    with a program a block. Kept: a run uploads them once, and a captured CUDA graph finds them where they were."""
    blocks, first = [], [0]
    for segment, (begin, end) in enumerate(zip(offsets, offsets[1:], strict=False)):
        for start in range(begin, end, _BLOCK):
            blocks.append((segment, start, min(_BLOCK, end - start), start == begin))
        first.append(len(blocks))
    rows, programs = (torch.tensor(table, dtype=torch.int64, device="cpu").to(device) for table in (blocks, first))
    aligned = all(offset % 16 == 0 for offset in offsets)
    return rows, programs, first, {"ALIGNED": aligned, "BLOCK": _BLOCK, "num_warps": 8}


def update_triton(
    student, grad, average, square, teacher, student_16, teacher_16, student_rows, teacher_rows, offsets, steps,
    frozen, factors, nonfinite, momentum, cleared, beta1, beta2=0.0, eps=0.0,
):  # fmt: skip
    """The third step; factors [segments, 4] and nonfinite are the second's."""
    blocks, _, first, options = table(tuple(offsets), student.device)
    weights = student, grad, average, square, teacher, student_16, teacher_16
    state = frozen, steps, factors, nonfinite, *blend_arguments(momentum), cleared, beta1, beta2, 1 - beta1, 1 - beta2
    width = 0 if student_rows is None else student_rows.shape[1]
    whole = width > 0 and _fits(offsets, *student_rows.shape)
    count = first[-3] if whole else first[-1]
    if count:
        _update_kernel[(count,)](*weights, blocks, *state, eps, **options)
    if whole:
        grid = (2 * student_rows.numel() // _BLOCK,)  # four elements a thread: two nets' rows take registers
        _rows_kernel[grid](
            *weights, student_rows, teacher_rows, *state, eps, len(offsets) - 3, *offsets[-3:-1],
            ROWS=_BLOCK // (2 * width), D=width, num_warps=16, enable_fp_fusion=False,
        )  # fmt: skip
    elif width:
        forward_triton(student_rows, *last_segments(student, offsets, student_rows))
        forward_triton(teacher_rows, *last_segments(teacher, offsets, teacher_rows))


def _fits(offsets, rows, width):
    """Whether the last two segments are not padded and programs own whole rows."""
    exact = [offsets[-2] - offsets[-3], offsets[-1] - offsets[-2]] == [rows, rows * width]
    return exact and width & (width - 1) == 0 and 2 * width <= _BLOCK and rows * width % _BLOCK == 0
