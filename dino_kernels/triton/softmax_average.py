"""Softmax averages of rows of a matrix, as flash attention forms them, over shares of the rows, and their merge."""

import triton
import triton.language as tl

from dino_kernels.triton.common import LOG2_E, LOWEST, operand, scalar

__all__ = ["average", "merge", "shares", "tile"]


@triton.jit
def tile(x, first, i, d, count, D: tl.constexpr, WIDEN: tl.constexpr):
    """Rows first + i of a matrix [count, D] as an operand. Offsets within it are constants: one address a thread."""
    mask = (i < count - first)[:, None]
    if d.shape[0] != D:
        mask &= (d < D)[None, :]
    return operand(tl.load(x + tl.cast(first, tl.int64) * D + i[:, None] * D + d[None, :], mask, other=0.0), WIDEN)


@triton.jit
def average(
    z, weight, values, center, temp, averages, stats, rows, row_tile, split, outputs, share,
    D: tl.constexpr, TEACHER: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Of a tile of rows and `share` outputs: their softmax average of values' rows, and (max, sum of exponentials)."""
    i, j, d = tl.arange(0, ROWS), tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    r = row_tile * ROWS + i
    scale = LOG2_E / scalar(temp)
    q = tile(z, row_tile * ROWS, i, d, rows, D, WIDEN)
    high = tl.full((ROWS,), LOWEST, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    mean = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for start in range(split * share, tl.minimum((split + 1) * share, outputs), BLOCK):
        k = start + j
        w = tile(weight, start, j, d, outputs, D, WIDEN)
        x = tl.dot(q, tl.trans(w), input_precision=PRECISION)
        if TEACHER:
            x -= tl.load(center + k, k < outputs, other=0.0)[None, :]
            w = tile(values, start, j, d, outputs, D, WIDEN)
        x = tl.where((k < outputs)[None, :], x, float("-inf"))
        higher = tl.maximum(high, tl.max(x, axis=1) * scale)
        p = tl.exp2(tl.fma(x, scale, -higher[:, None]))
        shrink = tl.exp2(high - higher)
        total = total * shrink + tl.sum(p, axis=1)
        mean = mean * shrink[:, None] + tl.dot(p.to(w.dtype), w, input_precision=PRECISION)
        high = higher
    at = split.to(tl.int64) * rows + r
    mean = (mean / total[:, None]).to(averages.dtype.element_ty)
    tl.store(averages + at[:, None] * D + d[None, :], mean, (r < rows)[:, None] & (d < D)[None, :])
    tl.store(stats + 2 * at, high, r < rows)
    tl.store(stats + 2 * at + 1, total, r < rows)


@triton.jit
def merge(averages, stats, row, rows, d, D, splits, SPLITS: tl.constexpr):
    """(average, max, sum of exponentials) of a row over all outputs; maxima in exp2's unit."""
    i = tl.arange(0, SPLITS)
    at = i.to(tl.int64) * rows + row
    high = tl.load(stats + 2 * at, i < splits, other=LOWEST)
    top = tl.max(high, axis=0)
    part = tl.load(stats + 2 * at + 1, i < splits, other=0.0) * tl.exp2(high - top)
    total = tl.sum(part, axis=0)
    mask = (i < splits)[:, None] & (d < D)[None, :]
    means = tl.load(averages + at[:, None] * D + d[None, :], mask, other=0.0).to(tl.float32)
    return tl.sum(means * part[:, None], axis=0) / total, top, total


def shares(outputs: int, most: int) -> tuple[int, int]:
    """(outputs of each share, a multiple of all blocks; number of shares)"""
    blocks = triton.cdiv(outputs, 64)
    share = 64 * triton.cdiv(blocks, max(1, most))
    return share, triton.cdiv(outputs, share)
