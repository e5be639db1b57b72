"""The loss of masked patch tokens with its gradient in one pass: iBOT's and DINOv2's.

    q_i    = softmax((t_i - c) / teacher_temp)
    loss   = sum_i w_i [logsumexp(s_i / student_temp) - <q_i, s_i> / student_temp]
    dL/ds_i = w_i (softmax(s_i / student_temp) - q_i) / student_temp
    batch_center = mean of t_i over the rows with w_i != 0                     (raw rows, before centering)

The means are in the weights: of V masked views of B images, w_i = 1 / (V B m_i) with m_i the number of masked patches
of the view of i (Zhou et al. 2022, section 3.1; Oquab et al. 2023, section 4). A row of weight 0 is padding and is not
read, so that a buffer may have a fixed length whatever the number of masked patches.

Dimensions: M rows i, each a masked patch, K outputs.
"""

import torch
from torch import Tensor

from dino_kernels._core.backends import GpuKernel
from dino_kernels._core.native import _C, DTYPES, reused_empty
from dino_kernels._core.registry import custom_op, once_differentiable
from dino_kernels.ops.dino_loss import backward_of, check_center, check_overwritten, keep_gradient, temperature

__all__ = ["patch_loss", "patch_loss_reference"]


def patch_loss(
    student: Tensor,
    teacher: Tensor,
    center: Tensor,
    *,
    weights: Tensor,
    student_temp: float | Tensor = 0.1,
    teacher_temp: float | Tensor = 0.07,
    inplace: bool = False,
) -> tuple[Tensor, Tensor]:
    """Weighted cross-entropy between centered, sharpened teacher rows and the student rows of the same patches.

    Formula in the module's docstring; Zhou et al. 2022, equation 2, main_ibot.py:538-555; DINOv2,
    loss/ibot_patch_loss.py. Statistics are float32; a repeated call is bitwise equal, and the gradient of a row does
    not depend on the other rows. Gradients flow to `student` alone. The forward pass keeps one tensor, that gradient;
    the first backward pass takes it over and a second one is refused, as of `dino_loss`.

    Args:
        student: logits [M, K], M >= 0; float32, float16 or bfloat16; rows may be strided.
        teacher: logits [M, K]; as `student`, of any of the three dtypes.
        center: [K] or [1, K], float32.
        weights: [M], float32, contiguous; finite, which is not checked. The logits of rows with weight 0 are not read,
            and their gradients are zeros.
        student_temp: temperature > 0, a float or a 0-d tensor (read on its device: no synchronization).
        teacher_temp: the same for the teacher.
        inplace: write the gradient over `student`, whose logits are lost, and so need no memory of that size; as in
            `dino_loss`.

    Returns:
        loss: float32 scalar, the sum over the rows; 0 without rows of non-zero weight.
        batch_center: float32 [K], mean of the raw teacher rows of non-zero weight; zeros if there are none.

    Raises:
        ValueError: a shape, dtype, stride, device or temperature that does not fit the above; `inplace` with rows of
            `student` that overlap each other or `teacher`.
    """
    _check(student, teacher, center, weights)
    inputs = (
        student,
        teacher.detach(),
        center.detach().view(-1).contiguous(),
        weights.detach(),
        temperature("student_temp", student_temp, student.device),
        temperature("teacher_temp", teacher_temp, student.device),
    )
    if inplace:
        check_overwritten(student, teacher)
        if not torch.compiler.is_compiling():
            return _InPlace.apply(*inputs)
    return torch.ops.dino_kernels.patch_loss(*inputs)[:2]


def patch_loss_reference(
    student: Tensor,
    teacher: Tensor,
    center: Tensor,
    *,
    weights: Tensor,
    student_temp: float | Tensor = 0.1,
    teacher_temp: float | Tensor = 0.07,
) -> tuple[Tensor, Tensor]:
    """`patch_loss` in plain PyTorch."""
    counted = weights != 0
    student, teacher, weights = student[counted], teacher.detach()[counted], weights[counted]
    q = ((teacher - center.view(1, -1)) / teacher_temp).softmax(dim=-1)
    loss = (-q * (student / student_temp).log_softmax(dim=-1)).sum(dim=-1)
    total = teacher.sum(dim=0, dtype=torch.promote_types(teacher.dtype, torch.float32))
    return (weights * loss).sum(), total / max(len(teacher), 1)


def _check(student: Tensor, teacher: Tensor, center: Tensor, weights: Tensor) -> None:
    for name, x in (("student", student), ("teacher", teacher)):
        if x.ndim != 2 or not x.shape[1] or x.dtype not in DTYPES or x.stride(1) != 1 or x.shape != student.shape:
            raise ValueError(
                f"{name} must have shape [M, K] with K >= 1, that of student, dtype float32, float16 or bfloat16 and "
                f"adjacent columns (stride 1), got shape {list(x.shape)}, {x.dtype}, strides {list(x.stride())}; "
                f"student has {list(student.shape)}"
            )
    rows, outputs = student.shape
    check_center(center, outputs, most=1)
    if list(weights.shape) != [rows] or weights.dtype != torch.float32 or not weights.is_contiguous():
        raise ValueError(
            f"weights must have shape [{rows}], dtype float32 and be contiguous, got {list(weights.shape)}, "
            f"{weights.dtype}, strides {list(weights.stride())}"
        )
    devices = {"student": student, "teacher": teacher, "center": center, "weights": weights}
    if len({x.device for x in devices.values()}) > 1:
        raise ValueError(
            f"all tensors must be on one device, got {', '.join(f'{k} on {x.device}' for k, x in devices.items())}"
        )


# --- registration ------------------------------------------------------------------------------------


_forward_gpu = GpuKernel(triton="patch_loss.forward_triton")


@custom_op("patch_loss")
def _loss(
    student: Tensor, teacher: Tensor, center: Tensor, weights: Tensor, student_temp: Tensor, teacher_temp: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, batch_center, gradient of the loss with respect to student, in its dtype)"""
    grad = reused_empty(student.shape, student.dtype)
    return *_forward_cpu(student, teacher, center, weights, student_temp, teacher_temp, grad), grad


@_loss.register_kernel("cuda")
def _(student, teacher, center, weights, student_temp, teacher_temp):
    grad = torch.empty(student.shape, dtype=student.dtype, device=student.device)
    return *_forward_gpu(student, teacher, center, weights, student_temp, teacher_temp, grad), grad


@_loss.register_fake
def _(student, teacher, center, weights, student_temp, teacher_temp):
    return center.new_empty(()), torch.empty_like(center), student.new_empty(student.shape)


@custom_op("patch_loss_", mutates_args=("student",))
def _loss_(
    student: Tensor, teacher: Tensor, center: Tensor, weights: Tensor, student_temp: Tensor, teacher_temp: Tensor
) -> tuple[Tensor, Tensor]:
    """(loss, batch_center); the gradient takes the place of student."""
    return _forward_cpu(student, teacher, center, weights, student_temp, teacher_temp, student)


@_loss_.register_kernel("cuda")
def _(student, teacher, center, weights, student_temp, teacher_temp):
    return _forward_gpu(student, teacher, center, weights, student_temp, teacher_temp, student)


@_loss_.register_fake
def _(student, teacher, center, weights, student_temp, teacher_temp):
    return center.new_empty(()), torch.empty_like(center)


_loss.register_autograd(backward_of("patch_loss"), setup_context=keep_gradient)


class _InPlace(torch.autograd.Function):
    """`_loss_` with its gradient: torch.library has no autograd formula for an op that writes its input."""

    @staticmethod
    def forward(ctx, student, *others):
        loss, batch_center = torch.ops.dino_kernels.patch_loss_(student, *others)
        keep_gradient(ctx, None, (loss, batch_center, student.detach()))
        return loss, batch_center

    backward = staticmethod(
        once_differentiable("patch_loss", "dino_kernels.patch_loss_reference")(backward_of("patch_loss"))
    )


# --- CPU ---------------------------------------------------------------------------------------------


def _forward_cpu(student, teacher, center, weights, student_temp, teacher_temp, grad):
    batch_center = torch.empty_like(center)
    loss = _C.patch_loss(
        student=student.data_ptr(),
        teacher=teacher.data_ptr(),
        center=center.data_ptr(),
        weights=weights.data_ptr(),
        grad=grad.data_ptr(),
        batch_center=batch_center.data_ptr(),
        rows=student.shape[0],
        outputs=student.shape[1],
        student_stride=student.stride(0),
        teacher_stride=teacher.stride(0),
        grad_stride=grad.stride(0),
        student_dtype=DTYPES[student.dtype],
        teacher_dtype=DTYPES[teacher.dtype],
        student_temp=float(student_temp),
        teacher_temp=float(teacher_temp),
        threads=torch.get_num_threads(),
    )
    return torch.tensor(loss, dtype=torch.float32, device="cpu"), batch_center
