"""Everything after the backward pass in one pass over memory: clip, AdamW, the teacher's EMA and 16-bit copies.

All parameters lie in flat buffers of N elements; segment i, one parameter tensor, is [offsets[i], offsets[i+1]).
Per segment that is not frozen, with its own step count n (from 1), and then for every segment:

    g  = grad min(1, clip_norm / (|grad| + 1e-6))                        |grad| the segment's L2 norm
    m1 = beta1 m1 + (1 - beta1) g        m2 = beta2 m2 + (1 - beta2) g^2
    s  = s (1 - lr weight_decay) - lr / (1 - beta1^n) m1 / (sqrt(m2 / (1 - beta2^n)) + eps)
    t  = momentum t + (1 - momentum) s

36 bytes a float32 parameter, and 4 for the norms; the reference's separate loops move about 125.
"""

import math
from collections.abc import Sequence
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from dino_kernels._native import _C, DTYPES, setting
from dino_kernels._ops import custom_op
from dino_kernels._triton import argument, blend, blend_arguments, owner, scalar
from dino_kernels.ema_update import momentum_tensor

__all__ = ["adamw_ema_step_", "adamw_ema_step_reference_"]


@torch.no_grad()
def adamw_ema_step_(
    student: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    teacher: Tensor,
    *,
    offsets: Sequence[int],
    steps: Tensor,
    decayed: Tensor,
    frozen: Tensor,
    nonfinite: Tensor,
    lr: float | Tensor,
    weight_decay: float | Tensor,
    momentum: float | Tensor,
    clip_norm: float | None = None,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    student_16: Tensor | None = None,
    teacher_16: Tensor | None = None,
) -> None:
    """One optimizer step of the student and one of the teacher, in place; on a GPU without a question to the host.

    Formula in the module's docstring; main_dino.py:325-350, utils.py:132-141 and torch.optim.AdamW. Computed in
    float32; a repeated call on the same values is bitwise equal. If the norm of a segment's gradient is infinite or
    NaN, nothing is changed but `nonfinite`.

    Args:
        student, exp_avg, exp_avg_sq, teacher: float32 [N], contiguous: weights, both moments, the teacher's weights.
        grad: [N], contiguous; float32, float16 or bfloat16. Zero where segments are padded.
        offsets: S+1 bounds of the segments, rising from 0 to N, none empty; multiples of 16 give the widest
            memory accesses.
        steps: int64 [S], how often each segment was updated; incremented.
        decayed: bool [S], where weight decay applies.
        frozen: bool [S], segments without gradient (the reference's last layer at first, weights that are never
            trained): `grad` is ignored there, and only teacher and copies are updated.
        nonfinite: int32 0-d, set to 1 if the step was refused, else to 0.
        lr, weight_decay: floats >= 0 or 0-d tensors on the device of the others.
        momentum: of the teacher, in [0, 1], float or 0-d tensor (1 - momentum is formed in its precision).
        clip_norm: largest L2 norm of a segment's gradient, > 0; None does not clip.
        betas, eps: of AdamW.
        student_16, teacher_16: [N] float16 or bfloat16, receive the rounded new weights.

    Raises:
        ValueError: an argument that does not fit the above.
    """
    offsets = list(offsets)
    _check(student, grad, exp_avg, exp_avg_sq, teacher, student_16, teacher_16, offsets)
    _check_segments(student, offsets, steps, decayed, frozen, nonfinite)
    if clip_norm is not None and not clip_norm > 0:
        raise ValueError(f"clip_norm must be > 0 or None, got {clip_norm}")
    if not (0 <= betas[0] < 1 and 0 <= betas[1] < 1 and eps >= 0):
        raise ValueError(f"betas must be in [0, 1) and eps >= 0, got {betas} and {eps}")
    torch.ops.dino_kernels.adamw_ema_step_(
        student,
        grad,
        exp_avg,
        exp_avg_sq,
        teacher,
        student_16,
        teacher_16,
        offsets,
        steps,
        decayed,
        frozen,
        nonfinite,
        _rate("lr", lr, student.device),
        _rate("weight_decay", weight_decay, student.device),
        momentum_tensor(momentum, student.device),
        clip_norm or 0.0,
        *betas,
        eps,
    )


@torch.no_grad()
def adamw_ema_step_reference_(
    student: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    teacher: Tensor,
    *,
    offsets: Sequence[int],
    steps: Tensor,
    decayed: Tensor,
    frozen: Tensor,
    nonfinite: Tensor,
    lr: float | Tensor,
    weight_decay: float | Tensor,
    momentum: float | Tensor,
    clip_norm: float | None = None,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    student_16: Tensor | None = None,
    teacher_16: Tensor | None = None,
) -> None:
    """`adamw_ema_step_` in plain PyTorch, a segment at a time."""
    sizes = [end - begin for begin, end in zip(offsets, offsets[1:], strict=False)]
    rows = list(zip(*(x.split(sizes) for x in (student, grad, exp_avg, exp_avg_sq, teacher)), strict=True))
    norms = torch.stack([g.to(student.dtype).norm() for _, g, *_ in rows])
    nonfinite.copy_((~(norms.isfinite() | frozen)).any())
    if nonfinite:
        return
    for i, (s, g, m1, m2, t) in enumerate(rows):
        if not frozen[i]:
            steps[i] += 1
            g = g.to(s.dtype)
            if clip_norm is not None:
                g = g * (clip_norm / (norms[i] + 1e-6)).clamp(max=1)
            m1.mul_(betas[0]).add_((1 - betas[0]) * g)
            m2.mul_(betas[1]).add_((1 - betas[1]) * g * g)
            n = steps[i].item()
            s.mul_(1 - lr * weight_decay * decayed[i])
            s.sub_(lr / (1 - betas[0] ** n) * m1 / ((m2 / (1 - betas[1] ** n)).sqrt() + eps))
        t.mul_(momentum).add_((1 - momentum) * s)
    for copy, weights in ((student_16, student), (teacher_16, teacher)):
        if copy is not None:
            copy.copy_(weights)


def _check(student, grad, exp_avg, exp_avg_sq, teacher, student_16, teacher_16, offsets) -> None:
    halves = (torch.float16, torch.bfloat16)
    allowed = {
        "student": (student, (torch.float32,)),
        "grad": (grad, tuple(DTYPES)),
        "exp_avg": (exp_avg, (torch.float32,)),
        "exp_avg_sq": (exp_avg_sq, (torch.float32,)),
        "teacher": (teacher, (torch.float32,)),
        "student_16": (student_16, halves),
        "teacher_16": (teacher_16, halves),
    }
    for name, (x, dtypes) in allowed.items():
        if x is not None and (x.shape != (student.numel(),) or not x.is_contiguous() or x.dtype not in dtypes):
            raise ValueError(
                f"{name} must be contiguous, of shape [{student.numel()}] and dtype "
                f"{' or '.join(str(dtype).removeprefix('torch.') for dtype in dtypes)}, "
                f"got shape {list(x.shape)}, strides {list(x.stride())}, {x.dtype}"
            )
        if x is not None and x.device != student.device:
            raise ValueError(f"{name} must be on {student.device} as student, got {x.device}")
    rising = all(begin < end for begin, end in zip(offsets, offsets[1:], strict=False))
    if len(offsets) < 2 or offsets[0] != 0 or offsets[-1] != student.numel() or not rising:
        raise ValueError(
            f"offsets must rise from 0 to the number of elements {student.numel()}, "
            f"got {offsets[:4]}...{offsets[-1:]} ({len(offsets)} of them)"
        )


def _check_segments(student, offsets, steps, decayed, frozen, nonfinite) -> None:
    shape = [len(offsets) - 1]
    for name, x, dtype, wanted in (
        ("steps", steps, torch.int64, shape),
        ("decayed", decayed, torch.bool, shape),
        ("frozen", frozen, torch.bool, shape),
        ("nonfinite", nonfinite, torch.int32, []),
    ):
        if list(x.shape) != wanted or x.dtype != dtype or x.device != student.device or not x.is_contiguous():
            raise ValueError(
                f"{name} must have shape {wanted}, dtype {str(dtype).removeprefix('torch.')} and be contiguous on "
                f"{student.device}, got {list(x.shape)}, {x.dtype} on {x.device}"
            )


def _rate(name: str, value: float | Tensor, device: torch.device) -> Tensor:
    return setting(name, value, device, ">= 0", lambda rate: rate >= 0)


# --- registration ------------------------------------------------------------------------------------

_WRITTEN = ("student", "exp_avg", "exp_avg_sq", "teacher", "student_16", "teacher_16", "steps", "nonfinite")


@custom_op("adamw_ema_step_", mutates_args=_WRITTEN)
def _step_(
    student: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    teacher: Tensor,
    student_16: Tensor | None,
    teacher_16: Tensor | None,
    offsets: list[int],
    steps: Tensor,
    decayed: Tensor,
    frozen: Tensor,
    nonfinite: Tensor,
    lr: Tensor,
    weight_decay: Tensor,
    momentum: Tensor,
    clip_norm: float,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    _step_cpu(
        student, grad, exp_avg, exp_avg_sq, teacher, student_16, teacher_16, offsets, steps, decayed, frozen,
        nonfinite, lr, weight_decay, momentum, clip_norm, beta1, beta2, eps,
    )  # fmt: skip


@_step_.register_kernel("cuda")
def _(student, *others):
    with torch.cuda.device(student.device):  # Triton launches on the current device
        _step_triton(student, *others)


# --- CPU ---------------------------------------------------------------------------------------------


def _step_cpu(
    student, grad, exp_avg, exp_avg_sq, teacher, student_16, teacher_16, offsets, steps, decayed, frozen,
    nonfinite, lr, weight_decay, momentum, clip_norm, beta1, beta2, eps,
):  # fmt: skip
    copies = [0 if copy is None else copy.data_ptr() for copy in (student_16, teacher_16)]
    nonfinite.fill_(
        _C.adamw_ema_step(
            [x.data_ptr() for x in (student, grad, exp_avg, exp_avg_sq, teacher)] + copies,
            [DTYPES[grad.dtype]] + [0 if copy is None else DTYPES[copy.dtype] for copy in (student_16, teacher_16)],
            offsets,
            [x.data_ptr() for x in (steps, decayed, frozen)],
            [float(x) for x in (lr, weight_decay, momentum, clip_norm, beta1, beta2, eps)],
            torch.get_num_threads(),
        )
    )


# --- GPU: partial norms a block; a program a segment; the update -------------------------------------

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


def _step_triton(
    student, grad, exp_avg, exp_avg_sq, teacher, student_16, teacher_16, offsets, steps, decayed, frozen,
    nonfinite, lr, weight_decay, momentum, clip_norm, beta1, beta2, eps,
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
