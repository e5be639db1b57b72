"""The CUDA C++ kernels of adamw_ema_step_, csrc/cuda/adamw_ema.cu."""

from dino_kernels._core import backends
from dino_kernels._core.native import DTYPES, address

__all__ = ["step_cuda"]


def step_cuda(
    student, grad, exp_avg, exp_avg_sq, teacher, student_16, teacher_16, student_rows, teacher_rows, offsets, steps,
    decayed, frozen, nonfinite, lr, weight_decay, momentum, clip_norm, beta1, beta2, eps, cleared,
):  # fmt: skip
    segments = len(offsets) - 1
    partials, factors = student.new_empty(len(student) // 4096 + segments), student.new_empty(segments, 4)
    flat = (student, grad, exp_avg, exp_avg_sq, teacher, student_16, teacher_16, student_rows, teacher_rows)
    backends.kernels().adamw_ema_step(
        [address(x) for x in (*flat, steps, decayed, frozen, nonfinite, partials, factors)],
        [0 if x is None else DTYPES[x.dtype] for x in (grad, student_16, teacher_16, student_rows)],
        offsets,
        [cleared, *((0, 0) if student_rows is None else student_rows.shape)],
        [backends.given(x) for x in (lr, weight_decay, momentum)],
        [clip_norm, beta1, beta2, eps],
        backends.stream(),
    )
