"""Everything after the backward pass in one pass over memory: clip, AdamW, the teacher's EMA and 16-bit copies.

All parameters lie in flat buffers of N elements; segment i, one parameter tensor, is [offsets[i], offsets[i+1]).
Per segment that is not frozen, with its own step count n (from 1), and then for every segment:

    g  = grad min(1, clip_norm / (|grad| + 1e-6))                        |grad| the segment's L2 norm, or its group's
    m1 = beta1 m1 + (1 - beta1) g        m2 = beta2 m2 + (1 - beta2) g^2
    s  = s (1 - lr weight_decay) - lr / (1 - beta1^n) m1 / (sqrt(m2 / (1 - beta2^n)) + eps)         lr times lr_scale
    t  = momentum t + (1 - momentum) s
    w_k = g_k v_k / |v_k|                                                of a weight-normed layer of both nets

36 bytes a float32 parameter, and 4 for the norms; the reference's separate loops move about 125.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dino_kernels._core.native import _C, address
from dino_kernels._core.registry import custom_op
from dino_kernels.ops.ema_update import momentum_tensor
from dino_kernels.ops.flat_step import check, rate, step_cpu, step_reference_

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
    lr_scale: Tensor | None = None,
    clip_norm: float | None = None,
    clip_groups: Tensor | None = None,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    student_16: Tensor | None = None,
    teacher_16: Tensor | None = None,
    rows: tuple[Tensor, Tensor] | None = None,
    cleared: int = 0,
) -> None:
    """One optimizer step of the student and one of the teacher, in place; on a GPU without a device-to-host sync.

    Formula in the module's docstring; main_dino.py:325-350, utils.py:132-141 and torch.optim.AdamW. Computed in
    float32; a repeated call on the same values is bitwise equal. If the norm of a segment's gradient is infinite or
    NaN, or on a GPU that of a group's, nothing is changed but `nonfinite`, and the gradient is cleared.

    Args:
        student, exp_avg, exp_avg_sq, teacher: float32 [N], contiguous: weights, both moments, the teacher's weights.
        grad: [N], contiguous; float32, float16 or bfloat16. Zero where segments are padded.
        offsets: S+1 sorted bounds of the segments, from 0 to N, none empty; multiples of 16 give the widest
            memory accesses.
        steps: int64 [S], how often each segment was updated; incremented.
        decayed: bool [S], where weight decay applies.
        frozen: bool [S], segments without gradient (the reference's last layer at first, weights that are never
            trained): `grad` is ignored there, and only teacher and copies are updated.
        nonfinite: int32 0-d, set to 1 if the step was refused, else to 0.
        lr, weight_decay: floats >= 0 or 0-d tensors on the device of the others.
        momentum: of the teacher, in [0, 1], float or 0-d tensor (1 - momentum is formed in its precision).
        lr_scale: float32 [S], contiguous, factors of lr; of what is subtracted as weight decay too, since that is
            lr weight_decay s. None: 1. For the layer decay of DINOv2 (its apply_optim_scheduler, train/train.py).
        clip_norm: largest L2 norm of a segment's gradient, > 0; None does not clip.
        clip_groups: int64 [S], contiguous, any numbers: segments of the same number are clipped together, by the norm
            of the gradients of all of them that are not frozen (torch.nn.utils.clip_grad_norm_; DINOv2 has a group for
            the backbone and one for each head). None: each by itself. Needs a clip_norm.
        betas, eps: of AdamW.
        student_16, teacher_16: [N] float16 or bfloat16, receive the rounded new weights.
        rows: student's and teacher's rows w_k = g_k v_k / |v_k| of a weight-normed layer, written from the new weights;
            its v are the last segment, K * D long, and its g the one before, K long (both may be padded). [K, D] each,
            D <= 4096, of one dtype of float32, float16 and bfloat16, contiguous. They may lie where the last segment's
            16-bit copies do, which are then not to be relied on.
        cleared: of how many segments, from the first on, the gradient becomes zero; 0 to S, or to S - 1 with rows. In
            the same pass over memory it costs next to nothing.

    Raises:
        ValueError: an argument that does not fit the above.
    """
    offsets = list(offsets)
    check(
        student,
        grad,
        teacher,
        student_16,
        teacher_16,
        rows,
        moments={"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq},
        offsets=offsets,
        segments={
            "steps": (steps, torch.int64),
            "decayed": (decayed, torch.bool),
            "frozen": (frozen, torch.bool),
            "lr_scale": (lr_scale, torch.float32),
            "clip_groups": (clip_groups, torch.int64),
        },
        nonfinite=nonfinite,
        clip_norm=clip_norm,
        cleared=cleared,
    )
    if not (0 <= betas[0] < 1 and 0 <= betas[1] < 1 and eps >= 0):
        raise ValueError(f"betas must be in [0, 1) and eps >= 0, got {betas} and {eps}")
    if clip_groups is not None and clip_norm is None:
        raise ValueError("clip_groups needs a clip_norm, got None")
    student_rows, teacher_rows = rows or (None, None)
    torch.ops.dino_kernels.adamw_ema_step_(
        student,
        grad,
        exp_avg,
        exp_avg_sq,
        teacher,
        student_16,
        teacher_16,
        student_rows,
        teacher_rows,
        offsets,
        steps,
        decayed,
        frozen,
        nonfinite,
        rate("lr", lr, student.device),
        rate("weight_decay", weight_decay, student.device),
        momentum_tensor(momentum, student.device),
        clip_norm or 0.0,
        *betas,
        eps,
        cleared,
        lr_scale,
        clip_groups,
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
    lr_scale: Tensor | None = None,
    clip_norm: float | None = None,
    clip_groups: Tensor | None = None,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    student_16: Tensor | None = None,
    teacher_16: Tensor | None = None,
    rows: tuple[Tensor, Tensor] | None = None,
    cleared: int = 0,
) -> None:
    """`adamw_ema_step_` in plain PyTorch, a segment at a time."""

    def update(i: int, s: Tensor, g: Tensor, m1: Tensor, m2: Tensor) -> None:
        steps[i] += 1
        m1.mul_(betas[0]).add_((1 - betas[0]) * g)
        m2.mul_(betas[1]).add_((1 - betas[1]) * g * g)
        n = steps[i].item()
        rate = lr if lr_scale is None else lr * lr_scale[i].to(s.dtype)
        s.mul_(1 - rate * weight_decay * decayed[i])
        s.sub_(rate / (1 - betas[0] ** n) * m1 / ((m2 / (1 - betas[1] ** n)).sqrt() + eps))

    step_reference_(
        update,
        student,
        grad,
        (exp_avg, exp_avg_sq),
        teacher,
        offsets=offsets,
        frozen=frozen,
        nonfinite=nonfinite,
        momentum=momentum,
        clip_norm=clip_norm,
        clip_groups=clip_groups,
        student_16=student_16,
        teacher_16=teacher_16,
        rows=rows,
        cleared=cleared,
    )


# --- registration ------------------------------------------------------------------------------------

_WRITTEN = (
    *("student", "grad", "exp_avg", "exp_avg_sq", "teacher"),
    *("student_16", "teacher_16", "student_rows", "teacher_rows", "steps", "nonfinite"),
)


@custom_op(
    "adamw_ema_step_",
    mutates_args=_WRITTEN,
    triton="adamw_ema.step_triton",
    cuda="adamw_ema.step_cuda",
)
def _step_(
    student: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    teacher: Tensor,
    student_16: Tensor | None,
    teacher_16: Tensor | None,
    student_rows: Tensor | None,
    teacher_rows: Tensor | None,
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
    cleared: int,
    lr_scale: Tensor | None,
    clip_groups: Tensor | None,
) -> None:
    _step_cpu(
        student, grad, exp_avg, exp_avg_sq, teacher, student_16, teacher_16, student_rows, teacher_rows, offsets,
        steps, decayed, frozen, nonfinite, lr, weight_decay, momentum, clip_norm, beta1, beta2, eps, cleared,
        lr_scale, clip_groups,
    )  # fmt: skip


# --- CPU ---------------------------------------------------------------------------------------------


def _step_cpu(
    student, grad, exp_avg, exp_avg_sq, teacher, student_16, teacher_16, student_rows, teacher_rows, offsets, steps,
    decayed, frozen, nonfinite, lr, weight_decay, momentum, clip_norm, beta1, beta2, eps, cleared, lr_scale,
    clip_groups,
):  # fmt: skip
    step_cpu(
        _C.adamw_ema_step, student, grad, teacher, student_16, teacher_16, student_rows, teacher_rows, offsets,
        decayed, frozen, nonfinite, lr, weight_decay, momentum, clip_norm, cleared,
        exp_avg=exp_avg.data_ptr(), exp_avg_sq=exp_avg_sq.data_ptr(), steps=steps.data_ptr(),
        lr_scale=address(lr_scale), clip_groups=address(clip_groups), beta1=beta1, beta2=beta2, eps=eps,
    )  # fmt: skip
