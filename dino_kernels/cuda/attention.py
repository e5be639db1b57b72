"""The CUDA C++ kernels of attention over short sequences, csrc/cuda/attention_short.cu."""

from typing import Any

import torch
from torch import Tensor

from dino_kernels._core import backends
from dino_kernels._core.native import DTYPES

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
    backends.kernels().attention_short(**_arguments(qkv, groups, scale, out, lse))
    return out, lse


def backward_cuda(grad_out, qkv, out, lse, cu_seqlens, groups, scale, sums):
    assert grad_out.is_contiguous() and out.is_contiguous() and lse.is_contiguous()
    grad = qkv.new_empty(qkv.shape)
    arguments = _arguments(qkv, groups, scale, out, lse)
    backends.kernels().attention_short_backward(**arguments, grad_out=grad_out.data_ptr(), grad=grad.data_ptr())
    if sums is not None:
        from dino_kernels.triton.column_sums import add_column_sums

        add_column_sums(grad.flatten(1), sums)
    return grad


def _arguments(qkv: Tensor, groups: list[int], scale: float, out: Tensor, lse: Tensor) -> dict[str, Any]:
    """Those that the forward and the backward pass have in common."""
    token_stride, part_stride, head_stride, _ = qkv.stride()
    return {
        "qkv": qkv.data_ptr(),
        "out": out.data_ptr(),
        "lse": lse.data_ptr(),
        "tokens": qkv.shape[0],
        "heads": qkv.shape[2],
        "token_stride": token_stride,
        "part_stride": part_stride,
        "head_stride": head_stride,
        "dtype": DTYPES[qkv.dtype],
        "scale": scale,
        "groups": groups,
        "stream": backends.stream(),
    }
