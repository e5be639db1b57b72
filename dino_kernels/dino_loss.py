"""The DINO loss with its gradient in one pass.

    q_u  = softmax((t_u - c) / teacher_temp)                                  u in {0, 1}
    loss = 1 / (N B) * sum_b sum_v sum_{u != v} -<q_u, log_softmax(s_v / student_temp)>,    N = 2 V - 2
    batch_center = mean over u, b of t_u                                      (raw rows, before centering)

An image's pairs collapse: with n_v targets for view v (1 for the two global views, else 2) and qbar_v their sum,

    loss     = 1 / (N B) * sum_{b,v} [n_v logsumexp(s_v / temp) - <qbar_v, s_v> / temp]
    dL/ds_v  = (n_v softmax(s_v / temp) - qbar_v) / (temp N B)

so the gradient is known as soon as a student row's statistics are: it is written by the forward pass.

Dimensions: V views an image (2 global first, then local), B images, K outputs; row v * B + b is view v of image b.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dino_kernels._native import _C, DTYPES, reused_empty

__all__ = ["dino_loss", "dino_loss_reference"]


def dino_loss(
    student: Tensor,
    teacher: Tensor,
    center: Tensor,
    *,
    student_temp: float | Tensor = 0.1,
    teacher_temp: float | Tensor = 0.04,
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
        center: [K] or [1, K], float32.
        student_temp: temperature > 0, a float or a 0-d tensor (read on its device: no synchronization).
        teacher_temp: the same for the teacher.

    Returns:
        loss: float32 scalar, the mean over the 2V-2 pairs and B.
        batch_center: float32 [K], mean of the raw teacher rows. The caller folds it into its center, after
            the loss as in the reference: center = 0.9 * center + 0.1 * batch_center.

    Raises:
        ValueError: a shape, dtype, device or temperature that does not fit the above.
    """
    _check(student, teacher, center)
    student_temp = _temperature("student_temp", student_temp, student.device)
    teacher_temp = _temperature("teacher_temp", teacher_temp, student.device)
    loss, batch_center, _ = torch.ops.dino_kernels.dino_loss(
        student, teacher.detach(), center.detach().view(-1), student_temp, teacher_temp
    )
    return loss, batch_center


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
    targets = ((teacher.detach() - center.view(1, -1)) / teacher_temp).softmax(dim=-1).split(batch)
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
    if list(center.shape) not in ([outputs], [1, outputs]) or center.dtype != torch.float32:
        raise ValueError(
            f"center must have shape [{outputs}] or [1, {outputs}] and dtype float32, got {list(center.shape)}, "
            f"{center.dtype}"
        )
    if not student.device == teacher.device == center.device:
        raise ValueError(
            f"student, teacher, center must be on one device, got {student.device}, {teacher.device}, {center.device}"
        )


def _temperature(name: str, value: float | Tensor, device: torch.device) -> Tensor:
    if isinstance(value, Tensor):
        if value.ndim or value.requires_grad or value.device != device:
            raise ValueError(f"{name} must be a float or a 0-d tensor on {device} without gradient, got {value}")
        return value.float()
    if not value > 0:
        raise ValueError(f"{name} must be > 0, got {value}")
    return torch.full((), value, dtype=torch.float32, device=device)


# --- registration ------------------------------------------------------------------------------------


@torch.library.custom_op("dino_kernels::dino_loss", mutates_args=(), device_types="cpu")
def _loss(
    student: Tensor, teacher: Tensor, center: Tensor, student_temp: Tensor, teacher_temp: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, batch_center, gradient of the loss with respect to student, in its dtype)"""
    return _forward_cpu(student, teacher, center, student_temp, teacher_temp)


@_loss.register_kernel("cuda")
def _(student, teacher, center, student_temp, teacher_temp):
    with torch.cuda.device(student.device):  # Triton launches on the current device
        return _forward_triton(student, teacher, center, student_temp, teacher_temp)


@_loss.register_fake
def _(student, teacher, center, student_temp, teacher_temp):
    return center.new_empty(()), torch.empty_like(center), student.new_empty(student.shape)


@torch.library.custom_op("dino_kernels::dino_loss_scale_", mutates_args=("grad",), device_types="cpu")
def _scale_(grad: Tensor, upstream: Tensor) -> None:
    """grad *= upstream. No pass over memory for the usual upstream of one, and on a GPU no question to the host."""
    _scale_cpu(grad, upstream)


@_scale_.register_kernel("cuda")
def _(grad, upstream):
    with torch.cuda.device(grad.device):
        _scale_triton(grad, upstream)


def _setup(ctx, inputs, output) -> None:
    grad = output[2]
    ctx.mark_non_differentiable(output[1], grad)
    ctx.set_materialize_grads(False)  # or autograd fills a zero tensor the size of the gradient
    ctx.grad = grad


def _backward(ctx, upstream, *_):
    if ctx.grad is None:
        raise RuntimeError("dino_loss: second backward through one forward; its gradient buffer was handed over")
    grad, ctx.grad = ctx.grad, None
    if type(upstream) is Tensor:
        _scale_(grad, upstream)
    else:  # being traced, where a saved tensor may not be written; the compiler fuses the product
        grad = (grad * upstream).to(grad.dtype)
    return grad, None, None, None, None


_loss.register_autograd(_backward, setup_context=_setup)


# --- CPU ---------------------------------------------------------------------------------------------


def _forward_cpu(student, teacher, center, student_temp, teacher_temp):
    center = center.contiguous()
    grad = reused_empty(student.shape, student.dtype)
    batch_center = torch.empty_like(center)
    batch = teacher.shape[0] // 2
    loss = _C.dino_loss(
        student.data_ptr(),
        teacher.data_ptr(),
        center.data_ptr(),
        grad.data_ptr(),
        batch_center.data_ptr(),
        student.shape[0] // batch,
        batch,
        student.shape[1],
        student.stride(0),
        teacher.stride(0),
        DTYPES[student.dtype],
        DTYPES[teacher.dtype],
        float(student_temp),
        float(teacher_temp),
        torch.get_num_threads(),
    )
    return torch.tensor(loss, dtype=torch.float32), batch_center, grad


def _scale_cpu(grad, upstream):
    if upstream != 1:
        grad.mul_(upstream)


# --- GPU ---------------------------------------------------------------------------------------------


@triton.jit
def _teacher_kernel(teacher, center, temp, stats, outputs, stride, BLOCK: tl.constexpr):
    """stats[row] = (max, 1 / sum of exp(x - max)) of x = (row - center) / temp; one program a row."""
    row = tl.program_id(0)
    scale = 1.0 / tl.load(temp)
    high = tl.full((BLOCK,), -1e38, tl.float32)  # finite, so that a lane which saw nothing gives no NaN
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, outputs, BLOCK):
        k = start + tl.arange(0, BLOCK)
        mask = k < outputs
        t = tl.load(teacher + row.to(tl.int64) * stride + k, mask, other=0.0).to(tl.float32)
        x = tl.where(mask, (t - tl.load(center + k, mask, other=0.0)) * scale, float("-inf"))
        higher = tl.maximum(high, x)
        total = total * tl.exp(high - higher) + tl.exp(x - higher)
        high = higher
    top = tl.max(high, axis=0)
    tl.store(stats + 2 * row, top)
    tl.store(stats + 2 * row + 1, 1.0 / tl.sum(total * tl.exp(high - top), axis=0))


@triton.jit
def _targets(teacher, center, stats, scale, row, other_row, both, stride, k, mask):
    """qbar of one view: probabilities of teacher `row`, and of `other_row` where both are its targets."""
    c = tl.load(center + k, mask, other=0.0)
    t = tl.load(teacher + row.to(tl.int64) * stride + k, mask, other=0.0).to(tl.float32)
    q = tl.exp((t - c) * scale - tl.load(stats + 2 * row)) * tl.load(stats + 2 * row + 1)
    if both:
        t = tl.load(teacher + other_row.to(tl.int64) * stride + k, mask, other=0.0).to(tl.float32)
        q += tl.exp((t - c) * scale - tl.load(stats + 2 * other_row)) * tl.load(stats + 2 * other_row + 1)
    return q


@triton.jit
def _student_kernel(
    student, teacher, center, student_temp, teacher_temp, stats, grad, losses,
    batch, outputs, student_stride, teacher_stride, norm, BLOCK: tl.constexpr,
):  # fmt: skip
    """Loss and gradient of one student row a program: statistics in one sweep, the gradient in a second."""
    row = tl.program_id(0)
    view, image = row // batch, row % batch
    both = view >= 2
    first = tl.where(view == 0, batch + image, image)  # view 0 learns from 1, view 1 from 0, others from both
    pairs = tl.where(both, 2.0, 1.0)
    scale = 1.0 / tl.load(student_temp)
    teacher_scale = 1.0 / tl.load(teacher_temp)
    student += row.to(tl.int64) * student_stride
    grad += row.to(tl.int64) * outputs
    high = tl.full((BLOCK,), -1e38, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    dot = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, outputs, BLOCK):
        k = start + tl.arange(0, BLOCK)
        mask = k < outputs
        s = tl.load(student + k, mask, other=0.0).to(tl.float32) * scale
        q = _targets(teacher, center, stats, teacher_scale, first, batch + image, both, teacher_stride, k, mask)
        dot += tl.where(mask, q * s, 0.0)
        x = tl.where(mask, s, float("-inf"))
        higher = tl.maximum(high, x)
        total = total * tl.exp(high - higher) + tl.exp(x - higher)
        high = higher
    top = tl.max(high, axis=0)
    total_exp = tl.sum(total * tl.exp(high - top), axis=0)
    tl.store(losses + row, (pairs * (top + tl.log(total_exp)) - tl.sum(dot, axis=0)) * norm)
    for start in range(0, outputs, BLOCK):
        k = start + tl.arange(0, BLOCK)
        mask = k < outputs
        s = tl.load(student + k, mask, other=0.0).to(tl.float32) * scale
        q = _targets(teacher, center, stats, teacher_scale, first, batch + image, both, teacher_stride, k, mask)
        g = (tl.exp(s - top) * (pairs / total_exp) - q) * (scale * norm)
        tl.store(grad + k, g.to(grad.dtype.element_ty), mask)


@triton.jit
def _mean_kernel(teacher, mean, rows, outputs, stride, BLOCK: tl.constexpr):
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = k < outputs
    total = tl.zeros((BLOCK,), tl.float32)
    for row in range(rows):
        total += tl.load(teacher + tl.cast(row, tl.int64) * stride + k, mask, other=0.0).to(tl.float32)
    tl.store(mean + k, total / rows, mask)


@triton.jit
def _scale_kernel(grad, upstream, size, BLOCK: tl.constexpr):
    factor = tl.load(upstream)
    if factor != 1.0:
        i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        g = tl.load(grad + i, i < size, other=0.0).to(tl.float32)
        tl.store(grad + i, (g * factor).to(grad.dtype.element_ty), i < size)


def _forward_triton(student, teacher, center, student_temp, teacher_temp):
    center = center.contiguous()
    (rows, outputs), batch = student.shape, teacher.shape[0] // 2
    stats = center.new_empty(2 * batch, 2)
    losses = center.new_empty(rows)
    grad = torch.empty(student.shape, dtype=student.dtype, device=student.device)
    batch_center = torch.empty_like(center)
    block = min(2048, triton.next_power_of_2(outputs))
    _mean_kernel[(triton.cdiv(outputs, 256),)](teacher, batch_center, 2 * batch, outputs, teacher.stride(0), BLOCK=256)
    _teacher_kernel[(2 * batch,)](
        teacher, center, teacher_temp, stats, outputs, teacher.stride(0), BLOCK=block, num_warps=8
    )
    _student_kernel[(rows,)](
        student, teacher, center, student_temp, teacher_temp, stats, grad, losses,
        batch, outputs, student.stride(0), teacher.stride(0), 1 / ((2 * rows // batch - 2) * batch),
        BLOCK=block, num_warps=8,
    )  # fmt: skip
    return losses.sum(), batch_center, grad


def _scale_triton(grad, upstream):
    _scale_kernel[(triton.cdiv(grad.numel(), 4096),)](grad, upstream, grad.numel(), BLOCK=4096)
