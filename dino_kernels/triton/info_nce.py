"""Triton kernels of info_nce, where the formulas are.

Each tile of queries walks a share of the keys, which are keys and values of a flash average; then a program a row
merges its shares, and a positive that is not among the keys as one more.
"""

import torch
import triton
import triton.language as tl

from dino_kernels.triton.common import LOG2_E, LOWEST, argument, scalar, shared_memory
from dino_kernels.triton.softmax_average import average, merge, shares

__all__ = ["forward_triton"]


@triton.jit
def _share_kernel(
    query, keys, temp, averages, stats, rows, outputs, share, splits,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0)
    average(
        query, keys, keys, keys, temp, averages, stats, rows, i // splits, i % splits, outputs, share,
        D, False, ROWS, BLOCK, BLOCK_D, PRECISION, WIDEN,
    )  # fmt: skip


@triton.jit
def _positive_kernel(
    query, positive, keys, labels, temp, averages, stats, grad, losses, rows, splits, norm,
    D: tl.constexpr, SPLITS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One row a program: its loss and its gradient."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    if positive is not None:
        at = positive + row * D
    else:
        at = keys + tl.load(labels + row) * D
    k = tl.load(at + d, d < D, other=0.0).to(tl.float32)
    q = tl.load(query + row * D + d, d < D, other=0.0).to(tl.float32)
    scale = 1.0 / scalar(temp)
    target = tl.sum(q * k, axis=0) * (scale * LOG2_E)
    if positive is not None:
        mean, high, total = k, target, target * 0.0 + 1.0
    else:
        mean, high, total = k * 0.0, target * 0.0 + LOWEST, target * 0.0
    for start in range(0, splits, SPLITS):
        first = tl.cast(start, tl.int64) * rows
        part, top, part_total = merge(averages + first * D, stats + 2 * first, row, rows, d, D, splits - start, SPLITS)
        higher = tl.maximum(high, top)
        total *= tl.exp2(high - higher)
        part_total *= tl.exp2(top - higher)
        mean = (mean * total + part * part_total) / (total + part_total)
        total += part_total
        high = higher
    tl.store(losses + row, (high + tl.log2(total) - target) / LOG2_E * norm)
    tl.store(grad + row * D + d, ((mean - k) * (scale * norm)).to(grad.dtype.element_ty), d < D)


def forward_triton(query, positive, keys, labels, temp, scale):
    (rows, channels), outputs, temp = query.shape, len(keys), argument(temp)
    wide = query.dtype == torch.float32
    block_d = max(16, triton.next_power_of_2(channels))
    # Chosen so that nothing spills: float32 products have no tensor cores, blocks of 64 keys need Hopper's matrix
    # instruction.
    wgmma = shared_memory() > 200 << 10 and not wide
    tile, block = (16, 16) if wide else (64, 64 if wgmma else 32)
    tiles = triton.cdiv(rows, tile)
    share, splits = shares(outputs, 132 // tiles)  # a program on each multiprocessor of an H100 or H200
    averages = query.new_empty(splits, rows, channels, dtype=torch.float32)
    stats = averages.new_empty(splits, rows, 2)
    _share_kernel[(tiles * splits,)](
        query, keys, temp, averages, stats, rows, outputs, share, splits,
        D=channels, ROWS=tile, BLOCK=block, BLOCK_D=block_d, PRECISION="ieee" if wide else "tf32",
        WIDEN=triton.knobs.runtime.interpret, num_warps=4 if wgmma else 8, num_stages=2,
    )  # fmt: skip
    losses, grad = averages.new_empty(rows), torch.empty_like(query)
    # Without fusion a sum of products is the same in all lanes that hold it.
    _positive_kernel[(rows,)](
        query, positive, keys, labels, temp, averages, stats, grad, losses, rows, splits, scale / rows,
        D=channels, SPLITS=32, BLOCK_D=block_d, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return losses.sum(), grad
