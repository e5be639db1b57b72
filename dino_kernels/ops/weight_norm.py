"""Weight normalization of a linear layer, materialized in memory that the caller keeps, and its gradients.

    w_k = g_k u_k,    u_k = v_k / |v_k|
    dL/dg_k = dL/dw_k . u_k        dL/dv_k = g_k / |v_k| (dL/dw_k - (dL/dw_k . u_k) u_k)

Dimensions: K rows of D channels. The weights change once a step, so the step writes w once (in 16 bit where it is
multiplied so) in place of normalizing K D numbers in every forward; the backward pass reads v again and adds into the
gradients, which an optimizer's flat buffer holds.
"""

import torch
from torch import Tensor

from dino_kernels._core.backends import GpuKernel
from dino_kernels._core.native import _C, DTYPES, Products, address
from dino_kernels._core.registry import custom_op
from dino_kernels.ops.linear import products_of

__all__ = [
    "weight_norm_",
    "weight_norm_product_backward_",
    "weight_norm_product_backward_reference_",
    "weight_norm_reference_",
]


def weight_norm_(out: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """Writes the normalized rows to `out` and returns it; not differentiable, see `weight_norm_product_backward_`.

    Salimans and Kingma 2016, equation 2; vision_transformer.py:276. Computed in float32; a row of zeros gives NaN,
    as there. A repeated call is bitwise equal.

    Args:
        out: [K, D], 1 <= D <= 4096; float32, float16 or bfloat16; contiguous.
        v: directions [K, D], float32, contiguous.
        g: norms [K, 1], float32, contiguous.

    Raises:
        ValueError: a shape, dtype, device or stride that does not fit the above.
    """
    _check({"out": out, "v": v, "g": g}, {"out"})
    torch.ops.dino_kernels.weight_norm_(out, v.detach(), g.detach())
    return out


def weight_norm_reference_(out: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """`weight_norm_` in plain PyTorch."""
    return out.copy_(g * v / v.norm(dim=1, keepdim=True))


@torch.no_grad()
def weight_norm_backward_reference_(
    grad_v: Tensor, grad_g: Tensor | None, grad_w: Tensor, v: Tensor, g: Tensor
) -> None:
    """From the gradient of the rows [K, D], in plain PyTorch."""
    norm = v.norm(dim=1, keepdim=True)
    along = (grad_w * v / norm).sum(dim=1, keepdim=True)
    grad_v += g / norm * (grad_w - along * v / norm)
    if grad_g is not None:
        grad_g += along


def _check(named: dict[str, Tensor], any_width: set[str]) -> None:
    """Tensors by name, "v" among them; float32 but for those of `any_width`; g's are columns."""
    v = named["v"]
    if v.ndim != 2 or not 1 <= v.shape[1] <= 4096:
        raise ValueError(f"v must have shape [K, D] with 1 <= D <= 4096, got {list(v.shape)}")
    for name, x in named.items():
        shape = [len(v), 1] if name in ("g", "grad_g") else list(v.shape)
        dtypes = tuple(DTYPES) if name in any_width else (torch.float32,)
        if list(x.shape) != shape or x.dtype not in dtypes or not x.is_contiguous() or x.device != v.device:
            raise ValueError(
                f"{name} must be contiguous, of shape {shape} on {v.device} and dtype "
                f"{' or '.join(str(dtype).removeprefix('torch.') for dtype in dtypes)}, got shape {list(x.shape)}, "
                f"strides {list(x.stride())}, {x.dtype} on {x.device}"
            )


def weight_norm_product_backward_(
    grad_v: Tensor, grad_g: Tensor | None, grad: Tensor, x: Tensor, v: Tensor, g: Tensor, *, overwrite: bool = False
) -> None:
    """Adds the gradients of `weight_norm_`'s arguments into buffers, from those of the logits x w^T.

    On a CPU the gradient of w, as large as w, is computed a part at a time, and never stored as a whole.

    Args:
        grad_v: [K, D], float32, contiguous; added to.
        grad_g: [K, 1], float32, contiguous; added to. None where the norms are not trained.
        v, g: as in `weight_norm_`.
        grad: gradient of the logits [T, K], float32, float16 or bfloat16, contiguous.
        x: what the logits were made of [T, D], of the dtype of grad, contiguous.
        overwrite: grad_v is overwritten, not added to, so that nobody need clear it.

    Raises:
        ValueError: a shape, dtype, device or stride that does not fit the above.
    """
    fits = grad.ndim == x.ndim == 2 and len(grad) == len(x) and [grad.shape[1], x.shape[1]] == list(v.shape)
    if not fits or grad.dtype not in DTYPES or x.dtype != grad.dtype or grad.device != v.device:
        raise ValueError(
            f"grad and x must have shapes [T, {v.shape[0]}] and [T, {v.shape[-1]}], one dtype of float32, float16 and "
            f"bfloat16 and be on {v.device}, got {list(grad.shape)}, {grad.dtype} on {grad.device} and "
            f"{list(x.shape)}, {x.dtype}"
        )
    if not grad.is_contiguous() or not x.is_contiguous():
        raise ValueError(f"grad and x must be contiguous, got strides {list(grad.stride())} and {list(x.stride())}")
    _check({"v": v, "g": g, "grad_v": grad_v, "grad_g": g if grad_g is None else grad_g}, set())
    torch.ops.dino_kernels.weight_norm_product_backward_(
        grad_v, grad_g, grad.detach(), x.detach(), v.detach(), g.detach(), overwrite
    )


@torch.no_grad()
def weight_norm_product_backward_reference_(
    grad_v: Tensor, grad_g: Tensor | None, grad: Tensor, x: Tensor, v: Tensor, g: Tensor, *, overwrite: bool = False
) -> None:
    """`weight_norm_product_backward_` in plain PyTorch."""
    if overwrite:
        grad_v.zero_()
    weight_norm_backward_reference_(grad_v, grad_g, grad.t() @ x, v, g)


# --- registration ------------------------------------------------------------------------------------


@custom_op("weight_norm_", mutates_args=("out",), triton="weight_norm.forward_triton")
def _norm_(out: Tensor, v: Tensor, g: Tensor) -> None:
    _forward_cpu(out, v, g)


@custom_op("weight_norm_backward_", mutates_args=("grad_v", "grad_g"), triton="weight_norm.backward_triton")
def _backward_(grad_v: Tensor, grad_g: Tensor | None, grad_w: Tensor, v: Tensor, g: Tensor) -> None:
    """From the gradient of the rows, of which the CPU computes a part at a time."""
    _backward_cpu(grad_v, grad_g, grad_w, v, g)


@custom_op("weight_norm_product_backward_", mutates_args=("grad_v", "grad_g"))
def _product_backward_(
    grad_v: Tensor, grad_g: Tensor | None, grad: Tensor, x: Tensor, v: Tensor, g: Tensor, overwrite: bool
) -> None:
    _product_backward_cpu(grad_v, grad_g, grad, x, v, g, overwrite)


_backward_gpu = GpuKernel(triton="weight_norm.backward_triton")


@_product_backward_.register_kernel("cuda")
def _(grad_v, grad_g, grad, x, v, g, overwrite):
    grad_w = grad_v if overwrite else torch.empty_like(v)  # a row is read as a whole before it is replaced
    if x.dtype == torch.float32:
        torch.mm(grad.t(), x, out=grad_w)
    else:
        torch.mm(grad.t(), x, out_dtype=torch.float32, out=grad_w)
    _backward_gpu(grad_v, grad_g, grad_w, v, g, overwrite)


# --- CPU ---------------------------------------------------------------------------------------------


_PART = 8192  # rows


def _product_backward(grad_v, grad_g, grad, x, v, g, overwrite):
    for begin in range(0, len(v), _PART):
        part = slice(begin, begin + _PART)
        if overwrite:
            grad_v[part].zero_()  # while it is in cache
        grad_w = grad[:, part].t() @ x
        _backward_(grad_v[part], None if grad_g is None else grad_g[part], grad_w, v[part], g[part])


_MOST_TOKENS = 1024  # whose pairs stay in the second-level cache


def _product_backward_cpu(grad_v, grad_g, grad, x, v, g, overwrite):
    products = products_of(grad, x)
    if products == Products.library or len(x) > _MOST_TOKENS:
        return _product_backward(grad_v, grad_g, grad, x, v, g, overwrite)
    _C.weight_norm_product_backward(
        grad=grad.data_ptr(),
        x=x.data_ptr(),
        v=v.data_ptr(),
        g=g.data_ptr(),
        grad_v=grad_v.data_ptr(),
        grad_g=address(grad_g),
        overwrite=overwrite,
        tokens=x.shape[0],
        rows=v.shape[0],
        channels=v.shape[1],
        dtype=DTYPES[x.dtype],
        products=products,
        threads=torch.get_num_threads(),
    )


def _forward_cpu(out, v, g):
    _C.weight_norm(
        v=v.data_ptr(),
        g=g.data_ptr(),
        w=out.data_ptr(),
        rows=v.shape[0],
        channels=v.shape[1],
        dtype=DTYPES[out.dtype],
        threads=torch.get_num_threads(),
    )


def _backward_cpu(grad_v, grad_g, grad_w, v, g):
    _C.weight_norm_backward(
        grad_w=grad_w.data_ptr(),
        v=v.data_ptr(),
        g=g.data_ptr(),
        grad_v=grad_v.data_ptr(),
        grad_g=address(grad_g),
        rows=v.shape[0],
        channels=v.shape[1],
        dtype=DTYPES[grad_w.dtype],
        threads=torch.get_num_threads(),
    )
