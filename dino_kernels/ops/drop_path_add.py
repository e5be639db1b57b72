"""The residual sum of a transformer block, with drop path's factor on the branch.

    out = x + scale * branch                      scale: one factor a token
    dL/dx = dL/dout,   dL/dbranch = scale * dL/dout

Dimensions: T tokens, C channels. One pass over memory, whatever mix of dtypes the residual stream and the branch have;
the backward pass hands the upstream gradient to x as it is.
"""

import torch
from torch import Tensor

from dino_kernels._core.native import _C, DTYPES
from dino_kernels._core.registry import custom_op

__all__ = ["drop_path_add", "drop_path_add_reference"]


def drop_path_add(x: Tensor, branch: Tensor, scale: Tensor) -> Tensor:
    """x + scale * branch, computed in float32; gradients to x and branch.

    Stochastic depth (Huang et al. 2016), vision_transformer.py:27-35 with the sums of :111-112; the caller draws the
    factors, the same for all tokens of an image. A repeated call is bitwise equal.

    Args:
        x: residual stream [T, C], C >= 1; float32, float16 or bfloat16; contiguous.
        branch: [T, C], of any of the three dtypes, not necessarily that of x; contiguous.
        scale: factor of each token [T] or [T, 1], float32, contiguous, without gradient: 0 (dropped) or 1 / keep.

    Returns:
        [T, C], in the dtype of x.

    Raises:
        ValueError: a shape, dtype, device or stride that does not fit the above.
    """
    check_residual(x, branch, scale)
    return torch.ops.dino_kernels.drop_path_add(x, branch, scale)


def drop_path_add_reference(x: Tensor, branch: Tensor, scale: Tensor) -> Tensor:
    """`drop_path_add` in plain PyTorch."""
    return (x + scale.view(-1, 1) * branch).to(x.dtype)


def check_residual(x: Tensor, branch: Tensor, scale: Tensor | None, rows: Tensor | None = None) -> None:
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


@custom_op("drop_path_add")
def _add(x: Tensor, branch: Tensor, scale: Tensor) -> Tensor:
    return _forward_cpu(x, branch, scale)


@_add.register_kernel("cuda")
def _(x, branch, scale):
    from dino_kernels.triton.drop_path_add import forward_triton

    with torch.cuda.device(x.device):  # Triton launches on the current device
        return forward_triton(x, branch, scale)


@_add.register_fake
def _(x, branch, scale):
    return torch.empty_like(x)


@custom_op("drop_path_add_backward")
def _add_backward(grad_out: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of the branch, whose dtype is given."""
    return _backward_cpu(grad_out, scale, dtype)


@_add_backward.register_kernel("cuda")
def _(grad_out, scale, dtype):
    from dino_kernels.triton.drop_path_add import backward_triton

    with torch.cuda.device(grad_out.device):
        return backward_triton(grad_out, scale, dtype)


@_add_backward.register_fake
def _(grad_out, scale, dtype):
    return torch.empty_like(grad_out, dtype=dtype)


def _setup(ctx, inputs, output) -> None:
    _, branch, scale = inputs
    ctx.branch_dtype = branch.dtype
    ctx.save_for_backward(scale)


def _backward(ctx, grad_out):
    (scale,) = ctx.saved_tensors
    grad_branch = torch.ops.dino_kernels.drop_path_add_backward(grad_out.contiguous(), scale, ctx.branch_dtype)
    return grad_out, grad_branch, None


_add.register_autograd(_backward, setup_context=_setup)


# --- CPU ---------------------------------------------------------------------------------------------


def _forward_cpu(x, branch, scale):
    out = torch.empty_like(x)
    _run_cpu(x.data_ptr(), branch, scale, out)
    return out


def _backward_cpu(grad_out, scale, dtype):
    grad_branch = torch.empty_like(grad_out, dtype=dtype)
    _run_cpu(0, grad_out, scale, grad_branch)
    return grad_branch


def _run_cpu(x, branch, scale, out):
    _C.drop_path_add(
        x=x,
        branch=branch.data_ptr(),
        scale=scale.data_ptr(),
        out=out.data_ptr(),
        tokens=out.shape[0],
        channels=out.shape[1],
        out_dtype=DTYPES[out.dtype],
        branch_dtype=DTYPES[branch.dtype],
        threads=torch.get_num_threads(),
    )
