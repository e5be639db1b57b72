"""The MLP of a transformer block, which keeps one tensor for its backward pass, or none.

    hidden = x W1^T        out = gelu(hidden + b1) W2^T + b2        gelu(y) = y Phi(y), the exact form

The backward makes gelu's output once more, in the pass that makes its gradient. Dimensions: T tokens, C channels, H
hidden channels. With the products of `linear` a block of tokens goes through both layers in the second-level cache, and
with matrix tiles the backward makes `hidden` once more too; elsewhere it is the products, `bias_gelu` and
`add_product_`, of which on a GPU the first product of 16-bit tensors writes gelu's output too.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dino_kernels._core.backends import GpuKernel
from dino_kernels._core.native import _C, DTYPES, Products
from dino_kernels._core.registry import custom_op
from dino_kernels.ops.add_product import add_product_
from dino_kernels.ops.bias_gelu import bias_gelu
from dino_kernels.ops.linear import linear, products_of

__all__ = ["mlp", "mlp_reference"]


def mlp(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    """gelu(x W1^T + b1) W2^T + b2 (vision_transformer.py:48).

    Sums and gelu are float32; a repeated call is bitwise equal.

    Args:
        x: [T, C], float32, float16 or bfloat16; contiguous.
        weight1, weight2: [H, C] and [C, H], of the dtype of x; contiguous.
        bias1: [H], float32, contiguous.
        bias2: [C], float32 or the dtype of x, contiguous.

    Returns:
        [T, C], of the dtype of x. Gradients of all five, of their dtypes.

    Raises:
        ValueError: a shape, dtype, device or stride that does not fit the above.
    """
    if x.ndim != 2 or weight1.ndim != 2 or list(weight1.shape) != [len(weight1), x.shape[1]]:
        raise ValueError(
            f"x and weight1 must have shapes [T, C] and [H, C], got {list(x.shape)} and {list(weight1.shape)}"
        )
    hidden, channels = weight1.shape
    if list(weight2.shape) != [channels, hidden] or list(bias1.shape) != [hidden] or list(bias2.shape) != [channels]:
        raise ValueError(
            f"bias1, weight2 and bias2 must have shapes [{hidden}], [{channels}, {hidden}] and [{channels}], "
            f"got {list(bias1.shape)}, {list(weight2.shape)} and {list(bias2.shape)}"
        )
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16) or not x.dtype == weight1.dtype == weight2.dtype:
        raise ValueError(
            "x, weight1 and weight2 must be of one dtype of float32, float16 and bfloat16, "
            f"got {x.dtype}, {weight1.dtype} and {weight2.dtype}"
        )
    if bias1.dtype != torch.float32 or bias2.dtype not in (torch.float32, x.dtype):
        raise ValueError(f"bias1 must be float32, bias2 float32 or {x.dtype}, got {bias1.dtype} and {bias2.dtype}")
    operands = {"x": x, "weight1": weight1, "bias1": bias1, "weight2": weight2, "bias2": bias2}
    for name, value in operands.items():
        if not value.is_contiguous() or value.device != x.device:
            raise ValueError(
                f"{name} must be contiguous and on {x.device} as x, "
                f"got strides {list(value.stride())} on {value.device}"
            )
    return torch.ops.dino_kernels.mlp(x, weight1, bias1, weight2, bias2, torch.is_grad_enabled())[0]


def mlp_reference(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    """`mlp` in plain PyTorch."""
    return F.linear(F.gelu(F.linear(x, weight1, bias1.to(x.dtype))), weight2, bias2.to(x.dtype))


# --- registration ------------------------------------------------------------------------------------


_hidden = GpuKernel(triton="mlp.hidden_triton")
_gelu_backward = GpuKernel(triton="bias_gelu.backward_triton")


@custom_op("mlp")
def _mlp(
    x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, keep: bool
) -> tuple[Tensor, Tensor]:
    """(out, hidden: saved for backward, with `keep`; else an empty tensor)"""
    return _forward_cpu(x, weight1, bias1, weight2, bias2, keep)


@_mlp.register_kernel("cuda")
def _(x, weight1, bias1, weight2, bias2, keep):
    if x.dtype == torch.float32:  # whose products Triton makes without tensor cores
        return _forward(x, weight1, bias1, weight2, bias2, keep)
    hidden, active = _hidden(x, weight1, bias1, keep)
    return linear(active, weight2, bias2.to(x.dtype)), hidden


@_mlp.register_fake
def _(x, weight1, bias1, weight2, bias2, keep):
    kept = keep and products_of(x, weight1, weight2) != Products.amx
    return torch.empty_like(x), x.new_empty(len(x) if kept else 0, len(weight1))


@custom_op("mlp_backward_", mutates_args=("grad_weight1", "grad_bias1", "grad_weight2", "grad_bias2"))
def _mlp_backward_(
    grad: Tensor,
    x: Tensor,
    hidden: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    grad_weight1: Tensor,
    grad_bias1: Tensor,
    grad_weight2: Tensor,
    grad_bias2: Tensor | None,
) -> Tensor:
    """The gradient of x; those of weights and biases, float32 and contiguous, are added to; None where bias2's is not
    wanted."""
    return _backward_cpu(grad, x, hidden, weight1, bias1, weight2, grad_weight1, grad_bias1, grad_weight2, grad_bias2)


@_mlp_backward_.register_kernel("cuda")
def _(grad, x, hidden, weight1, bias1, weight2, grad_weight1, grad_bias1, grad_weight2, grad_bias2):
    grad_active = linear(grad, weight2, transposed=True)
    grad_hidden, _, active = _gelu_backward(grad_active, hidden, bias1, True, grad_bias1)
    add_product_(grad_weight2, grad, active, grad_bias2)
    add_product_(grad_weight1, grad_hidden, x)
    return linear(grad_hidden, weight1, transposed=True)


@_mlp_backward_.register_fake
def _(grad, *_):
    return torch.empty_like(grad)


def _setup(ctx, inputs, output) -> None:
    x, weight1, bias1, weight2, bias2, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, output[1], weight1, bias1, weight2)
    ctx.bias2_shape, ctx.bias2_dtype = bias2.shape, bias2.dtype


def _backward(ctx, grad, _):
    x, hidden, weight1, bias1, weight2 = ctx.saved_tensors
    shapes = (weight1.shape, bias1.shape, weight2.shape, ctx.bias2_shape)
    grads = [torch.zeros(shape, dtype=torch.float32, device=x.device) for shape in shapes]
    grad_x = torch.ops.dino_kernels.mlp_backward_(grad.contiguous(), x, hidden, weight1, bias1, weight2, *grads)
    return grad_x, grads[0].to(x.dtype), grads[1], grads[2].to(x.dtype), grads[3].to(ctx.bias2_dtype), None


_mlp.register_autograd(_backward, setup_context=_setup)


# --- any device --------------------------------------------------------------------------------------


def _forward(x, weight1, bias1, weight2, bias2, keep):
    hidden = linear(x, weight1)
    out = linear(bias_gelu(hidden, bias1), weight2, bias2.to(x.dtype))
    return out, hidden if keep else hidden.new_empty(0, len(weight1))


def _backward_(grad, x, hidden, weight1, bias1, weight2, grad_weight1, grad_bias1, grad_weight2, grad_bias2):
    assert len(hidden) == len(x), "made by the kernels for tiles, which keep nothing"
    grad_hidden, grad_bias, active = torch.ops.dino_kernels.bias_gelu_backward(
        linear(grad, weight2, transposed=True), hidden, bias1, True
    )
    add_product_(grad_weight2, grad, active, grad_bias2)
    add_product_(grad_weight1, grad_hidden, x)
    grad_bias1 += grad_bias
    return linear(grad_hidden, weight1, transposed=True)


# --- CPU ---------------------------------------------------------------------------------------------


def _forward_cpu(x, weight1, bias1, weight2, bias2, keep):
    products = products_of(x, weight1, weight2)
    if products == Products.library:
        return _forward(x, weight1, bias1, weight2, bias2, keep)
    kept = keep and products != Products.amx
    out, hidden = torch.empty_like(x), x.new_empty(len(x) if kept else 0, len(weight1))
    wide = bias2.float()
    _C.mlp(
        x=x.data_ptr(),
        weight1=weight1.data_ptr(),
        bias1=bias1.data_ptr(),
        weight2=weight2.data_ptr(),
        bias2=wide.data_ptr(),
        out=out.data_ptr(),
        hidden=hidden.data_ptr() if kept else 0,
        tokens=x.shape[0],
        channels=x.shape[1],
        hidden_channels=weight1.shape[0],
        dtype=DTYPES[x.dtype],
        products=products,
        threads=torch.get_num_threads(),
    )
    return out, hidden


def _backward_cpu(grad, x, hidden, weight1, bias1, weight2, grad_weight1, grad_bias1, grad_weight2, grad_bias2):
    products = products_of(grad, x, weight1, weight2)
    if products == Products.library:
        return _backward_(grad, x, hidden, weight1, bias1, weight2, grad_weight1, grad_bias1, grad_weight2, grad_bias2)
    grad_x = torch.empty_like(x)
    if grad_bias2 is None:
        grad_bias2 = bias1.new_zeros(x.shape[1])
    _C.mlp_backward(
        grad=grad.data_ptr(),
        x=x.data_ptr(),
        hidden=hidden.data_ptr() if len(hidden) else 0,
        weight1=weight1.data_ptr(),
        bias1=bias1.data_ptr(),
        weight2=weight2.data_ptr(),
        grad_x=grad_x.data_ptr(),
        grad_weight1=grad_weight1.data_ptr(),
        grad_bias1=grad_bias1.data_ptr(),
        grad_weight2=grad_weight2.data_ptr(),
        grad_bias2=grad_bias2.data_ptr(),
        tokens=x.shape[0],
        channels=x.shape[1],
        hidden_channels=weight1.shape[0],
        dtype=DTYPES[x.dtype],
        products=products,
        threads=torch.get_num_threads(),
    )
    return grad_x
