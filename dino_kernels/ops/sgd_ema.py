"""Everything after the backward pass in one pass over memory: clip, momentum SGD, LARS or LARC, the teacher's EMA and
16-bit copies.

Flat buffers and segments are those of `adamw_ema_step_`. Per segment that is not frozen, with weight decay w where it
is decayed and else 0, and then for every segment:

    g  = grad min(1, clip_norm / (|grad| + 1e-6))                        |x| an L2 norm over the segment
    d  = r (g + w s)
    r  = 1                                                               SGD: segments that are not adapted
         eta |s| / |g + w s|                                             LARS; 1 if one of the norms is 0
         eta |s| / (|g| + w |s| + eps)                                   LARC; 1 if |s| is 0, or else 0 if |g| is
    mu = momentum_sgd mu + d
    s  = s - lr mu
    t  = momentum t + (1 - momentum) s
    w_k = g_k v_k / |v_k|                                                of a weight-normed layer of both nets

28 bytes a float32 parameter; for the norms 4, and 8 where it is adapted. Separate loops move about 84 (LARS).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dino_kernels._core.native import _C
from dino_kernels._core.registry import custom_op
from dino_kernels.ops.ema_update import momentum_tensor
from dino_kernels.ops.flat_step import check, rate, step_cpu, step_reference_

__all__ = ["sgd_ema_step_", "sgd_ema_step_reference_"]


@torch.no_grad()
def sgd_ema_step_(
    student: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor,
    teacher: Tensor,
    *,
    offsets: Sequence[int],
    decayed: Tensor,
    adapted: Tensor,
    frozen: Tensor,
    nonfinite: Tensor,
    lr: float | Tensor,
    weight_decay: float | Tensor,
    momentum: float | Tensor,
    momentum_sgd: float = 0.9,
    larc: bool = False,
    eta: float = 0.001,
    eps: float = 1e-8,
    clip_norm: float | None = None,
    student_16: Tensor | None = None,
    teacher_16: Tensor | None = None,
    rows: tuple[Tensor, Tensor] | None = None,
    cleared: int = 0,
) -> None:
    """One optimizer step of the student and one of the teacher, in place; on a GPU without a device-to-host sync.

    Formula in the module's docstring. SGD is `adapted` false everywhere (torch.optim.SGD). LARS is `adapted` true of
    matrices, usually those that decay (You et al. 2017; utils.py:553-591). LARC is `larc=True` and `adapted` true of
    every segment (NVIDIA apex with clip=False, as SwAV trains). Computed in float32, |g + w s| from |g|, |s| and g . s
    with an error of about 1e-7 (|g| + w |s|); a repeated call on the same values is bitwise equal. If the norm of a
    segment's gradient is infinite or NaN, nothing is changed but `nonfinite`, and the gradient is cleared.

    Args:
        momentum_buffer: mu, float32 [N], contiguous, zero at first.
        adapted: bool [S], where r is not 1.
        momentum_sgd: in [0, 1).
        larc: LARC's r in place of LARS'.
        eta: trust coefficient of LARS and LARC, > 0.
        eps: of LARC, >= 0.
        student, grad, teacher, offsets, decayed, frozen, nonfinite, lr, weight_decay, momentum, clip_norm, student_16,
            teacher_16, rows, cleared: as of `adamw_ema_step_`.

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
        moments={"momentum_buffer": momentum_buffer},
        offsets=offsets,
        segments={"decayed": (decayed, torch.bool), "adapted": (adapted, torch.bool), "frozen": (frozen, torch.bool)},
        nonfinite=nonfinite,
        clip_norm=clip_norm,
        cleared=cleared,
    )
    if not (0 <= momentum_sgd < 1 and eta > 0 and eps >= 0):
        raise ValueError(f"momentum_sgd must be in [0, 1), eta > 0 and eps >= 0, got {momentum_sgd}, {eta} and {eps}")
    student_rows, teacher_rows = rows or (None, None)
    torch.ops.dino_kernels.sgd_ema_step_(
        student,
        grad,
        momentum_buffer,
        teacher,
        student_16,
        teacher_16,
        student_rows,
        teacher_rows,
        offsets,
        decayed,
        adapted,
        frozen,
        nonfinite,
        rate("lr", lr, student.device),
        rate("weight_decay", weight_decay, student.device),
        momentum_tensor(momentum, student.device),
        clip_norm or 0.0,
        momentum_sgd,
        larc,
        eta,
        eps,
        cleared,
    )


@torch.no_grad()
def sgd_ema_step_reference_(
    student: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor,
    teacher: Tensor,
    *,
    offsets: Sequence[int],
    decayed: Tensor,
    adapted: Tensor,
    frozen: Tensor,
    nonfinite: Tensor,
    lr: float | Tensor,
    weight_decay: float | Tensor,
    momentum: float | Tensor,
    momentum_sgd: float = 0.9,
    larc: bool = False,
    eta: float = 0.001,
    eps: float = 1e-8,
    clip_norm: float | None = None,
    student_16: Tensor | None = None,
    teacher_16: Tensor | None = None,
    rows: tuple[Tensor, Tensor] | None = None,
    cleared: int = 0,
) -> None:
    """`sgd_ema_step_` in plain PyTorch, a segment at a time."""

    def update(i: int, s: Tensor, g: Tensor, mu: Tensor) -> None:
        decay = weight_decay * decayed[i]
        d = g + decay * s
        if adapted[i] and s.norm() > 0:
            if not larc and d.norm() > 0:
                d = d * (eta * s.norm() / d.norm())
            elif larc:
                d = d * (eta * s.norm() / (g.norm() + decay * s.norm() + eps)) * (g.norm() > 0)
        mu.mul_(momentum_sgd).add_(d)
        s.sub_(lr * mu)

    step_reference_(
        update,
        student,
        grad,
        (momentum_buffer,),
        teacher,
        offsets=offsets,
        frozen=frozen,
        nonfinite=nonfinite,
        momentum=momentum,
        clip_norm=clip_norm,
        student_16=student_16,
        teacher_16=teacher_16,
        rows=rows,
        cleared=cleared,
    )


# --- registration ------------------------------------------------------------------------------------

_WRITTEN = (
    *("student", "grad", "momentum_buffer", "teacher"),
    *("student_16", "teacher_16", "student_rows", "teacher_rows", "nonfinite"),
)


@custom_op("sgd_ema_step_", mutates_args=_WRITTEN, triton="sgd_ema.step_triton")
def _step_(
    student: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor,
    teacher: Tensor,
    student_16: Tensor | None,
    teacher_16: Tensor | None,
    student_rows: Tensor | None,
    teacher_rows: Tensor | None,
    offsets: list[int],
    decayed: Tensor,
    adapted: Tensor,
    frozen: Tensor,
    nonfinite: Tensor,
    lr: Tensor,
    weight_decay: Tensor,
    momentum: Tensor,
    clip_norm: float,
    momentum_sgd: float,
    larc: bool,
    eta: float,
    eps: float,
    cleared: int,
) -> None:
    _step_cpu(
        student, grad, momentum_buffer, teacher, student_16, teacher_16, student_rows, teacher_rows, offsets,
        decayed, adapted, frozen, nonfinite, lr, weight_decay, momentum, clip_norm, momentum_sgd, larc, eta, eps,
        cleared,
    )  # fmt: skip


# --- CPU ---------------------------------------------------------------------------------------------


def _step_cpu(
    student, grad, momentum_buffer, teacher, student_16, teacher_16, student_rows, teacher_rows, offsets, decayed,
    adapted, frozen, nonfinite, lr, weight_decay, momentum, clip_norm, momentum_sgd, larc, eta, eps, cleared,
):  # fmt: skip
    step_cpu(
        _C.sgd_ema_step, student, grad, teacher, student_16, teacher_16, student_rows, teacher_rows, offsets,
        decayed, frozen, nonfinite, lr, weight_decay, momentum, clip_norm, cleared,
        momentum_buffer=momentum_buffer.data_ptr(), adapted=adapted.data_ptr(),
        momentum_sgd=momentum_sgd, larc=larc, eta=eta, eps=eps,
    )  # fmt: skip
