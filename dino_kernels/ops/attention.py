"""Self-attention over packed sequences, without a mask.

    out_i = sum_j softmax_j(scale <q_i, k_j>) v_j        j over the tokens of i's sequence, per head

Dimensions: T tokens in S sequences (sequence i is rows cu_seqlens[i] to cu_seqlens[i+1]), H heads, D channels a head.
Backward, with P the probabilities, rebuilt from lse (the natural logarithm of each row's sum of exponentials):

    dV = P^T dO    dP = dO V^T    dS = P * (dP - rowsum(dO * O))    dQ = scale dS K    dK = scale dS^T Q
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dino_kernels._core.native import _C, DTYPES, Products
from dino_kernels._core.registry import custom_op
from dino_kernels.cuda.attention import fits_cuda
from dino_kernels.ops.add_product import add_column_sums_cpu

__all__ = ["attention", "attention_reference"]


def attention(
    qkv: Tensor,
    cu_seqlens: Tensor,
    *,
    scale: float | None = None,
    groups: Sequence[tuple[int, int]] | None = None,
) -> Tensor:
    """Multi-head self-attention of every sequence to itself; gradients to qkv.

    Caron et al. 2021 (ViT, as vision_transformer.py:81-92 of the reference), on packed sequences of any mix of
    lengths. Softmax statistics are float32; a repeated call is bitwise equal.

    Args:
        qkv: queries, keys, values [T, 3, H, D]; float32, float16 or bfloat16; adjacent channels (stride 1), the
            other dimensions may be strided; D from 1 to 256.
        cu_seqlens: bounds of the sequences [S+1], int32, contiguous, on qkv's device: from 0 to T, never
            falling.
        scale: factor on the logits; D ** -0.5 by default.
        groups: (number of sequences, tokens of each) in packed order, as [(128, 197), (512, 37)], where the caller
            knows them: what cu_seqlens says, but on the host. A GPU then takes for each length the kernel that suits
            it, and one program computes all gradients of a short sequence's head.

    Returns:
        [T, H, D], in the dtype of qkv.

    Raises:
        ValueError: a shape, dtype, device or group that does not fit the above. The bounds' values are checked on
            the CPU only: on a GPU that would wait for the device.
    """
    fits = qkv.ndim == 4 and qkv.shape[1] == 3 and 1 <= qkv.shape[3] <= 256
    if not fits or qkv.dtype not in DTYPES or qkv.stride(3) != 1:
        raise ValueError(
            "qkv must have shape [T, 3, H, D] with 1 <= D <= 256, dtype float32, float16 or bfloat16 and adjacent "
            f"channels (stride 1), got shape {list(qkv.shape)}, {qkv.dtype}, strides {list(qkv.stride())}"
        )
    if cu_seqlens.ndim != 1 or cu_seqlens.dtype != torch.int32 or not len(cu_seqlens) or cu_seqlens.stride(0) != 1:
        raise ValueError(
            "cu_seqlens must have shape [S+1], dtype int32 and stride 1, "
            f"got {list(cu_seqlens.shape)}, {cu_seqlens.dtype}, strides {list(cu_seqlens.stride())}"
        )
    if qkv.device != cu_seqlens.device:
        raise ValueError(f"qkv and cu_seqlens must be on one device, got {qkv.device} and {cu_seqlens.device}")
    if len(cu_seqlens) == 1 and len(qkv):
        raise ValueError(f"cu_seqlens must rise from 0 to the number of tokens {len(qkv)}, got no sequence")
    flat = [int(n) for group in groups or () for n in group]
    counts, lengths = flat[::2], flat[1::2]
    tokens = sum(count * length for count, length in zip(counts, lengths, strict=True))
    if flat and (min(flat) < 0 or tokens != len(qkv) or sum(counts) != len(cu_seqlens) - 1):
        raise ValueError(
            f"groups must be (number of sequences, tokens of each), together the {len(cu_seqlens) - 1} sequences and "
            f"{len(qkv)} tokens of cu_seqlens and qkv, got {list(groups or ())[:8]}"
        )
    scale = qkv.shape[3] ** -0.5 if scale is None else float(scale)
    return torch.ops.dino_kernels.attention(qkv, cu_seqlens, flat, scale)[0]


def attention_reference(
    qkv: Tensor,
    cu_seqlens: Tensor,
    *,
    scale: float | None = None,
    groups: Sequence[tuple[int, int]] | None = None,
) -> Tensor:
    """`attention` in plain PyTorch, a sequence at a time; `groups` tells it nothing new."""
    scale = qkv.shape[3] ** -0.5 if scale is None else scale
    outs = []
    for sequence in qkv.split(cu_seqlens.diff().tolist()):
        q, k, v = sequence.permute(1, 2, 0, 3)
        outs.append(((q @ k.transpose(-2, -1) * scale).softmax(dim=-1) @ v).transpose(0, 1))
    return torch.cat(outs)


# --- registration ------------------------------------------------------------------------------------


@custom_op(
    "attention",
    triton="attention.forward_triton",
    cuda="attention.forward_cuda",
    fits=lambda qkv, _, groups, scale: fits_cuda(qkv, groups, scale),
)
def _attention(qkv: Tensor, cu_seqlens: Tensor, groups: list[int], scale: float) -> tuple[Tensor, Tensor]:
    """(out [T, H, D], lse [H, T] float32)"""
    return _forward_cpu(qkv, cu_seqlens, groups, scale)


@_attention.register_fake
def _(qkv, cu_seqlens, groups, scale):
    return _outputs(qkv)


@custom_op(
    "attention_backward_",
    mutates_args=("sums",),
    triton="attention.backward_triton",
    cuda="attention.backward_cuda",
    fits=lambda grad, qkv, out, lse, bounds, groups, scale, sums: fits_cuda(qkv, groups, scale, grad),
)
def _attention_backward_(
    grad_out: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    groups: list[int],
    scale: float,
    sums: Tensor | None,
) -> Tensor:
    """The gradient of qkv; its sums over T are added to sums [3 H D], float32: the gradient of a bias of qkv."""
    return _backward_cpu(grad_out, qkv, out, lse, cu_seqlens, groups, scale, sums)


@_attention_backward_.register_fake
def _(grad_out, qkv, out, lse, cu_seqlens, groups, scale, sums):
    return qkv.new_empty(qkv.shape)


def _outputs(qkv: Tensor) -> tuple[Tensor, Tensor]:
    tokens, _, heads, channels = qkv.shape
    return qkv.new_empty(tokens, heads, channels), qkv.new_empty(heads, tokens, dtype=torch.float32)


def _setup(ctx, inputs, output) -> None:
    qkv, cu_seqlens, ctx.groups, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(qkv, *output, cu_seqlens)


def _backward(ctx, grad_out, _):
    qkv, out, lse, cu_seqlens = ctx.saved_tensors
    grad = torch.ops.dino_kernels.attention_backward_(
        grad_out.contiguous(), qkv, out, lse, cu_seqlens, ctx.groups, ctx.scale, None
    )
    return grad, None, None, None


_attention.register_autograd(_backward, setup_context=_setup)


# --- CPU ---------------------------------------------------------------------------------------------

_BF16_PRODUCTS = Products.amx  # of bfloat16 tensors, or what the processor has instead


def _forward_cpu(qkv, cu_seqlens, groups, scale):
    _check_bounds(len(qkv), cu_seqlens, groups)
    out, lse = _outputs(qkv)
    _C.attention(**_arguments(qkv, cu_seqlens, scale, out, lse))
    return out, lse


def _backward_cpu(grad_out, qkv, out, lse, cu_seqlens, groups, scale, sums):
    assert grad_out.is_contiguous() and out.is_contiguous() and lse.is_contiguous()
    _check_bounds(len(qkv), cu_seqlens, groups)
    grad = qkv.new_empty(qkv.shape)
    arguments = _arguments(qkv, cu_seqlens, scale, out, lse)
    _C.attention_backward(**arguments, grad_out=grad_out.data_ptr(), grad=grad.data_ptr())
    if sums is not None:
        add_column_sums_cpu(sums, grad)
    return grad


def _arguments(qkv: Tensor, cu_seqlens: Tensor, scale: float, out: Tensor, lse: Tensor) -> dict[str, Any]:
    """Those that the forward and the backward pass have in common."""
    tokens, _, heads, channels = qkv.shape
    token_stride, part_stride, head_stride, _ = qkv.stride()
    return {
        "qkv": qkv.data_ptr(),
        "bounds": cu_seqlens.data_ptr(),
        "out": out.data_ptr(),
        "lse": lse.data_ptr(),
        "sequences": len(cu_seqlens) - 1,
        "tokens": tokens,
        "heads": heads,
        "channels": channels,
        "token_stride": token_stride,
        "part_stride": part_stride,
        "head_stride": head_stride,
        "dtype": DTYPES[qkv.dtype],
        "scale": scale,
        "products": _BF16_PRODUCTS,
        "threads": torch.get_num_threads(),
    }


def _check_bounds(tokens: int, cu_seqlens: Tensor, groups: list[int]) -> None:
    bounds = cu_seqlens.tolist()
    lengths = [end - begin for begin, end in zip(bounds, bounds[1:], strict=False)]
    if bounds[0] != 0 or bounds[-1] != tokens or min(lengths, default=0) < 0:
        raise ValueError(
            f"cu_seqlens must rise from 0 to the number of tokens {tokens}, got {bounds[:8]}...{bounds[-1]}"
        )
    if groups and lengths != [n for count, n in zip(groups[::2], groups[1::2], strict=True) for _ in range(count)]:
        raise ValueError(f"groups {groups} (counts and lengths) are not the lengths that cu_seqlens says")
