"""Triton kernel of ema_update_; formula in dino_kernels/ema_update.py."""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from dino_kernels._native import DTYPES
from dino_kernels._triton import blend, blend_arguments, owner

__all__ = ["update_triton"]

_BLOCK = 4096  # elements a program


@triton.jit
def _ema_kernel(table, tensors, momentum, rest, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    """One program a block of one tensor. Rows of table [5, tensors], int64: the tensor's first program, its
    size, the addresses of target and source, the source's dtype (numbers of DTYPES)."""
    program = tl.program_id(0)
    low = owner(table, tensors, program, STEPS)
    offset = (program - tl.load(table + low)) * BLOCK + tl.arange(0, BLOCK)
    mask = offset < tl.load(table + tensors + low)
    target = tl.load(table + 2 * tensors + low).to(tl.pointer_type(tl.float32))
    source = tl.load(table + 3 * tensors + low)
    dtype = tl.load(table + 4 * tensors + low)
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
def _table(rows: tuple[tuple[int, int, int, int], ...], device: torch.device) -> tuple[Tensor, int]:
    """The kernel's table and its number of programs. Kept, since a training run asks for the same every step:
    no upload, and a captured CUDA graph finds it where it was."""
    first, columns = 0, []
    for size, target, source, dtype in rows:
        columns.append((first, size, target, source, dtype))
        first += triton.cdiv(size, _BLOCK)
    return torch.tensor(columns, dtype=torch.int64, device="cpu").T.contiguous().to(device), first


def update_triton(targets, sources, momentum):
    rows = tuple(
        (t.numel(), t.data_ptr(), s.data_ptr(), DTYPES[s.dtype])
        for t, s in zip(targets, sources, strict=True)
        if t.numel()
    )
    if rows:
        table, programs = _table(rows, targets[0].device)
        steps = len(rows).bit_length()
        _ema_kernel[(programs,)](table, len(rows), *blend_arguments(momentum), STEPS=steps, BLOCK=_BLOCK, num_warps=8)
