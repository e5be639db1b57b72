"""Triton kernels of column_mass; formulas in dino_kernels/ops/column_mass.py.

Each program has a share of the rows, and a last kernel adds the shares up, in a fixed order, the same on any chip. With
a center, a row of few outputs stays in the registers of a program; longer rows are read twice: for their log-sum-exp,
and then by programs that have some of the columns.
"""

import torch
import triton
import triton.language as tl

from dino_kernels.triton.common import LOG2_E, LOWEST, argument, scalar, warp_size

__all__ = ["forward_triton"]

_PROGRAMS = 264  # with whole rows: two on each multiprocessor of an H100 or H200
_WHOLE = 8192  # outputs of the longest row that a program holds


@triton.jit
def _whole_row_kernel(logits, center, counted, temp, partial, rows, outputs, stride, COLUMNS: tl.constexpr):
    """partial[program] = sum of softmax((row - center) / temp) over every so many rows."""
    k = tl.arange(0, COLUMNS)
    scale = LOG2_E / scalar(temp)
    c = tl.load(center + k, k < outputs, other=0.0)
    total = tl.zeros((COLUMNS,), tl.float32)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        read = True
        if counted is not None:
            read = tl.load(counted + row) != 0
        if read:
            s = tl.load(logits + tl.cast(row, tl.int64) * stride + k, k < outputs, other=float("-inf")).to(tl.float32)
            x = (s - c) * scale
            e = tl.exp2(x - tl.max(x, axis=0))
            total += e * (1.0 / tl.sum(e, axis=0))
    tl.store(partial + tl.program_id(0).to(tl.int64) * outputs + k, total, k < outputs)


@triton.jit
def _row_kernel(
    logits, center, counted, temp, shifts, outputs, stride,
    STEP: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """A row's log2 of the sum of 2^((row - center) log2(e) / temp), one row a program."""
    row = tl.program_id(0)
    scale = LOG2_E / scalar(temp)
    logits += row.to(tl.int64) * stride
    tile = tl.arange(0, STEP)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    high = tl.full((LANES,), LOWEST, tl.float32)
    total = tl.zeros((LANES,), tl.float32)
    end = outputs
    if counted is not None:
        end = tl.where(tl.load(counted + row) != 0, outputs, 0)
    for start in range(0, end, STEP * LANES):
        k = start + tile
        s = tl.load(logits + k, k < outputs, other=float("-inf")).to(tl.float32)
        x = (s - tl.load(center + k, k < outputs, other=0.0)) * scale
        higher = tl.maximum(high, tl.max(x, axis=0))
        total = total * tl.exp2(high - higher) + tl.sum(tl.exp2(x - higher[None, :]), axis=0)
        high = higher
    top = tl.max(high, axis=0)
    tl.store(shifts + row, top + tl.log2(tl.sum(total * tl.exp2(high - top), axis=0)))


@triton.jit
def _column_kernel(
    logits, center, counted, temp, shifts, partial, rows, outputs, stride, share,
    STEP: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Of a block of columns and a share of the rows: partial [shares, K], the sum of 2^((row - center) log2(e) / temp -
    shift), or, without a center, [shares, 2, K], the maximum and the sum of exp((row - maximum) / temp)."""
    k = tl.program_id(0) * LANES + tl.arange(0, LANES)
    part = tl.program_id(1).to(tl.int64)
    scale = LOG2_E / scalar(temp)
    high = tl.full((LANES,), LOWEST, tl.float32)
    total = tl.zeros((LANES,), tl.float32)
    if center is not None:
        c = tl.load(center + k, k < outputs, other=0.0)
    first = tl.program_id(1) * share
    end = tl.minimum(first + share, rows)
    for start in range(first, end, STEP):
        r = start + tl.arange(0, STEP)
        read = r < end
        if counted is not None:
            read &= tl.load(counted + r, read, other=0) != 0
        mask = read[:, None] & (k < outputs)[None, :]
        s = tl.load(logits + r[:, None].to(tl.int64) * stride + k[None, :], mask, other=float("-inf")).to(tl.float32)
        if center is not None:
            shift = tl.load(shifts + r, read, other=0.0)
            total += tl.sum(tl.exp2((s - c[None, :]) * scale - shift[:, None]), axis=0)
        else:
            higher = tl.maximum(high, tl.max(s, axis=0))
            total *= tl.exp2((high - higher) * scale)
            total += tl.sum(tl.exp2((s - higher[None, :]) * scale), axis=0)
            high = higher
    if center is not None:
        tl.store(partial + part * outputs + k, total, k < outputs)
    else:
        tl.store(partial + 2 * part * outputs + k, high, k < outputs)
        tl.store(partial + (2 * part + 1) * outputs + k, total, k < outputs)


@triton.jit
def _total_kernel(
    partial, mass, temp, shares, outputs, CENTERED: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr
):
    """mass [2, K] of a block of columns over all shares."""
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    scale = LOG2_E / scalar(temp)
    high = tl.full((BLOCK,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, shares, STEP):
        i = start + tl.arange(0, STEP)
        mask = (i < shares)[:, None] & (k < outputs)[None, :]
        if CENTERED:
            total += tl.sum(tl.load(partial + i[:, None].to(tl.int64) * outputs + k[None, :], mask, other=0.0), axis=0)
        else:
            at = partial + 2 * i[:, None].to(tl.int64) * outputs + k[None, :]
            tops = tl.load(at, mask, other=LOWEST)
            higher = tl.maximum(high, tl.max(tops, axis=0))
            sums = tl.load(at + outputs, mask, other=0.0) * tl.exp2((tops - higher[None, :]) * scale)
            total = total * tl.exp2((high - higher) * scale) + tl.sum(sums, axis=0)
            high = higher
    if CENTERED:
        high = tl.zeros((BLOCK,), tl.float32)
    tl.store(mass + k, tl.where(high > LOWEST, high, float("-inf")), k < outputs)
    tl.store(mass + outputs + k, total, k < outputs)


def forward_triton(logits, center, counted, temp):
    (rows, outputs), temp = logits.shape, argument(temp)
    mass = logits.new_empty(2, outputs, dtype=torch.float32)
    if center is not None and outputs <= _WHOLE:
        shares, columns = min(rows, _PROGRAMS), max(1024, triton.next_power_of_2(outputs))
        partial = mass.new_empty(shares, outputs)
        _whole_row_kernel[(shares,)](
            logits, center, counted, temp, partial, rows, outputs, logits.stride(0),
            COLUMNS=columns, num_warps=max(4, columns // (16 * warp_size())),
        )  # fmt: skip
    else:
        shifts = None
        if center is not None:
            shifts = mass.new_empty(rows)
            lanes = max(512, min(8192, triton.next_power_of_2(triton.cdiv(outputs, 4))))
            _row_kernel[(rows,)](
                logits, center, counted, temp, shifts, outputs, logits.stride(0),
                STEP=2, LANES=lanes, num_warps=lanes // (8 * warp_size()),
            )  # fmt: skip
        # A thread has eight columns of four rows at a time; more would spill.
        lanes, step = 1024, 4
        blocks = triton.cdiv(outputs, lanes)
        share = step * triton.cdiv(rows, step * triton.cdiv(2 * _PROGRAMS, blocks))
        shares = triton.cdiv(rows, share)
        partial = mass.new_empty(shares, 2 if center is None else 1, outputs)
        _column_kernel[(blocks, shares)](
            logits, center, counted, temp, shifts, partial, rows, outputs, logits.stride(0), share,
            STEP=step, LANES=lanes, num_warps=lanes // (8 * warp_size()),
        )  # fmt: skip
    _total_kernel[(triton.cdiv(outputs, 64),)](
        partial, mass, temp, shares, outputs,
        CENTERED=center is not None, STEP=min(32, triton.next_power_of_2(shares)), BLOCK=64, num_warps=4,
    )  # fmt: skip
    return mass
