"""The gradient of a linear layer's weights, added where it is kept.

    into += grad^T x

Dimensions: T tokens, O outputs, I inputs. Float32 on the CPU by blocks out of registers, twice as fast as torch does it
on AMD with AVX-512; otherwise torch's product (16-bit operands on a GPU give float32 at once), then the sum.
"""

import torch
from torch import Tensor

from dino_kernels._native import _C, DTYPES

__all__ = ["add_product_", "add_product_reference_"]


def add_product_(into: Tensor, grad: Tensor, x: Tensor) -> None:
    """into += grad^T x, in place; a repeated call is bitwise equal. Not differentiable.

    Args:
        into: [O, I], float32, contiguous.
        grad: [T, O], float32, float16 or bfloat16; contiguous.
        x: [T, I], of the dtype of grad; contiguous.

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
    for name, value in {"into": into, "grad": grad, "x": x}.items():
        if not value.is_contiguous() or value.device != into.device:
            raise ValueError(
                f"{name} must be contiguous and on {into.device} as into, "
                f"got strides {list(value.stride())} on {value.device}"
            )
    torch.ops.dino_kernels.add_product_(into, grad.detach(), x.detach())


@torch.no_grad()
def add_product_reference_(into: Tensor, grad: Tensor, x: Tensor) -> None:
    """`add_product_` in plain PyTorch."""
    into += grad.t() @ x


# --- registration ------------------------------------------------------------------------------------


@torch.library.custom_op("dino_kernels::add_product_", mutates_args=("into",), device_types="cpu")
def _add_(into: Tensor, grad: Tensor, x: Tensor) -> None:
    _add_cpu(into, grad, x)


@_add_.register_kernel("cuda")
def _(into, grad, x):
    into += grad.t() @ x if x.dtype == torch.float32 else torch.mm(grad.t(), x, out_dtype=torch.float32)


@_add_.register_fake
def _(*_):
    return None


# --- CPU ---------------------------------------------------------------------------------------------


def _add_cpu(into, grad, x):
    if x.dtype == torch.float32 and x.shape[1] % 16 == 0 and into.data_ptr() % 64 == 0:  # rows on cache lines
        arguments = (into.data_ptr(), grad.data_ptr(), x.data_ptr(), *grad.shape, x.shape[1])
        _C.add_product(*arguments, torch.get_num_threads())
    else:
        made = grad.t() @ x
        _C.add_to(into.data_ptr(), made.data_ptr(), DTYPES[made.dtype], made.numel(), torch.get_num_threads())
