"""The residual sum of a transformer block and the layer norm that reads it, in one pass.

    total  = x + scale * branch                                   scale: one factor a row of the branch, of drop path
    normed = xhat * weight + bias,    xhat = (total - mean) * rstd,    rstd = 1 / sqrt(var + eps)

total is rounded to its dtype first and normalized as rounded: later layers, the statistics and the backward pass all
see the same number. Backward, with g = dL/dnormed * weight and means over the channels:

    dL/dx      = dL/dtotal + rstd * (g - mean(g) - xhat * mean(g * xhat)),    dL/dbranch = scale * dL/dx
    dL/dweight = sum over tokens of dL/dnormed * xhat,                        dL/dbias   = sum of dL/dnormed

Where drop path skips samples in place of multiplying them by zero, the branch has rows of some tokens only, and so has
normed, which the next branch reads; the other tokens' x goes through as it is.

Dimensions: T tokens, B of them in the branch, N in normed, C channels. The sums over tokens are formed by a fixed
number of programs, each over its own rows in a fixed order, and then over the programs: no atomics.
"""

import torch
from torch import Tensor

from dino_kernels._core.native import _C, DTYPES, address
from dino_kernels._core.registry import custom_op
from dino_kernels._core.results import empty_gradients, empty_outputs, same_gradient
from dino_kernels.ops.add_product import add_column_sums_cpu

__all__ = ["add_layer_norm", "add_layer_norm_reference"]


def add_layer_norm(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    scale: Tensor | None = None,
    rows: Tensor | None = None,
    normed_rows: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Adds a branch to the residual stream and normalizes the sum; gradients to x, branch, weight and bias.

    Formula in the module's docstring; the sums of vision_transformer.py:111-112 with the norms that read them,
    :108 and :112. Statistics are float32; a repeated call is bitwise equal.

    Args:
        x: residual stream [T, C], 1 <= C <= 4096; float32, float16 or bfloat16; contiguous.
        branch: [B, C], of any of the three dtypes, not necessarily that of x; contiguous.
        weight: [C], float32, contiguous.
        bias: [C], float32, contiguous.
        scale: drop path's factor of each row of branch [B] or [B, 1], float32, contiguous, without gradient: 0
            (dropped) or 1 / keep. None for 1.
        rows: the token of each row of branch [B], int32, contiguous, sorted, on the device of x. None: B = T, all.
        normed_rows: the tokens to normalize [N], as rows. None: N = T, all.
        eps: added to the variance, > 0.

    Returns:
        total: x + scale * branch [T, C], in the dtype of x; x where the branch has no row.
        normed: [N, C], in the dtype of branch.

    Raises:
        ValueError: a shape, dtype, device, stride or eps that does not fit the above. The values of rows and
            normed_rows are checked on the CPU only: on a GPU that would wait for the device.
    """
    for name, value in (("rows", rows), ("normed_rows", normed_rows)):
        if value is None:
            continue
        if value.ndim != 1 or value.dtype != torch.int32 or not value.is_contiguous() or value.device != x.device:
            raise ValueError(
                f"{name} must have one dimension, dtype int32, be contiguous and on {x.device} as x, "
                f"got {list(value.shape)}, {value.dtype}, strides {list(value.stride())} on {value.device}"
            )
    _check_residual(x, branch, scale, rows)
    channels = x.shape[1]
    if channels > 4096:
        raise ValueError(f"x must have at most 4096 channels, got shape {list(x.shape)}")
    for name, value in (("weight", weight), ("bias", bias)):
        if list(value.shape) != [channels] or value.dtype != torch.float32 or not value.is_contiguous():
            raise ValueError(
                f"{name} must have shape [{channels}], dtype float32 and be contiguous, "
                f"got {list(value.shape)}, {value.dtype}, strides {list(value.stride())}"
            )
        if value.device != x.device:
            raise ValueError(f"{name} must be on {x.device} as x, got {value.device}")
    if not eps > 0:
        raise ValueError(f"eps must be > 0, got {eps}")
    return torch.ops.dino_kernels.add_layer_norm(x, branch, weight, bias, scale, rows, normed_rows, eps)[:2]


def add_layer_norm_reference(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    scale: Tensor | None = None,
    rows: Tensor | None = None,
    normed_rows: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """`add_layer_norm` in plain PyTorch."""
    added = branch if scale is None else scale.view(-1, 1) * branch
    if rows is not None:
        added = torch.zeros(x.shape, dtype=added.dtype, device=x.device).index_copy(0, rows.long(), added)
    total = (x + added).to(x.dtype)
    read = total if normed_rows is None else total.index_select(0, normed_rows)
    normed = torch.nn.functional.layer_norm(read.to(weight.dtype), weight.shape, weight, bias, eps)
    return total, normed.to(branch.dtype)


def _check_residual(x: Tensor, branch: Tensor, scale: Tensor | None, rows: Tensor | None = None) -> None:
    """Raises ValueError if x [T, C], branch and scale do not fit each other.

    branch is [T, C] or, with rows [B], [B, C]; scale is a factor for each of its rows, [B] or [B, 1], or None.
    """
    for name, value in (("x", x), ("branch", branch)):
        if value.ndim != 2 or not value.shape[1] or value.dtype not in DTYPES or not value.is_contiguous():
            raise ValueError(
                f"{name} must have shape [T, C] with C >= 1 (flatten other dimensions into T), dtype float32, float16 "
                f"or bfloat16 and be contiguous, got shape {list(value.shape)}, {value.dtype}, "
                f"strides {list(value.stride())}"
            )
    count = len(x if rows is None else rows)
    if list(branch.shape) != [count, x.shape[1]] or x.device != branch.device:
        wanted = "the shape and device of x" if rows is None else "a row for each of rows, the channels and device of x"
        raise ValueError(
            f"branch must have {wanted}, {[count, x.shape[1]]} on {x.device}, "
            f"got {list(branch.shape)} on {branch.device}"
        )
    if scale is None:
        return
    if list(scale.shape) not in ([count], [count, 1]) or scale.dtype != torch.float32 or not scale.is_contiguous():
        raise ValueError(
            f"scale must have shape [{count}] or [{count}, 1], dtype float32 and be contiguous, "
            f"got {list(scale.shape)}, {scale.dtype}, strides {list(scale.stride())}"
        )
    if scale.requires_grad or scale.device != x.device:
        raise ValueError(
            f"scale must be on {x.device} as x and need no gradient (detach it), "
            f"got {scale.device}, requires_grad={scale.requires_grad}"
        )


# --- registration ------------------------------------------------------------------------------------


@custom_op("add_layer_norm", triton="add_layer_norm.forward_triton")
def _norm(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    rows: Tensor | None,
    normed_rows: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(total, normed, mean [N] float32, rstd [N] float32)"""
    return _forward_cpu(x, branch, weight, bias, scale, rows, normed_rows, eps)


@_norm.register_fake
def _(x, branch, weight, bias, scale, rows, normed_rows, eps):
    return empty_outputs(x, branch, normed_rows)


@custom_op(
    "add_layer_norm_backward_",
    mutates_args=("grad_weight", "grad_bias", "branch_sums"),
    triton="add_layer_norm.backward_triton",
)
def _norm_backward_(
    grad_total: Tensor | None,
    grad_normed: Tensor,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    rows: Tensor | None,
    normed_rows: Tensor | None,
    grad_weight: Tensor,
    grad_bias: Tensor,
    branch_sums: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of branch (of no shape where it would equal that of x); those of weight and bias, float32, are
    added to. So are the sums over rows of the branch's to `branch_sums`, float32 [C]: the gradient of a bias that the
    branch ends with, of which a GPU spares itself a pass."""
    return _backward_cpu(
        grad_total, grad_normed, total, mean, rstd, weight, scale, rows, normed_rows, grad_weight, grad_bias,
        branch_sums,
    )  # fmt: skip


@_norm_backward_.register_fake
def _(grad_total, grad_normed, total, mean, rstd, weight, scale, rows, normed_rows, *_):
    return empty_gradients(grad_normed, total, scale, rows)


def _setup(ctx, inputs, output) -> None:
    _, branch, weight, _, scale, rows, normed_rows, _ = inputs
    total, _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.branch_dtype = branch.dtype
    ctx.save_for_backward(total, mean, rstd, weight, scale, rows, normed_rows)


def _backward(ctx, grad_total, grad_normed, *_):
    total, mean, rstd, weight, scale, rows, normed_rows = ctx.saved_tensors
    if grad_normed is None:  # nobody used the normalized output
        scaled = grad_total if rows is None else grad_total.index_select(0, rows)
        scaled = scaled if scale is None else scaled * scale.view(-1, 1)
        return grad_total, scaled.to(ctx.branch_dtype), *[None] * 6
    grads = torch.zeros_like(weight), torch.zeros_like(weight)
    grad_x, grad_branch = torch.ops.dino_kernels.add_layer_norm_backward_(
        None if grad_total is None else grad_total.contiguous(),
        grad_normed.contiguous(),
        total,
        mean,
        rstd,
        weight,
        scale,
        rows,
        normed_rows,
        *grads,
        None,
    )
    if same_gradient(grad_normed, total, scale, rows):
        grad_branch = grad_x
    return grad_x, grad_branch, *grads, *[None] * 4


_norm.register_autograd(_backward, setup_context=_setup)


# --- CPU ---------------------------------------------------------------------------------------------


GROUPS = 64  # of tokens, at most, whatever the number of threads: their sums do not depend on it


def count_of(rows: Tensor | None) -> int:
    """As struct RowsOf in csrc/cpu/add_layer_norm.h has it."""
    return -1 if rows is None else rows.shape[0]


def _forward_cpu(x, branch, weight, bias, scale, rows, normed_rows, eps):
    total, normed, mean, rstd = empty_outputs(x, branch, normed_rows)
    _C.add_layer_norm(
        x=x.data_ptr(),
        branch=branch.data_ptr(),
        scale=address(scale),
        branch_rows=address(rows),
        branch_rows_count=count_of(rows),
        normed_rows=address(normed_rows),
        normed_rows_count=count_of(normed_rows),
        weight=weight.data_ptr(),
        bias=bias.data_ptr(),
        total=total.data_ptr(),
        normed=normed.data_ptr(),
        mean=mean.data_ptr(),
        rstd=rstd.data_ptr(),
        tokens=x.shape[0],
        channels=x.shape[1],
        x_dtype=DTYPES[x.dtype],
        branch_dtype=DTYPES[branch.dtype],
        eps=eps,
        threads=torch.get_num_threads(),
    )
    return total, normed, mean, rstd


def _backward_cpu(
    grad_total, grad_normed, total, mean, rstd, weight, scale, rows, normed_rows, grad_weight, grad_bias, branch_sums
):
    grad_x, grad_branch = empty_gradients(grad_normed, total, scale, rows)
    groups = min(GROUPS, len(total))
    partial = weight.new_empty(groups, 2, len(weight))
    _C.add_layer_norm_backward(
        grad_total=address(grad_total),
        grad_normed=grad_normed.data_ptr(),
        total=total.data_ptr(),
        mean=mean.data_ptr(),
        rstd=rstd.data_ptr(),
        weight=weight.data_ptr(),
        scale=address(scale),
        branch_rows=address(rows),
        branch_rows_count=count_of(rows),
        normed_rows=address(normed_rows),
        normed_rows_count=count_of(normed_rows),
        grad_x=grad_x.data_ptr(),
        grad_branch=grad_branch.data_ptr() if grad_branch.numel() else 0,
        partial=partial.data_ptr(),
        grad_weight=grad_weight.data_ptr(),
        grad_bias=grad_bias.data_ptr(),
        tokens=total.shape[0],
        channels=total.shape[1],
        groups=groups,
        x_dtype=DTYPES[total.dtype],
        branch_dtype=DTYPES[grad_normed.dtype],
        threads=torch.get_num_threads(),
    )
    if branch_sums is not None:
        add_column_sums_cpu(branch_sums, grad_branch if grad_branch.ndim == 2 else grad_x)
    return grad_x, grad_branch
