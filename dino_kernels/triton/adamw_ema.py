"""Triton kernels of adamw_ema_step_; formulas in dino_kernels/ops/adamw_ema.py, their order in flat_step.py."""

import math

import torch
import triton
import triton.language as tl

from dino_kernels.triton.common import argument, scalar
from dino_kernels.triton.flat_step import locate, sum_of_blocks, sum_of_group, table, update_triton

__all__ = ["step_triton"]


@triton.jit
def _norm_kernel(grad, blocks, frozen, partials, nonfinite, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """Sum of squares of a block's gradient; zero where it is frozen, whatever is there."""
    segment, begin, i, mask, _ = locate(blocks, ALIGNED, BLOCK)
    total = 0.0
    if tl.load(frozen + segment) == 0:
        g = tl.load(grad + begin + i, mask, other=0.0).to(tl.float32)
        total = tl.sum(g * g, axis=0)
    tl.store(partials + tl.program_id(0), total)
    if tl.program_id(0) == 0:
        tl.store(nonfinite, 0)


@triton.jit
def _segment_kernel(
    programs, blocks, frozen, decayed, steps, lr_scale, clip_groups, partials, factors, nonfinite, lr, weight_decay,
    clip_norm, log_beta1, log_beta2, count, BLOCK: tl.constexpr,
):  # fmt: skip
    """factors[segment] = clip, lr / (1 - beta1^n), 1 / sqrt(1 - beta2^n), 1 - lr weight_decay

    programs: the first of each segment's, [segments + 1]. count: of all.
    """
    segment = tl.program_id(0)
    if clip_groups is None:
        square = sum_of_blocks(partials, tl.load(programs + segment), tl.load(programs + segment + 1), BLOCK)
    else:
        square = sum_of_group(partials, blocks, clip_groups, tl.load(clip_groups + segment), count, BLOCK)
    norm = tl.sqrt(square)
    if (norm - norm) != 0.0:  # infinite or NaN
        tl.store(nonfinite, 1)
    factor = tl.where(clip_norm > 0.0, tl.minimum(clip_norm / (norm + 1e-6), 1.0), 1.0)
    n = (tl.load(steps + segment) + 1).to(tl.float64)
    correction1 = (1.0 - tl.exp(n * log_beta1)).to(tl.float32)
    correction2 = (1.0 - tl.exp(n * log_beta2)).to(tl.float32)
    rate = scalar(lr).to(tl.float32)
    if lr_scale is not None:
        rate *= tl.load(lr_scale + segment)
    decay = 1.0 - rate * scalar(weight_decay).to(tl.float32) * tl.load(decayed + segment).to(tl.float32)
    tl.store(factors + 4 * segment, factor)
    tl.store(factors + 4 * segment + 1, rate / correction1)
    tl.store(factors + 4 * segment + 2, 1.0 / tl.sqrt(correction2))
    tl.store(factors + 4 * segment + 3, decay)


def step_triton(
    student, grad, exp_avg, exp_avg_sq, teacher, student_16, teacher_16, student_rows, teacher_rows, offsets, steps,
    decayed, frozen, nonfinite, lr, weight_decay, momentum, clip_norm, beta1, beta2, eps, cleared, lr_scale,
    clip_groups,
):  # fmt: skip
    blocks, programs, _, options = table(tuple(offsets), student.device)
    frozen, decayed = frozen.view(torch.uint8), decayed.view(torch.uint8)
    partials, factors = student.new_empty(len(blocks)), student.new_empty(len(offsets) - 1, 4)
    _norm_kernel[(len(blocks),)](grad, blocks, frozen, partials, nonfinite, **options)
    _segment_kernel[(len(factors),)](
        programs, blocks, frozen, decayed, steps, lr_scale, clip_groups, partials, factors, nonfinite,
        argument(lr), argument(weight_decay), clip_norm,
        math.log(beta1) if beta1 else -1e9, math.log(beta2) if beta2 else -1e9, len(blocks), BLOCK=1024,
    )  # fmt: skip
    update_triton(
        student, grad, exp_avg, exp_avg_sq, teacher, student_16, teacher_16, student_rows, teacher_rows, offsets,
        steps, frozen, factors, nonfinite, momentum, cleared, beta1, beta2, eps,
    )  # fmt: skip
