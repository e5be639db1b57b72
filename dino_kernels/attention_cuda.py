"""The CUDA C++ kernels of attention over short sequences, csrc/cuda/attention_short.cu."""

import torch
from torch import Tensor

from dino_kernels import _cuda
from dino_kernels._native import DTYPES

__all__ = ["backward_cuda", "fits_cuda", "forward_cuda"]

_LONGEST = 256


def fits_cuda(qkv: Tensor, groups: list[int], scale: float, *others: Tensor) -> bool:
    """Whether the kernels take these arguments; others: contiguous."""
    plain = qkv.dtype in (torch.float16, torch.bfloat16) and qkv.shape[3] == 64 and scale > 0
    short = bool(groups) and max(groups[1::2]) <= _LONGEST
    whole = all(x.data_ptr() % 16 == 0 for x in (qkv, *others)) and all(n % 8 == 0 for n in qkv.stride()[:3])
    return plain and short and whole


def forward_cuda(qkv, cu_seqlens, groups, scale):
    tokens, _, heads, channels = qkv.shape
    out, lse = qkv.new_empty(tokens, heads, channels), qkv.new_empty(heads, tokens, dtype=torch.float32)
    _run(qkv, groups, scale, out, lse)
    return out, lse


def backward_cuda(grad_out, qkv, out, lse, cu_seqlens, groups, scale, sums):
    assert grad_out.is_contiguous() and out.is_contiguous() and lse.is_contiguous()
    grad = qkv.new_empty(qkv.shape)
    _run(qkv, groups, scale, out, lse, grad_out, grad)
    if sums is not None:
        from dino_kernels.column_sums_triton import add_column_sums

        add_column_sums(grad.flatten(1), sums)
    return grad


def _run(qkv: Tensor, groups: list[int], scale: float, *others: Tensor) -> None:
    """The forward pass, or with the gradients after out and lse the backward pass."""
    _cuda.kernels().attention_short(
        [x.data_ptr() for x in (qkv, *others)],
        [len(qkv), qkv.shape[2], *qkv.stride()[:3]],
        DTYPES[qkv.dtype],
        scale,
        groups,
        _cuda.stream(),
    )
