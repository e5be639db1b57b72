"""The last layer and the DINO loss in one op, whose logits [rows, K] need never be stored.

    s_v = W z_v,  t_u = W' z'_u                              the logits of `dino_loss`; its formula and notation
    m_u = sum_k q_uk W_k        o_v = sum_k p_vk W_k         with p_v = softmax(s_v / student_temp)

The layer is linear, so that the gradients need only averages of its rows, as in flash attention with W as keys and
as values, and the batch center is the layer's output for the mean row:

    <q_u, s_v> = <z_v, m_u>                                  dL/dz_v = (n_v o_v - sum_{u != v} m_u) / (temp N B)
    dL/dW_k = sum_b [sum_v n_v p_vk z_v - sum_u q_uk sum_{v != u} z_v] / (temp N B)
    batch_center = W' mean(z'_u)

Dimensions: V views of B images (row v * B + b is view v of image b), D channels of the bottleneck, K outputs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dino_kernels._core.native import _C, DTYPES, reused_empty
from dino_kernels._core.registry import custom_op
from dino_kernels.ops.dino_loss import check_center, dino_loss, dino_loss_reference, temperature

__all__ = ["dino_head_loss", "dino_head_loss_reference"]


def dino_head_loss(
    student_z: Tensor,
    teacher_z: Tensor,
    weight_student: Tensor,
    weight_teacher: Tensor,
    center: Tensor,
    *,
    student_temp: float | Tensor = 0.1,
    teacher_temp: float | Tensor = 0.04,
    store_logits: bool = False,
) -> tuple[Tensor, Tensor]:
    """`dino_loss` of student_z weight_student^T and teacher_z weight_teacher^T.

    Caron et al. 2021, section 3.1; vision_transformer.py:283-286 followed by main_dino.py:379-416. Logits and
    statistics are float32; a repeated call is bitwise equal. Gradients flow to student_z and to weight_student (not
    computed where it requires none): pass a weight-normalized layer as g v / |v|, whose own backward is exact. Both
    gradients are made in the forward pass; the first backward takes them over and a second one is refused.

    Args:
        student_z: rows of the normalized bottleneck [V*B, D], view-major, V >= 2, D <= 256; float32, float16 or
            bfloat16 (on a GPU float32 only with store_logits: its tiles outgrow the registers).
        teacher_z: rows [2*B, D] of the global views, as student_z.
        weight_student, weight_teacher: last layers [K, D]; all four of one dtype and contiguous.
        center: [K] or [1, K], float32.
        student_temp: temperature > 0, a float or a 0-d tensor (read on its device: no synchronization).
        teacher_temp: the same for the teacher.
        store_logits: compute the logits by matrix products and keep them, 2 V B K numbers at the peak where otherwise
            few megabytes are used. Logits then have the dtype of the rows. Faster on a GPU, and on CPUs that multiply
            16-bit numbers.

    Returns:
        loss: float32 scalar, the mean over the 2V-2 pairs and B.
        batch_center: float32 [K], mean of the raw teacher logits, for center = 0.9 * center + 0.1 * batch_center.

    Raises:
        ValueError: a shape, dtype, stride, device or temperature that does not fit the above.
    """
    _check(student_z, teacher_z, weight_student, weight_teacher, center, store_logits)
    if store_logits:
        with torch.no_grad():
            teacher = F.linear(teacher_z, weight_teacher)
        student = F.linear(student_z, weight_student)
        return dino_loss(student, teacher, center, student_temp=student_temp, teacher_temp=teacher_temp, inplace=True)
    loss, batch_center, *_ = torch.ops.dino_kernels.dino_head_loss(
        student_z,
        teacher_z.detach(),
        weight_student,
        weight_teacher.detach(),
        center.detach().view(-1),
        temperature("student_temp", student_temp, student_z.device),
        temperature("teacher_temp", teacher_temp, student_z.device),
        weight_student.requires_grad and torch.is_grad_enabled(),
    )
    return loss, batch_center


def dino_head_loss_reference(
    student_z: Tensor,
    teacher_z: Tensor,
    weight_student: Tensor,
    weight_teacher: Tensor,
    center: Tensor,
    *,
    student_temp: float | Tensor = 0.1,
    teacher_temp: float | Tensor = 0.04,
) -> tuple[Tensor, Tensor]:
    """`dino_head_loss` in plain PyTorch."""
    student, teacher = F.linear(student_z, weight_student), F.linear(teacher_z, weight_teacher)
    return dino_loss_reference(student, teacher, center, student_temp=student_temp, teacher_temp=teacher_temp)


def _check(
    student_z: Tensor,
    teacher_z: Tensor,
    weight_student: Tensor,
    weight_teacher: Tensor,
    center: Tensor,
    store_logits: bool,
) -> None:
    named = {
        "student_z": student_z,
        "teacher_z": teacher_z,
        "weight_student": weight_student,
        "weight_teacher": weight_teacher,
    }
    for name, x in named.items():
        if x.ndim != 2 or x.dtype not in DTYPES or x.dtype != student_z.dtype or not x.is_contiguous():
            raise ValueError(
                f"{name} must be a contiguous matrix of float32, float16 or bfloat16, of the dtype of student_z, "
                f"got shape {list(x.shape)}, {x.dtype}, strides {list(x.stride())}; student_z is {student_z.dtype}"
            )
    outputs, channels = weight_student.shape
    if outputs < 1 or not 1 <= channels <= 256 or weight_teacher.shape != weight_student.shape:
        raise ValueError(
            "weight_student and weight_teacher must have one shape [K, D] with 1 <= D <= 256, "
            f"got {list(weight_student.shape)} and {list(weight_teacher.shape)}"
        )
    rows = teacher_z.shape[0]
    if rows < 2 or rows % 2 or teacher_z.shape[1] != channels:
        raise ValueError(
            f"teacher_z must have shape [2*B, D] (two views an image) with D = {channels} as in weight_student, "
            f"got {list(teacher_z.shape)}"
        )
    if student_z.shape[1] != channels or student_z.shape[0] < rows or student_z.shape[0] % (rows // 2):
        raise ValueError(
            f"student_z must have shape [V*B, D] with V >= 2, B = {rows // 2} as in teacher_z and D = {channels} as in "
            f"weight_student, got {list(student_z.shape)}"
        )
    check_center(center, outputs, most=1)
    if student_z.is_cuda and student_z.dtype == torch.float32 and not store_logits:
        raise ValueError("on a GPU float32 needs store_logits=True, or pass the rows and weights in 16 bit")
    devices = {name: x.device for name, x in named.items()} | {"center": center.device}
    if len(set(devices.values())) > 1:
        raise ValueError(f"all tensors must be on one device, got {devices}")


# --- registration ------------------------------------------------------------------------------------


@custom_op("dino_head_loss", triton="dino_head_loss.forward_triton")
def _loss(
    student_z: Tensor,
    teacher_z: Tensor,
    weight_student: Tensor,
    weight_teacher: Tensor,
    center: Tensor,
    student_temp: Tensor,
    teacher_temp: Tensor,
    weight_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, batch_center, gradients of the loss for student_z and for weight_student: no rows if not wanted)"""
    return _forward_cpu(
        student_z, teacher_z, weight_student, weight_teacher, center, student_temp, teacher_temp, weight_grad
    )


@_loss.register_fake
def _(student_z, teacher_z, weight_student, weight_teacher, center, student_temp, teacher_temp, weight_grad):
    outputs, channels = weight_student.shape
    return (
        center.new_empty(()),
        center.new_empty(outputs),
        student_z.new_empty(student_z.shape),
        weight_student.new_empty(outputs if weight_grad else 0, channels),
    )


def _setup(ctx, inputs, output) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.grads = output[2:]


def _backward(ctx, upstream, *_):
    if ctx.grads is None:
        raise RuntimeError("dino_head_loss: second backward through one forward; its gradients were handed over")
    (grad_z, grad_weight), ctx.grads = ctx.grads, None
    if type(upstream) is Tensor:
        torch.ops.dino_kernels.dino_loss_scale_(grad_z, upstream)
        if len(grad_weight):
            torch.ops.dino_kernels.dino_loss_scale_(grad_weight, upstream)
    else:  # being traced, where a saved tensor may not be written
        grad_z, grad_weight = ((grad * upstream).to(grad.dtype) for grad in (grad_z, grad_weight))
    return grad_z, None, grad_weight if len(grad_weight) else None, None, None, None, None, None


_loss.register_autograd(_backward, setup_context=_setup)


# --- CPU ---------------------------------------------------------------------------------------------


def _forward_cpu(student_z, teacher_z, weight_student, weight_teacher, center, student_temp, teacher_temp, weight_grad):
    center = center.contiguous()
    (outputs, channels), batch = weight_student.shape, teacher_z.shape[0] // 2
    grad_z = torch.empty_like(student_z)
    grad_weight = reused_empty(torch.Size((outputs if weight_grad else 0, channels)), student_z.dtype)
    batch_center = torch.empty_like(center)
    loss = _C.dino_head_loss(
        student_z=student_z.data_ptr(),
        teacher_z=teacher_z.data_ptr(),
        student_w=weight_student.data_ptr(),
        teacher_w=weight_teacher.data_ptr(),
        center=center.data_ptr(),
        grad_z=grad_z.data_ptr(),
        grad_w=grad_weight.data_ptr() if weight_grad else 0,
        batch_center=batch_center.data_ptr(),
        views=student_z.shape[0] // batch,
        batch=batch,
        outputs=outputs,
        channels=channels,
        dtype=DTYPES[student_z.dtype],
        student_temp=float(student_temp),
        teacher_temp=float(teacher_temp),
        threads=torch.get_num_threads(),
    )
    return torch.tensor(loss, dtype=torch.float32, device="cpu"), batch_center, grad_z, grad_weight
