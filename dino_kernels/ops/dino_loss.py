"""The DINO loss with its gradient in one pass.

    q_u  = softmax((t_u - c_u) / teacher_temp)                                u in {0, 1}
    loss = 1 / (N B) * sum_b sum_v sum_{u != v} -<q_u, log_softmax(s_v / student_temp)>,    N = 2 V - 2
    batch_center = mean over u, b of t_u                                      (raw rows, before centering)

An image's pairs collapse: with n_v targets for view v (1 for the two global views, else 2) and qbar_v their sum,

    loss     = 1 / (N B) * sum_{b,v} [n_v logsumexp(s_v / temp) - <qbar_v, s_v> / temp]
    dL/ds_v  = (n_v softmax(s_v / temp) - qbar_v) / (temp N B)

so the gradient is known as soon as a student row's statistics are: it is written by the forward pass. In DINO both
teacher views have the same center. With c_u of `sinkhorn_center` and the student's own logits as the teacher's, it is
the loss of SwAV (Caron et al. 2020, section 3.2).

Dimensions: V views an image (2 global first, then local), B images, K outputs; row v * B + b is view v of image b.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dino_kernels._core.backends import GpuKernel
from dino_kernels._core.native import _C, DTYPES, reused_empty, setting
from dino_kernels._core.registry import custom_op, once_differentiable

__all__ = ["dino_loss", "dino_loss_reference"]


def dino_loss(
    student: Tensor,
    teacher: Tensor,
    center: Tensor,
    *,
    student_temp: float | Tensor = 0.1,
    teacher_temp: float | Tensor = 0.04,
    inplace: bool = False,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy between centered, sharpened teacher outputs and student outputs over all pairs of views.

    Formula in the module's docstring; Caron et al. 2021, section 3.1 and algorithm 1, main_dino.py:379-416.
    Statistics are float32; a repeated call is bitwise equal. Gradients flow to `student` alone, as in the
    reference. The forward pass keeps one tensor, that gradient; the first backward pass takes it over, so
    a second backward through the same call (retain_graph) is refused. It has the dtype of `student`: a float16
    gradient is rounded before a loss scale reaches it, so prefer bfloat16 or float32.

    Args:
        student: logits [V*B, K], view-major, V >= 2; float32, float16 or bfloat16; rows may be strided.
        teacher: logits [2*B, K] of the global views, view-major; as `student`, of any of the three dtypes.
        center: [K] or [1, K], or [2, K] with a row for each teacher view; float32.
        student_temp: temperature > 0, a float or a 0-d tensor (read on its device: no synchronization).
        teacher_temp: the same for the teacher.
        inplace: write the gradient over `student`, whose logits are lost, and so need no memory of that size.
            Under torch.compile the memory is the compiler's to plan, and `student` stays as it was. `teacher` may not
            lie between the first and the last logit of `student`.

    Returns:
        loss: float32 scalar, the mean over the 2V-2 pairs and B.
        batch_center: float32 [K], mean of the raw teacher rows. The caller folds it into its center, after
            the loss as in the reference: center = 0.9 * center + 0.1 * batch_center.

    Raises:
        ValueError: a shape, dtype, device or temperature that does not fit the above; `inplace` with rows of
            `student` that overlap each other or `teacher`.
    """
    _check(student, teacher, center)
    student_temp = temperature("student_temp", student_temp, student.device)
    teacher_temp = temperature("teacher_temp", teacher_temp, student.device)
    centers = center.detach().view(-1, student.shape[1]).contiguous().expand(2, -1)
    inputs = student, teacher.detach(), centers, student_temp, teacher_temp
    if inplace:
        check_overwritten(student, teacher)
        if not torch.compiler.is_compiling():
            return _InPlace.apply(*inputs)
    return torch.ops.dino_kernels.dino_loss(*inputs)[:2]


def dino_loss_reference(
    student: Tensor,
    teacher: Tensor,
    center: Tensor,
    *,
    student_temp: float | Tensor = 0.1,
    teacher_temp: float | Tensor = 0.04,
) -> tuple[Tensor, Tensor]:
    """`dino_loss` in plain PyTorch, term by term as main_dino.py:379-416 states it."""
    batch = teacher.shape[0] // 2
    students = (student / student_temp).split(batch)
    centers = center.view(-1, teacher.shape[1]).expand(2, -1).repeat_interleave(batch, dim=0)
    targets = ((teacher.detach() - centers) / teacher_temp).softmax(dim=-1).split(batch)
    terms = [
        (-q * s.log_softmax(dim=-1)).sum(dim=-1).mean()
        for u, q in enumerate(targets)
        for v, s in enumerate(students)
        if u != v
    ]
    return torch.stack(terms).mean(), teacher.detach().mean(
        dim=0, dtype=torch.promote_types(teacher.dtype, torch.float32)
    )


def _check(student: Tensor, teacher: Tensor, center: Tensor) -> None:
    for name, views, x in (("student", "V", student), ("teacher", "2", teacher)):
        if x.ndim != 2 or x.dtype not in DTYPES or x.stride(1) != 1:
            raise ValueError(
                f"{name} must have shape [{views}*B, K], dtype float32, float16 or bfloat16 and adjacent columns "
                f"(stride 1), got shape {list(x.shape)}, {x.dtype}, strides {list(x.stride())}"
            )
    rows, outputs = teacher.shape
    if rows < 2 or rows % 2 or outputs < 1:
        raise ValueError(f"teacher must have shape [2*B, K] (two views an image), got {list(teacher.shape)}")
    if student.shape[1] != outputs or student.shape[0] < rows or student.shape[0] % (rows // 2):
        raise ValueError(
            f"student must have shape [V*B, K] with V >= 2, B = {rows // 2} and K = {outputs} as in teacher "
            f"{list(teacher.shape)}, got {list(student.shape)}"
        )
    check_center(center, outputs, most=2)
    if not student.device == teacher.device == center.device:
        raise ValueError(
            f"student, teacher, center must be on one device, got {student.device}, {teacher.device}, {center.device}"
        )


def check_overwritten(student: Tensor, teacher: Tensor) -> None:
    """Of `inplace`: rows of the student overlap neither each other nor the teacher (a compiler plans its own)."""
    if student.stride(0) < student.shape[1]:
        raise ValueError(f"inplace needs rows of student that do not overlap, got strides {list(student.stride())}")
    if torch.compiler.is_compiling():
        return
    if type(student) is not Tensor or type(teacher) is not Tensor:  # such as fake tensors, which have no memory
        return
    ranges = [
        (x.data_ptr(), x.data_ptr() + ((x.shape[0] - 1) * x.stride(0) + x.shape[1]) * x.element_size())
        for x in (student, teacher)
    ]
    (begin, end), (teacher_begin, teacher_end) = ranges
    if begin and begin < teacher_end and teacher_begin < end:  # meta tensors begin at 0
        raise ValueError(
            "inplace needs a teacher that shares no memory with student, whose logits are overwritten (pass a clone), "
            f"got addresses [{begin}, {end}) of student and [{teacher_begin}, {teacher_end}) of teacher"
        )


def check_center(center: Tensor, outputs: int, most: int) -> None:
    """most: rows that it may have, one for each teacher view."""
    shapes = [[outputs], *([rows, outputs] for rows in range(1, most + 1))]
    if list(center.shape) not in shapes or center.dtype != torch.float32:
        raise ValueError(
            f"center must have shape {' or '.join(map(str, shapes))} and dtype float32, got {list(center.shape)}, "
            f"{center.dtype}"
        )


def temperature(name: str, value: float | Tensor, device: torch.device) -> Tensor:
    """`setting` of a temperature, float32."""
    if isinstance(value, Tensor) and value.requires_grad:
        raise ValueError(f"{name} must be a float or a 0-d tensor on {device} without gradient, got {value}")
    return setting(name, value, device, "> 0", lambda temp: temp > 0).float()


# --- autograd of an op whose forward pass makes the gradient -------------------------------------------


def keep_gradient(ctx, inputs, output) -> None:
    """The setup of an op with a loss as first result, and as last one its gradient for the first input."""
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # or autograd fills a zero tensor the size of the gradient
    ctx.grad = output[-1]


def backward_of(op: str) -> Callable[..., Any]:
    """The backward of such an op. It hands over the gradient, so that a second one is refused."""

    def backward(ctx, upstream, *_):
        if ctx.grad is None:
            raise RuntimeError(f"{op}: second backward through one forward; its gradient buffer was handed over")
        grad, ctx.grad = ctx.grad, None
        if type(upstream) is Tensor:
            torch.ops.dino_kernels.dino_loss_scale_(grad, upstream)
        else:  # being traced, where a saved tensor may not be written; the compiler fuses the product
            grad = (grad * upstream).to(grad.dtype)
        return grad, *(None,) * (len(ctx.needs_input_grad) - 1)

    return backward


# --- registration ------------------------------------------------------------------------------------


_forward_gpu = GpuKernel(triton="dino_loss.forward_triton", cuda="dino_loss.forward_cuda")


@custom_op("dino_loss")
def _loss(
    student: Tensor, teacher: Tensor, center: Tensor, student_temp: Tensor, teacher_temp: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, batch_center, gradient of the loss with respect to student, in its dtype); center: [2, K], rows of stride
    1, which may be the same memory."""
    grad = reused_empty(student.shape, student.dtype)
    return *_forward_cpu(student, teacher, center, student_temp, teacher_temp, grad), grad


@_loss.register_kernel("cuda")
def _(student, teacher, center, student_temp, teacher_temp):
    grad = torch.empty(student.shape, dtype=student.dtype, device=student.device)
    return *_forward_gpu(student, teacher, center, student_temp, teacher_temp, grad), grad


@_loss.register_fake
def _(student, teacher, center, student_temp, teacher_temp):
    return center.new_empty(()), center.new_empty(student.shape[1]), student.new_empty(student.shape)


@custom_op("dino_loss_", mutates_args=("student",))
def _loss_(
    student: Tensor, teacher: Tensor, center: Tensor, student_temp: Tensor, teacher_temp: Tensor
) -> tuple[Tensor, Tensor]:
    """(loss, batch_center); the gradient takes the place of student."""
    return _forward_cpu(student, teacher, center, student_temp, teacher_temp, student)


@_loss_.register_kernel("cuda")
def _(student, teacher, center, student_temp, teacher_temp):
    return _forward_gpu(student, teacher, center, student_temp, teacher_temp, student)


@_loss_.register_fake
def _(student, teacher, center, student_temp, teacher_temp):
    return center.new_empty(()), center.new_empty(student.shape[1])


@custom_op("dino_loss_scale_", mutates_args=("grad",), triton="dino_loss.scale_triton", cuda="dino_loss.scale_cuda")
def _scale_(grad: Tensor, upstream: Tensor) -> None:
    """grad *= upstream. No pass over memory for the usual upstream of one, and on a GPU no device-to-host sync."""
    _scale_cpu(grad, upstream)


_loss.register_autograd(backward_of("dino_loss"), setup_context=keep_gradient)


class _InPlace(torch.autograd.Function):
    """`_loss_` with its gradient: torch.library has no autograd formula for an op that writes its input."""

    @staticmethod
    def forward(ctx, student, *others):
        loss, batch_center = torch.ops.dino_kernels.dino_loss_(student, *others)
        keep_gradient(ctx, None, (loss, batch_center, student.detach()))
        return loss, batch_center

    backward = staticmethod(
        once_differentiable("dino_loss", "dino_kernels.dino_loss_reference")(backward_of("dino_loss"))
    )


# --- CPU ---------------------------------------------------------------------------------------------


def _forward_cpu(student, teacher, center, student_temp, teacher_temp, grad):
    batch_center = center.new_empty(student.shape[1])
    batch = teacher.shape[0] // 2
    loss = _C.dino_loss(
        student=student.data_ptr(),
        teacher=teacher.data_ptr(),
        center=center.data_ptr(),
        grad=grad.data_ptr(),
        batch_center=batch_center.data_ptr(),
        views=student.shape[0] // batch,
        batch=batch,
        outputs=student.shape[1],
        student_stride=student.stride(0),
        teacher_stride=teacher.stride(0),
        center_stride=center.stride(0),
        grad_stride=grad.stride(0),
        student_dtype=DTYPES[student.dtype],
        teacher_dtype=DTYPES[teacher.dtype],
        student_temp=float(student_temp),
        teacher_temp=float(teacher_temp),
        threads=torch.get_num_threads(),
    )
    return torch.tensor(loss, dtype=torch.float32, device="cpu"), batch_center


def _scale_cpu(grad, upstream):
    if upstream != 1:
        grad.mul_(upstream)
