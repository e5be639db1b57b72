"""The gradients of a linear layer's weights and bias, added where they are kept.

    into += grad^T x        into_bias += sum over T of grad

Dimensions: T tokens, O outputs, I inputs. Bfloat16 and float32 by the products of `linear`. Else float32 on the CPU by
blocks out of registers, twice as fast as torch does it on AMD with AVX-512; in 16 bit the product is torch's. On a GPU
cuBLAS adds its float32 sums to what is there.
"""

import torch
from torch import Tensor

from dino_kernels._core.backends import GpuKernel
from dino_kernels._core.native import _C, DTYPES, Products, address
from dino_kernels._core.registry import custom_op
from dino_kernels.ops.linear import products_of

__all__ = ["add_product_", "add_product_reference_"]


def add_product_(into: Tensor, grad: Tensor, x: Tensor, into_bias: Tensor | None = None) -> None:
    """into += grad^T x, and into_bias += the sums of grad's columns, in place. Not differentiable.

    Sums are float32; a repeated call is bitwise equal.

    Args:
        into: [O, I], float32, contiguous.
        grad: [T, O], float32, float16 or bfloat16; contiguous.
        x: [T, I], of the dtype of grad; contiguous.
        into_bias: [O], float32, contiguous; None where it is not wanted.

    Raises:
        ValueError: a shape, dtype, device or stride that does not fit the above.
    """
    if grad.ndim != 2 or x.ndim != 2 or len(grad) != len(x) or list(into.shape) != [grad.shape[1], x.shape[1]]:
        raise ValueError(
            "into, grad and x must have shapes [O, I], [T, O] and [T, I], "
            f"got {list(into.shape)}, {list(grad.shape)} and {list(x.shape)}"
        )
    if into.dtype != torch.float32 or grad.dtype not in DTYPES or x.dtype != grad.dtype:
        raise ValueError(
            "into must be float32, grad and x of one dtype of float32, float16 and bfloat16, "
            f"got {into.dtype}, {grad.dtype} and {x.dtype}"
        )
    bias = {} if into_bias is None else {"into_bias": into_bias}
    if into_bias is not None and (list(into_bias.shape) != [len(into)] or into_bias.dtype != torch.float32):
        raise ValueError(
            f"into_bias must have shape [{len(into)}] and dtype float32, got {list(into_bias.shape)}, {into_bias.dtype}"
        )
    for name, value in {"into": into, "grad": grad, "x": x, **bias}.items():
        if not value.is_contiguous() or value.device != into.device:
            raise ValueError(
                f"{name} must be contiguous and on {into.device} as into, "
                f"got strides {list(value.stride())} on {value.device}"
            )
    torch.ops.dino_kernels.add_product_(into, grad.detach(), x.detach(), into_bias)


@torch.no_grad()
def add_product_reference_(into: Tensor, grad: Tensor, x: Tensor, into_bias: Tensor | None = None) -> None:
    """`add_product_` in plain PyTorch."""
    into += grad.t() @ x
    if into_bias is not None:
        into_bias += grad.sum(0, dtype=into_bias.dtype)


# --- registration ------------------------------------------------------------------------------------


_add_column_sums = GpuKernel(triton="column_sums.add_column_sums")


@custom_op("add_product_", mutates_args=("into", "into_bias"))
def _add_(into: Tensor, grad: Tensor, x: Tensor, into_bias: Tensor | None) -> None:
    _add_cpu(into, grad, x, into_bias)


@_add_.register_kernel("cuda")
def _(into, grad, x, into_bias):
    if into_bias is not None:
        _add_column_sums(grad, into_bias)
    if x.dtype == torch.float32:
        into.addmm_(grad.t(), x)
    else:  # of cuBLAS's products that add to float32, torch has the batched one only
        sums = into[None]
        torch.baddbmm(sums, grad.t()[None], x[None], out_dtype=torch.float32, out=sums)


# --- CPU ---------------------------------------------------------------------------------------------


def _add_cpu(into, grad, x, into_bias):
    products = products_of(grad, x, work=grad.numel() * x.shape[1])
    if products != Products.library:
        return _C.add_linear(
            into=into.data_ptr(),
            grad=grad.data_ptr(),
            x=x.data_ptr(),
            into_bias=address(into_bias),
            tokens=grad.shape[0],
            outputs=grad.shape[1],
            inputs=x.shape[1],
            dtype=DTYPES[x.dtype],
            products=products,
            threads=torch.get_num_threads(),
        )
    if into_bias is not None:
        add_column_sums_cpu(into_bias, grad)
    if x.dtype == torch.float32:
        _C.add_product(
            into=into.data_ptr(),
            grad=grad.data_ptr(),
            x=x.data_ptr(),
            tokens=grad.shape[0],
            outputs=grad.shape[1],
            inputs=x.shape[1],
            threads=torch.get_num_threads(),
        )
    else:  # torch's mixed sum would write a float32 copy first
        made = grad.t() @ x
        _C.add_to(
            into=into.data_ptr(),
            x=made.data_ptr(),
            count=made.numel(),
            dtype=DTYPES[made.dtype],
            threads=torch.get_num_threads(),
        )


def add_column_sums_cpu(into: Tensor, x: Tensor) -> None:
    """into [columns], float32, += the sums of the columns of x, contiguous."""
    _C.add_column_sums(
        into=into.data_ptr(),
        x=x.data_ptr(),
        rows=x.numel() // len(into),
        columns=len(into),
        dtype=DTYPES[x.dtype],
        threads=torch.get_num_threads(),
    )
