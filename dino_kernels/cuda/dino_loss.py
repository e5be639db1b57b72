"""The CUDA C++ kernels of dino_loss, csrc/cuda/dino_loss.cu."""

import torch

from dino_kernels._core import backends
from dino_kernels._core.native import DTYPES

__all__ = ["forward_cuda", "scale_cuda"]


def forward_cuda(student, teacher, center, student_temp, teacher_temp, grad):
    (rows, outputs), batch = student.shape, teacher.shape[0] // 2
    loss, batch_center = center.new_empty(()), center.new_empty(outputs)
    partials = center.new_empty(2 * batch, 2, -(-outputs // 256))
    target_dtype = torch.float32 if student.dtype == torch.float32 else torch.float16
    targets = center.new_empty(3, batch, -(-outputs // 8) * 8, dtype=target_dtype)
    losses, arrived = center.new_empty(rows), center.new_empty((), dtype=torch.int32)
    backends.kernels().dino_loss(
        student=student.data_ptr(),
        teacher=teacher.data_ptr(),
        center=center.data_ptr(),
        grad=grad.data_ptr(),
        batch_center=batch_center.data_ptr(),
        loss=loss.data_ptr(),
        partials=partials.data_ptr(),
        targets=targets.data_ptr(),
        losses=losses.data_ptr(),
        arrived=arrived.data_ptr(),
        views=rows // batch,
        batch=batch,
        outputs=outputs,
        student_stride=student.stride(0),
        teacher_stride=teacher.stride(0),
        center_stride=center.stride(0),
        grad_stride=grad.stride(0),
        student_dtype=DTYPES[student.dtype],
        teacher_dtype=DTYPES[teacher.dtype],
        student_temp=backends.given(student_temp),
        teacher_temp=backends.given(teacher_temp),
        stream=backends.stream(),
    )
    return loss, batch_center


def scale_cuda(grad, upstream):
    backends.kernels().dino_loss_scale(
        grad=grad.data_ptr(),
        rows=grad.shape[0],
        outputs=grad.shape[1],
        stride=grad.stride(0),
        dtype=DTYPES[grad.dtype],
        upstream=backends.given(upstream),
        stream=backends.stream(),
    )
