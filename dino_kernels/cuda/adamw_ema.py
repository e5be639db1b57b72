"""The CUDA C++ kernels of adamw_ema_step_, csrc/cuda/adamw_ema.cu."""

from dino_kernels._core import backends
from dino_kernels._core.native import DTYPES, address, dtype_of

__all__ = ["step_cuda"]


def step_cuda(
    student, grad, exp_avg, exp_avg_sq, teacher, student_16, teacher_16, student_rows, teacher_rows, offsets, steps,
    decayed, frozen, nonfinite, lr, weight_decay, momentum, clip_norm, beta1, beta2, eps, cleared, lr_scale,
    clip_groups,
):  # fmt: skip
    segments = len(offsets) - 1
    partials, factors = student.new_empty(len(student) // 4096 + segments), student.new_empty(segments, 4)
    squares = None if clip_groups is None else student.new_empty(segments)
    rows, channels = (0, 0) if student_rows is None else student_rows.shape
    backends.kernels().adamw_ema_step(
        student=student.data_ptr(),
        grad=grad.data_ptr(),
        exp_avg=exp_avg.data_ptr(),
        exp_avg_sq=exp_avg_sq.data_ptr(),
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
        steps=steps.data_ptr(),
        decayed=decayed.data_ptr(),
        frozen=frozen.data_ptr(),
        lr_scale=address(lr_scale),
        clip_groups=address(clip_groups),
        nonfinite=nonfinite.data_ptr(),
        partials=partials.data_ptr(),
        factors=factors.data_ptr(),
        squares=address(squares),
        cleared=cleared,
        rows=rows,
        channels=channels,
        lr=backends.given(lr),
        weight_decay=backends.given(weight_decay),
        momentum=backends.given(momentum),
        clip_norm=clip_norm,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        stream=backends.stream(),
    )
