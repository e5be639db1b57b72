"""A linear layer, or its product alone.

    out = x W^T + bias        or, transposed, out = x W + bias

Dimensions: T tokens, D inputs, O outputs. On an x86 CPU products are our own, which add the bias while a block of sums
is in the first-level cache. With matrix tiles (AMX) they are of bfloat16, and of float32 as six of bfloat16, of the
three parts that a number is the sum of (Henry, Tang, Heinecke 2019, arXiv 1904.06376). Where a processor multiplies no
bfloat16, which libraries are slow at then, they are of floats; of float32 only with AVX-512. Else they are those of the
fastest library torch has.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dino_kernels._core.native import _C, DTYPES, Products, address
from dino_kernels._core.registry import custom_op

__all__ = ["linear", "linear_reference"]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, transposed: bool = False) -> Tensor:
    """x W^T + bias, or x W + bias. Sums are float32; a repeated call is bitwise equal.

    With AMX, float32 terms below 1e-33 lose digits, and an infinite one makes its sum NaN.

    Args:
        x: [T, D], float32, float16, bfloat16 or float64.
        weight: [O, D], or [D, O] if transposed; of the dtype of x.
        bias: [O], of the dtype of x; None for the product alone.

    Returns:
        [T, O], of the dtype of x. Gradients of all three, of their dtypes.

    Raises:
        ValueError: a shape or dtype that does not fit the above.
    """
    if not (x.ndim == weight.ndim == 2 and x.shape[1] == weight.shape[0 if transposed else 1]):
        expected = "[D, O]" if transposed else "[O, D]"
        raise ValueError(
            f"x and weight must have shapes [T, D] and {expected}, got {list(x.shape)} and {list(weight.shape)}"
        )
    outputs = weight.shape[1 if transposed else 0]
    if weight.dtype != x.dtype or (bias is not None and (bias.dtype != x.dtype or list(bias.shape) != [outputs])):
        got = "" if bias is None else f" and bias {bias.dtype} {list(bias.shape)}"
        raise ValueError(
            f"weight and a bias [{outputs}] must have the dtype of x, {x.dtype}, got weight {weight.dtype}{got}"
        )
    return torch.ops.dino_kernels.linear(x, weight, bias, transposed)


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, transposed: bool = False) -> Tensor:
    """`linear` in plain PyTorch."""
    return F.linear(x, weight.t() if transposed else weight, bias)


# --- registration ------------------------------------------------------------------------------------


@custom_op("linear")
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    return _linear_cpu(x, weight, bias, transposed)


_HALVES = (torch.float16, torch.bfloat16)
_LONG = 4096  # terms of a 16-bit sum from which cuBLAS splits it, and may round the parts to 16 bit before it adds them


@_linear.register_kernel("cuda")
def _(x, weight, bias, transposed):
    if x.dtype in _HALVES and x.shape[1] > _LONG:
        out = torch.mm(x, weight if transposed else weight.t(), out_dtype=torch.float32)
        return (out if bias is None else out + bias).to(x.dtype)
    return linear_reference(x, weight, bias, transposed=transposed)


@_linear.register_fake
def _(x, weight, bias, transposed):
    return x.new_empty(len(x), weight.shape[1 if transposed else 0])


def _setup(ctx, inputs, output) -> None:
    x, weight, bias, ctx.transposed = inputs
    ctx.with_bias = bias is not None
    ctx.save_for_backward(x, weight)


def _backward(ctx, grad):
    x, weight = ctx.saved_tensors
    grad = grad.contiguous()
    grad_x = torch.ops.dino_kernels.linear(grad, weight, None, not ctx.transposed)
    if grad.device.type == "cpu" or grad.dtype not in _HALVES:
        grad_weight = x.t() @ grad if ctx.transposed else grad.t() @ x
        return grad_x, grad_weight, grad.sum(0) if ctx.with_bias else None, None
    # Sums over all tokens: float32, and rounded once.
    outputs, inputs = grad.shape[1], x.shape[1]
    grad_weight = grad.new_zeros(outputs, inputs, dtype=torch.float32)
    grad_bias = grad.new_zeros(outputs, dtype=torch.float32) if ctx.with_bias else None
    torch.ops.dino_kernels.add_product_(grad_weight, grad, x, grad_bias)
    grad_weight = (grad_weight.t() if ctx.transposed else grad_weight).to(x.dtype)
    return grad_x, grad_weight, None if grad_bias is None else grad_bias.to(x.dtype), None


_linear.register_autograd(_backward, setup_context=_setup)


# --- CPU ---------------------------------------------------------------------------------------------

_PRODUCTS = {dtype: _C.best_products(dtype=DTYPES[dtype]) for dtype in (torch.float32, torch.bfloat16)}
_SPLIT = 1 << 25  # multiply-adds of float32 from which AMX takes it; small nets keep plain float32's rounding
_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def products_of(*operands: Tensor, work: int = 0) -> Products:
    """What multiplies operands [rows, multiple of 32, not 0] in the kernels of linear layers; library: not those.

    work: multiply-adds, of a kernel that takes float32 with AMX too.
    """
    dtype = operands[0].dtype
    products = _PRODUCTS.get(dtype, Products.library)
    if dtype == torch.float32 and work < _SPLIT and products == Products.amx:
        products = Products.f32 if work else Products.library
    fits = products != Products.library and all(
        x.dtype == dtype and x.shape[1] and x.shape[1] % 32 == 0 and x.is_contiguous() and not x.is_cuda
        for x in operands
    )
    return products if fits else Products.library


def _linear_cpu(x, weight, bias, transposed):
    outputs = weight.shape[1 if transposed else 0]
    bias = None if bias is None else bias.contiguous()  # what oneDNN takes it for too, and does not check
    products = products_of(x, weight, work=len(x) * weight.numel()) if outputs % 32 == 0 else Products.library
    if products != Products.library:
        out, wide_bias = x.new_empty(len(x), outputs), None if bias is None else bias.float()
        _C.linear(
            x=x.data_ptr(),
            weight=weight.data_ptr(),
            bias=address(wide_bias),
            out=out.data_ptr(),
            tokens=x.shape[0],
            depth=x.shape[1],
            outputs=outputs,
            transposed=transposed,
            dtype=DTYPES[x.dtype],
            products=products,
            threads=torch.get_num_threads(),
        )
        return out
    if x.dtype == torch.float32 and _HAS_ONEDNN and x.shape[1]:
        # oneDNN, twice as fast as the library behind F.linear on AMD's AVX-512; torch takes it for 16 bit anyway.
        return torch.ops.mkldnn._linear_pointwise(x, weight.t() if transposed else weight, bias, "none", [], "")
    return linear_reference(x, weight, bias, transposed=transposed)
