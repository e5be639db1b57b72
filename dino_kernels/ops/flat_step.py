"""What the ops of one step over flat buffers share, whatever the optimizer: checks, the CPU call, the reference."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dino_kernels._core.native import DTYPES, address, dtype_of, setting
from dino_kernels._core.results import last_segments
from dino_kernels.ops.weight_norm import weight_norm_reference_

__all__ = ["check", "rate", "step_cpu", "step_reference_"]


def check(
    student: Tensor,
    grad: Tensor,
    teacher: Tensor,
    student_16: Tensor | None,
    teacher_16: Tensor | None,
    rows: tuple[Tensor, Tensor] | None,
    *,
    moments: dict[str, Tensor],
    offsets: Sequence[int],
    segments: dict[str, tuple[Tensor | None, torch.dtype]],
    nonfinite: Tensor,
    clip_norm: float | None,
    cleared: int,
) -> None:
    """Raises ValueError where an argument does not fit, see `adamw_ema_step_`; `segments` are those of shape [S]."""
    _check_buffers(student, grad, moments, teacher, student_16, teacher_16, offsets)
    count = len(offsets) - 1
    for name, (x, dtype) in segments.items():
        if x is not None:
            _check_flags(name, x, dtype, [count], student.device)
    _check_flags("nonfinite", nonfinite, torch.int32, [], student.device)
    if rows is not None:
        _check_rows(student, offsets, *rows)
    if not 0 <= cleared <= (most := count - (rows is not None)):
        raise ValueError(f"cleared must be from 0 to {most} segments, got {cleared}")
    if clip_norm is not None and not clip_norm > 0:
        raise ValueError(f"clip_norm must be > 0 or None, got {clip_norm}")


def rate(name: str, value: float | Tensor, device: torch.device) -> Tensor:
    """`setting` of a learning rate or weight decay."""
    return setting(name, value, device, ">= 0", lambda rate: rate >= 0)


def _check_buffers(student, grad, moments, teacher, student_16, teacher_16, offsets) -> None:
    halves = (torch.float16, torch.bfloat16)
    allowed = {
        "student": (student, (torch.float32,)),
        "grad": (grad, tuple(DTYPES)),
        **{name: (x, (torch.float32,)) for name, x in moments.items()},
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


def _check_flags(name, x, dtype, wanted, device) -> None:
    if list(x.shape) != wanted or x.dtype != dtype or x.device != device or not x.is_contiguous():
        raise ValueError(
            f"{name} must have shape {wanted}, dtype {str(dtype).removeprefix('torch.')} and be contiguous on "
            f"{device}, got {list(x.shape)}, {x.dtype} on {x.device}"
        )


def _check_rows(student, offsets, *both) -> None:
    room = (offsets[-2] - offsets[-3], offsets[-1] - offsets[-2]) if len(offsets) > 2 else (0, 0)
    for rows in both:
        fits = rows.ndim == 2 and len(rows) <= room[0] and rows.numel() <= room[1] and 1 <= rows.shape[1] <= 4096
        same = rows.shape == both[0].shape and rows.dtype == both[0].dtype and rows.device == student.device
        if not fits or not same or rows.dtype not in DTYPES or not rows.is_contiguous():
            raise ValueError(
                "rows must be two contiguous tensors [K, D] of one dtype on the device of student, D <= 4096, K and "
                f"K * D at most the lengths of the last two segments, {room[0]} and {room[1]}; "
                f"got {[(list(x.shape), x.dtype, str(x.device)) for x in both]}"
            )


def step_cpu(
    function: Callable[..., bool],
    student, grad, teacher, student_16, teacher_16, student_rows, teacher_rows, offsets, decayed, frozen, nonfinite,
    lr, weight_decay, momentum, clip_norm, cleared,
    **own: Any,
) -> None:  # fmt: skip
    """Calls `function` of the compiled module with the shared arguments and the op's own."""
    rows, channels = (0, 0) if student_rows is None else student_rows.shape
    refused = function(
        student=student.data_ptr(),
        grad=grad.data_ptr(),
        teacher=teacher.data_ptr(),
        student_16=address(student_16),
        teacher_16=address(teacher_16),
        student_rows=address(student_rows),
        teacher_rows=address(teacher_rows),
        grad_dtype=DTYPES[grad.dtype],
        student_16_dtype=dtype_of(student_16),
        teacher_16_dtype=dtype_of(teacher_16),
        rows_dtype=dtype_of(student_rows),
        offsets=offsets,
        decayed=decayed.data_ptr(),
        frozen=frozen.data_ptr(),
        lr=float(lr),
        weight_decay=float(weight_decay),
        momentum=float(momentum),
        clip_norm=clip_norm,
        rows=rows,
        channels=channels,
        cleared=cleared,
        threads=torch.get_num_threads(),
        **own,
    )
    nonfinite.fill_(refused)
    if refused:
        grad[: offsets[cleared]].zero_()


def step_reference_(
    update: Callable[..., None],
    student: Tensor,
    grad: Tensor,
    moments: Sequence[Tensor],
    teacher: Tensor,
    *,
    offsets: Sequence[int],
    frozen: Tensor,
    nonfinite: Tensor,
    momentum: float | Tensor,
    clip_norm: float | None,
    clip_groups: Tensor | None = None,
    student_16: Tensor | None,
    teacher_16: Tensor | None,
    rows: tuple[Tensor, Tensor] | None,
    cleared: int,
) -> None:
    """A step in plain PyTorch. update(i, s, g, *moments) changes segment i's weights s and moments in place, with the
    clipped gradient g."""
    sizes = [end - begin for begin, end in zip(offsets, offsets[1:], strict=False)]
    segments = list(zip(*(x.split(sizes) for x in (student, grad, teacher, *moments)), strict=True))
    norms = torch.stack([g.to(student.dtype).norm() for _, g, *_ in segments])
    nonfinite.copy_((~(norms.isfinite() | frozen)).any())
    if nonfinite:
        grad[: offsets[cleared]].zero_()
        return
    for i, (s, g, t, *own) in enumerate(segments):
        if not frozen[i]:
            g = g.to(s.dtype)
            if clip_norm is not None:
                together = frozen.logical_not() & (clip_groups == clip_groups[i]) if clip_groups is not None else i
                g = g * (clip_norm / (norms[together].norm() + 1e-6)).clamp(max=1)
            update(i, s, g, *own)
        t.mul_(momentum).add_((1 - momentum) * s)
    grad[: offsets[cleared]].zero_()
    copied = offsets[-1] if rows is None else offsets[-2]
    for copy, weights in ((student_16, student), (teacher_16, teacher)):
        if copy is not None:
            copy[:copied].copy_(weights[:copied])
    for out, weights in zip(rows or (), (student, teacher), strict=False):
        weight_norm_reference_(out, *last_segments(weights, offsets, out))
