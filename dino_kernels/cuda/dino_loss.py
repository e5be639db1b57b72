"""The CUDA C++ kernels of dino_loss, csrc/cuda/dino_loss.cu."""

import torch

from dino_kernels._core import backends
from dino_kernels._core.native import DTYPES

__all__ = ["forward_cuda", "scale_cuda"]


def forward_cuda(student, teacher, center, student_temp, teacher_temp, grad):
    center = center.contiguous()
    (rows, outputs), batch = student.shape, teacher.shape[0] // 2
    loss, batch_center = center.new_empty(()), torch.empty_like(center)
    partials = center.new_empty(2 * batch, 2, -(-outputs // 256))
    target_dtype = torch.float32 if student.dtype == torch.float32 else torch.float16
    targets = center.new_empty(3, batch, -(-outputs // 8) * 8, dtype=target_dtype)
    losses, arrived = center.new_empty(rows), center.new_empty((), dtype=torch.int32)
    tensors = (student, teacher, center, grad, batch_center, loss, partials, targets, losses, arrived)
    backends.kernels().dino_loss(
        [x.data_ptr() for x in tensors],
        [rows // batch, batch, outputs, student.stride(0), teacher.stride(0), grad.stride(0)],
        [DTYPES[student.dtype], DTYPES[teacher.dtype]],
        backends.given(student_temp),
        backends.given(teacher_temp),
        backends.stream(),
    )
    return loss, batch_center


def scale_cuda(grad, upstream):
    backends.kernels().dino_loss_scale(
        grad.data_ptr(), *grad.shape, grad.stride(0), DTYPES[grad.dtype], backends.given(upstream), backends.stream()
    )
