"""Triton kernels of sgd_ema_step_; formulas in dino_kernels/ops/sgd_ema.py, their order in flat_step.py."""

import torch
import triton
import triton.language as tl

from dino_kernels.triton.common import argument, scalar
from dino_kernels.triton.flat_step import locate, sum_of_blocks, table, update_triton

__all__ = ["step_triton"]


@triton.jit
def _sgd_norm_kernel(
    student, grad, blocks, adapted, frozen, partials, nonfinite, programs, ALIGNED: tl.constexpr, BLOCK: tl.constexpr
):
    """partials[3, programs] = |grad|^2, |s|^2 and grad . s of a block; zero where it is frozen, whatever is there, and
    the last two where it is not adapted."""
    segment, begin, i, mask, _ = locate(blocks, ALIGNED, BLOCK)
    square, weights, product = 0.0, 0.0, 0.0
    if tl.load(frozen + segment) == 0:
        g = tl.load(grad + begin + i, mask, other=0.0).to(tl.float32)
        square = tl.sum(g * g, axis=0)
        if tl.load(adapted + segment) != 0:
            s = tl.load(student + begin + i, mask, other=0.0)
            weights, product = tl.sum(s * s, axis=0), tl.sum(g * s, axis=0)
    at = partials + tl.program_id(0)
    tl.store(at, square)
    tl.store(at + programs, weights)
    tl.store(at + 2 * programs, product)
    if tl.program_id(0) == 0:
        tl.store(nonfinite, 0)


@triton.jit
def _sgd_segment_kernel(
    first, decayed, adapted, partials, factors, nonfinite, lr, weight_decay, clip_norm, eta, eps, programs,
    LARC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """factors[segment] = r clip, lr, unused, r w

    first: program of each segment, [segments + 1].
    """
    segment = tl.program_id(0)
    begin, end = tl.load(first + segment), tl.load(first + segment + 1)
    square = sum_of_blocks(partials, begin, end, BLOCK)
    norm = tl.sqrt(square)
    if (norm - norm) != 0.0:  # infinite or NaN
        tl.store(nonfinite, 1)
    clip = tl.where(clip_norm > 0.0, tl.minimum(clip_norm / (norm + 1e-6), 1.0), 1.0)
    decay = scalar(weight_decay).to(tl.float32) * tl.load(decayed + segment).to(tl.float32)
    ratio = 1.0
    if tl.load(adapted + segment) != 0:
        weights = sum_of_blocks(partials + programs, begin, end, BLOCK)
        length = tl.sqrt(weights)
        if LARC:
            ratio = tl.where(norm > 0.0, eta * length / (clip * norm + decay * length + eps), 0.0)
        else:
            product = sum_of_blocks(partials + 2 * programs, begin, end, BLOCK)
            both = clip * clip * square + 2.0 * clip * decay * product + decay * decay * weights
            ratio = tl.where(both > 0.0, eta * length / tl.sqrt(both), 1.0)
        ratio = tl.where(length > 0.0, ratio, 1.0)
    tl.store(factors + 4 * segment, ratio * clip)
    tl.store(factors + 4 * segment + 1, scalar(lr).to(tl.float32))
    tl.store(factors + 4 * segment + 3, ratio * decay)


def step_triton(
    student, grad, momentum_buffer, teacher, student_16, teacher_16, student_rows, teacher_rows, offsets, decayed,
    adapted, frozen, nonfinite, lr, weight_decay, momentum, clip_norm, momentum_sgd, larc, eta, eps, cleared,
):  # fmt: skip
    blocks, first, _, options = table(tuple(offsets), student.device)
    decayed, adapted, frozen = (flags.view(torch.uint8) for flags in (decayed, adapted, frozen))
    partials, factors = student.new_empty(3, len(blocks)), student.new_empty(len(offsets) - 1, 4)
    _sgd_norm_kernel[(len(blocks),)](
        student, grad, blocks, adapted, frozen, partials, nonfinite, len(blocks), **options
    )
    _sgd_segment_kernel[(len(factors),)](
        first, decayed, adapted, partials, factors, nonfinite, argument(lr), argument(weight_decay), clip_norm,
        eta, eps, len(blocks), LARC=larc, BLOCK=1024,
    )  # fmt: skip
    update_triton(
        student, grad, momentum_buffer, None, teacher, student_16, teacher_16, student_rows, teacher_rows, offsets,
        None, frozen, factors, nonfinite, momentum, cleared, momentum_sgd,
    )  # fmt: skip
