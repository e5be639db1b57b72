"""Triton kernels that sum columns: of a matrix, and of the partial sums that the programs of another kernel leave.

Both in a fixed order, the same on any chip.
"""

import triton
import triton.language as tl

__all__ = ["add_column_sums", "add_partial_sums"]

_PROGRAMS = 1056  # eight on each multiprocessor of an H100 or H200


@triton.jit
def _matrix_kernel(x, partial, T, C, groups, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK columns and every so many blocks of ROWS rows a program."""
    blocks = tl.cdiv(C, BLOCK)
    group = tl.program_id(0) // blocks
    c = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(group * ROWS, T, groups * ROWS):
        rows = first + tl.arange(0, ROWS)
        at = rows[:, None].to(tl.int64) * C + c[None, :]
        total += tl.load(x + at, (rows < T)[:, None] & (c < C)[None, :], other=0.0).to(tl.float32)
    tl.store(partial + group * C + c, tl.sum(total, axis=0), c < C)


@triton.jit(do_not_specialize=["groups", "C"])  # small; one compilation serves all
def _partial_kernel(
    partial, first, second, third, groups, C, OVERWRITE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Sums of partial [groups, vectors, C], BLOCK columns a program, are added to the vectors, or written."""
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    which = tl.program_id(1)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, groups, ROWS):
        rows = start + tl.arange(0, ROWS)
        at = (rows * tl.num_programs(1) + which)[:, None] * C + c[None, :]
        total += tl.load(partial + at, (rows < groups)[:, None] & (c < C)[None, :], other=0.0)
    into = tl.where(which == 0, first, tl.where(which == 1, second, third)) + c
    sums = tl.sum(total, axis=0)
    if not OVERWRITE:
        sums += tl.load(into, c < C, other=0.0)
        tl.debug_barrier()  # all threads that share an element have read it before one of them replaces it
    tl.store(into, sums, c < C)


def add_partial_sums(partial, *into, overwrite=False):
    """partial: float32 [groups, vectors, C], contiguous; into: one to three float32 [C]."""
    groups, count, channels = partial.shape
    grid = (triton.cdiv(channels, 16), count)
    first, second, third = (*into, *into[:1], *into[:1])[:3]
    tile = {"ROWS": 256, "BLOCK": 16, "num_warps": 4}
    _partial_kernel[grid](partial, first, second, third, groups, channels, OVERWRITE=overwrite, **tile)


def add_column_sums(x, into):
    """x: [T, C], contiguous; into: float32 [C]."""
    tokens, channels = x.shape
    block = min(128, triton.next_power_of_2(channels))
    rows, blocks = 4096 // block, triton.cdiv(channels, block)
    groups = min(triton.cdiv(_PROGRAMS, blocks), triton.cdiv(tokens, rows))
    partial = into.new_empty(groups, 1, channels)
    if groups:
        _matrix_kernel[(groups * blocks,)](x, partial, tokens, channels, groups, ROWS=rows, BLOCK=block, num_warps=4)
    add_partial_sums(partial, into)
