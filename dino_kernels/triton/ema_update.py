"""Triton kernel of ema_update_; formula in dino_kernels/ops/ema_update.py."""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from dino_kernels._core.native import DTYPES
from dino_kernels.triton.common import blend, blend_arguments

__all__ = ["update_triton"]

_BLOCK = 4096  # elements a program


@triton.jit
def _ema_kernel(blocks, momentum, rest, BLOCK: tl.constexpr):
    """One program a block of one tensor. A row of blocks [programs, 4], int64: the block's addresses in target and
    source, its size, the source's dtype (numbers of DTYPES)."""
    row = blocks + 4 * tl.program_id(0)
    target = tl.load(row).to(tl.pointer_type(tl.float32))
    source = tl.load(row + 1)
    offset = tl.arange(0, BLOCK)
    mask = offset < tl.load(row + 2).to(tl.int32)
    dtype = tl.load(row + 3)
    if dtype == 0:
        s = tl.load(source.to(tl.pointer_type(tl.float32)) + offset, mask)
    elif dtype == 1:
        s = tl.load(source.to(tl.pointer_type(tl.float16)) + offset, mask).to(tl.float32)
    else:
        s = tl.load(source.to(tl.pointer_type(tl.bfloat16)) + offset, mask).to(tl.float32)
    m, one_minus_m = blend(momentum, rest)
    t = tl.load(target + offset, mask)
    tl.store(target + offset, m * t + one_minus_m * s, mask)


@cache
def _table(rows: tuple[tuple[int, int, int, torch.dtype], ...], device: torch.device) -> Tensor:
    """The kernel's table. Kept, since a training run asks for the same every step: no upload, and a captured CUDA graph
    finds it where it was."""
    blocks = [
        (target + 4 * start, source + dtype.itemsize * start, min(_BLOCK, size - start), DTYPES[dtype])
        for size, target, source, dtype in rows
        for start in range(0, size, _BLOCK)
    ]
    return torch.tensor(blocks, dtype=torch.int64, device="cpu").to(device)


def update_triton(targets, sources, momentum):
    rows = tuple(
        (t.numel(), t.data_ptr(), s.data_ptr(), s.dtype) for t, s in zip(targets, sources, strict=True) if t.numel()
    )
    if rows:
        blocks = _table(rows, targets[0].device)
        _ema_kernel[(len(blocks),)](blocks, *blend_arguments(momentum), BLOCK=_BLOCK, num_warps=8)
