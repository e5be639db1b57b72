"""Triton kernels of add_layer_norm; formulas in dino_kernels/ops/add_layer_norm.py."""

import torch
import triton
import triton.language as tl

from dino_kernels._core.results import empty_gradients, empty_outputs
from dino_kernels.triton.column_sums import add_partial_sums

__all__ = ["backward_triton", "forward_triton"]

_PROGRAMS = 264  # of the backward pass: two on each multiprocessor of an H100 or H200, and the same sums on any chip


@triton.jit
def _row_of(places, rows, c, T, C):
    """The row that tokens have in a tensor (negative: none), where its channels are, and which of them there are."""
    row = rows
    if places is not None:
        row = tl.load(places + rows, rows < T, other=-1)
    return row, row[:, None].to(tl.int64) * C + c[None, :], ((rows < T) & (row >= 0))[:, None] & (c < C)[None, :]


@triton.jit
def _forward_kernel(
    x, branch, weight, bias, scale, added, made, total, normed, mean, rstd, eps, T, C,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS whole rows a program."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, BLOCK)
    at = rows[:, None].to(tl.int64) * C + c[None, :]
    mask = (rows < T)[:, None] & (c < C)[None, :]
    t = tl.load(x + at, mask, other=0.0).to(tl.float32)
    row, at_row, mask_row = _row_of(added, rows, c, T, C)
    b = tl.load(branch + at_row, mask_row, other=0.0).to(tl.float32)
    if scale is not None:
        b *= tl.load(scale + row, (rows < T) & (row >= 0), other=0.0)[:, None]
    rounded = (t + b).to(total.dtype.element_ty)
    tl.store(total + at, rounded, mask)
    t = rounded.to(tl.float32)
    m = tl.sum(t, axis=1) / C
    centered = tl.where(mask, t - m[:, None], 0.0)
    r = tl.rsqrt(tl.sum(centered * centered, axis=1) / C + eps)
    row, at_row, mask_row = _row_of(made, rows, c, T, C)
    tl.store(mean + row, m, (rows < T) & (row >= 0))
    tl.store(rstd + row, r, (rows < T) & (row >= 0))
    w = tl.load(weight + c, c < C, other=0.0)[None, :]
    y = centered * r[:, None] * w + tl.load(bias + c, c < C, other=0.0)[None, :]
    tl.store(normed + at_row, y.to(normed.dtype.element_ty), mask_row)


@triton.jit
def _backward_kernel(
    grad_total, grad_normed, total, mean, rstd, weight, scale, added, made, grad_x, grad_branch, partial, T, C,
    SUMS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Every so many blocks of ROWS rows a program, and their share of the gradients of weight and bias; and, of three
    SUMS, of those of the branch."""
    c = tl.arange(0, BLOCK)
    w = tl.load(weight + c, c < C, other=0.0)[None, :]
    grad_w = tl.zeros((ROWS, BLOCK), tl.float32)
    grad_b = tl.zeros((ROWS, BLOCK), tl.float32)
    of_branch = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(tl.program_id(0) * ROWS, T, tl.num_programs(0) * ROWS):
        rows = first + tl.arange(0, ROWS)
        at = rows[:, None].to(tl.int64) * C + c[None, :]
        mask = (rows < T)[:, None] & (c < C)[None, :]
        row, at_row, mask_row = _row_of(made, rows, c, T, C)
        g = tl.load(grad_normed + at_row, mask_row, other=0.0).to(tl.float32)
        t = tl.load(total + at, mask, other=0.0).to(tl.float32)
        m = tl.load(mean + row, (rows < T) & (row >= 0), other=0.0)[:, None]
        r = tl.load(rstd + row, (rows < T) & (row >= 0), other=0.0)[:, None]
        xhat = (t - m) * r
        grad_w += g * xhat
        grad_b += g
        g *= w
        mean_g = (tl.sum(g, axis=1) / C)[:, None]
        mean_gx = (tl.sum(g * xhat, axis=1) / C)[:, None]
        d = (g - mean_g - xhat * mean_gx) * r
        if grad_total is not None:
            d += tl.load(grad_total + at, mask, other=0.0).to(tl.float32)
        tl.store(grad_x + at, d.to(grad_x.dtype.element_ty), mask)
        if grad_branch is not None:
            row, at_row, mask_row = _row_of(added, rows, c, T, C)
            if scale is not None:
                d *= tl.load(scale + row, (rows < T) & (row >= 0), other=0.0)[:, None]
            elif added is not None:
                d = tl.where(mask_row, d, 0.0)
            tl.store(grad_branch + at_row, d.to(grad_branch.dtype.element_ty), mask_row)
        if SUMS == 3:
            of_branch += d
    sums = partial + tl.program_id(0) * SUMS * C + c
    tl.store(sums, tl.sum(grad_w, axis=0), c < C)
    tl.store(sums + C, tl.sum(grad_b, axis=0), c < C)
    if SUMS == 3:
        tl.store(sums + 2 * C, tl.sum(of_branch, axis=0), c < C)


def _tile(channels: int) -> dict[str, int]:
    """16 elements a thread: rows short of 2048 channels share a program. Without fused multiply-adds all lanes that
    share a row's sum hold the same."""
    block = triton.next_power_of_2(channels)
    warps = max(4, block // 512)
    return {"ROWS": max(1, 2048 // block), "BLOCK": block, "num_warps": warps, "enable_fp_fusion": False}


def _places(rows, tokens):
    """Of each token its row in a tensor that has these, or -1; None for all."""
    if rows is None:
        return None
    places = torch.full((tokens,), -1, dtype=torch.int32, device=rows.device)
    return places.index_copy_(0, rows.long(), torch.arange(len(rows), dtype=torch.int32, device=rows.device))


def forward_triton(x, branch, weight, bias, scale, rows, normed_rows, eps):
    outputs = empty_outputs(x, branch, normed_rows)
    tokens, channels = x.shape
    if tokens:
        tile = _tile(channels)
        grid = (triton.cdiv(tokens, tile["ROWS"]),)
        places = _places(rows, tokens), _places(normed_rows, tokens)
        _forward_kernel[grid](x, branch, weight, bias, scale, *places, *outputs, eps, tokens, channels, **tile)
    return outputs


def backward_triton(
    grad_total, grad_normed, total, mean, rstd, weight, scale, rows, normed_rows, grad_weight, grad_bias, branch_sums
):
    grad_x, grad_branch = empty_gradients(grad_normed, total, scale, rows)
    tokens, channels = total.shape
    tile = _tile(channels)
    tile["num_warps"] *= 2  # 8 elements a thread: each takes part in three sums that stay in registers
    programs = min(_PROGRAMS, triton.cdiv(tokens, tile["ROWS"]))
    into = (grad_weight, grad_bias) if branch_sums is None else (grad_weight, grad_bias, branch_sums)
    partial = weight.new_empty(programs, len(into), channels)
    if tokens:
        _backward_kernel[(programs,)](
            grad_total, grad_normed, total, mean, rstd, weight, scale, _places(rows, tokens),
            _places(normed_rows, tokens), grad_x, grad_branch if grad_branch.numel() else None, partial,
            tokens, channels, SUMS=len(into), **tile,
        )  # fmt: skip
        add_partial_sums(partial, *into)
    return grad_x, grad_branch
