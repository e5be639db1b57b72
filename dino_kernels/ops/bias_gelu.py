"""The bias and the activation of a transformer's MLP in one pass.

    out = gelu(x + bias),    gelu(y) = y Phi(y) = max(y, 0) - |y| Q(|y|)
    dL/dx = dL/dout * gelu'(x + bias),    gelu'(y) = Phi(y) + y phi(y)

with phi and Phi the density and the distribution of the normal law, Q = 1 - Phi its upper tail. log2 Q(a) is nearly a
parabola, so a polynomial of degree 9 and one power of two give Q on [0, 8] (what is left beyond is below 1e-14): gelu
within 3e-8 of the exact one, rounding aside, and half the instructions of the form with erf, which at the 4 bytes an
element of 16-bit tensors would hold a GPU up longer than its memory.

Dimensions: T tokens, C channels. Only x is saved for backward, which recomputes gelu's input. The gradient of the bias
is summed by programs over their own rows in a fixed order, and then over the programs: no atomics.
"""

import torch
from torch import Tensor

from dino_kernels._core.native import _C, DTYPES
from dino_kernels._core.registry import custom_op
from dino_kernels._core.results import empty_output

__all__ = ["bias_gelu", "bias_gelu_reference"]


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """gelu(x + bias), the exact form (torch's approximate="none"); gradients to x and bias.

    Hendrycks and Gimpel 2016; the first layer's bias and the activation of vision_transformer.py:60-61. Computed in
    float32; a repeated call is bitwise equal.

    Args:
        x: product of the layer without its bias [T, C]; float32, float16 or bfloat16; contiguous.
        bias: [C], float32 or the dtype of x, contiguous.

    Returns:
        [T, C], in the dtype of x.

    Raises:
        ValueError: a shape, dtype, device or stride that does not fit the above.
    """
    if x.ndim != 2 or not x.shape[1] or x.dtype not in DTYPES or not x.is_contiguous():
        raise ValueError(
            "x must have shape [T, C] with C >= 1 (flatten other dimensions into T), dtype float32, float16 or "
            f"bfloat16 and be contiguous, got shape {list(x.shape)}, {x.dtype}, strides {list(x.stride())}"
        )
    fits = list(bias.shape) == [x.shape[1]] and bias.dtype in (torch.float32, x.dtype)
    if not fits or not bias.is_contiguous() or bias.device != x.device:
        raise ValueError(
            f"bias must have shape [{x.shape[1]}], dtype float32 or {x.dtype}, be contiguous and on {x.device}, "
            f"got {list(bias.shape)}, {bias.dtype}, strides {list(bias.stride())}, {bias.device}"
        )
    return torch.ops.dino_kernels.bias_gelu(x, bias)


def bias_gelu_reference(x: Tensor, bias: Tensor) -> Tensor:
    """`bias_gelu` in plain PyTorch."""
    return torch.nn.functional.gelu(x + bias).to(x.dtype)


# --- registration ------------------------------------------------------------------------------------


@custom_op("bias_gelu", triton="bias_gelu.forward_triton")
def _gelu(x: Tensor, bias: Tensor) -> Tensor:
    return _forward_cpu(x, bias)


@_gelu.register_fake
def _(x, bias):
    return torch.empty_like(x)


@custom_op("bias_gelu_backward", triton="bias_gelu.backward_triton")
def _gelu_backward(grad_out: Tensor, x: Tensor, bias: Tensor, again: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x and bias; and, with `again`, the forward's output, for a caller that did not keep it (else
    empty)."""
    return _backward_cpu(grad_out, x, bias, again)


@_gelu_backward.register_fake
def _(grad_out, x, bias, again):
    return torch.empty_like(x), torch.empty_like(bias), empty_output(x, again)


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad_out):
    return torch.ops.dino_kernels.bias_gelu_backward(grad_out.contiguous(), *ctx.saved_tensors, False)[:2]


_gelu.register_autograd(_backward, setup_context=_setup)


# --- CPU ---------------------------------------------------------------------------------------------


def _forward_cpu(x, bias):
    out, bias = torch.empty_like(x), bias.float()
    tokens, channels = x.shape
    _C.bias_gelu(
        x=x.data_ptr(),
        bias=bias.data_ptr(),
        out=out.data_ptr(),
        tokens=tokens,
        channels=channels,
        dtype=DTYPES[x.dtype],
        threads=torch.get_num_threads(),
    )
    return out


def _backward_cpu(grad_out, x, bias, again):
    grad_x, wide_bias, out = torch.empty_like(x), bias.float(), empty_output(x, again)
    groups = min(64, len(x))  # whatever the number of threads, so that the sums do not depend on it
    partial = wide_bias.new_empty(groups, len(bias))
    _C.bias_gelu_backward(
        grad_out=grad_out.data_ptr(),
        x=x.data_ptr(),
        bias=wide_bias.data_ptr(),
        grad_x=grad_x.data_ptr(),
        partial=partial.data_ptr(),
        out=out.data_ptr() if again else 0,
        tokens=x.shape[0],
        channels=x.shape[1],
        groups=groups,
        dtype=DTYPES[x.dtype],
        threads=torch.get_num_threads(),
    )
    return grad_x, partial.sum(0).to(bias.dtype), out
