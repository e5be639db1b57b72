"""Triton kernels of add_layer_norm; formulas in dino_kernels/add_layer_norm.py."""

import triton
import triton.language as tl

from dino_kernels.add_layer_norm import empty_gradients, empty_outputs

__all__ = ["backward_triton", "forward_triton"]

_PROGRAMS = 528  # of the backward pass: four on each multiprocessor of an H100 or H200, and the same sums on any chip


@triton.jit
def _forward_kernel(
    x, branch, weight, bias, scale, total, normed, mean, rstd, eps, T, C, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """ROWS whole rows a program."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, BLOCK)
    at = rows[:, None].to(tl.int64) * C + c[None, :]
    mask = (rows < T)[:, None] & (c < C)[None, :]
    t = tl.load(x + at, mask, other=0.0).to(tl.float32)
    b = tl.load(branch + at, mask, other=0.0).to(tl.float32)
    if scale is not None:
        b *= tl.load(scale + rows, rows < T, other=0.0)[:, None]
    rounded = (t + b).to(total.dtype.element_ty)
    tl.store(total + at, rounded, mask)
    t = rounded.to(tl.float32)
    m = tl.sum(t, axis=1) / C
    centered = tl.where(mask, t - m[:, None], 0.0)
    r = tl.rsqrt(tl.sum(centered * centered, axis=1) / C + eps)
    tl.store(mean + rows, m, rows < T)
    tl.store(rstd + rows, r, rows < T)
    w = tl.load(weight + c, c < C, other=0.0)[None, :]
    y = centered * r[:, None] * w + tl.load(bias + c, c < C, other=0.0)[None, :]
    tl.store(normed + at, y.to(normed.dtype.element_ty), mask)


@triton.jit
def _backward_kernel(
    grad_total, grad_normed, total, mean, rstd, weight, scale, grad_x, grad_branch, partial, T, C,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Every so many blocks of ROWS rows a program, and their share of the gradients of weight and bias."""
    c = tl.arange(0, BLOCK)
    w = tl.load(weight + c, c < C, other=0.0)[None, :]
    grad_w = tl.zeros((ROWS, BLOCK), tl.float32)
    grad_b = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(tl.program_id(0) * ROWS, T, tl.num_programs(0) * ROWS):
        rows = first + tl.arange(0, ROWS)
        at = rows[:, None].to(tl.int64) * C + c[None, :]
        mask = (rows < T)[:, None] & (c < C)[None, :]
        g = tl.load(grad_normed + at, mask, other=0.0).to(tl.float32)
        t = tl.load(total + at, mask, other=0.0).to(tl.float32)
        m = tl.load(mean + rows, rows < T, other=0.0)[:, None]
        r = tl.load(rstd + rows, rows < T, other=0.0)[:, None]
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
            if scale is not None:
                d *= tl.load(scale + rows, rows < T, other=0.0)[:, None]
            tl.store(grad_branch + at, d.to(grad_branch.dtype.element_ty), mask)
    sums = partial + tl.program_id(0) * 2 * C + c
    tl.store(sums, tl.sum(grad_w, axis=0), c < C)
    tl.store(sums + C, tl.sum(grad_b, axis=0), c < C)


def _tile(channels: int) -> dict[str, int]:
    """16 elements a thread: rows short of 2048 channels share a program."""
    block = triton.next_power_of_2(channels)
    return {"ROWS": max(1, 2048 // block), "BLOCK": block, "num_warps": max(4, block // 512)}


def forward_triton(x, branch, weight, bias, scale, eps):
    outputs = empty_outputs(x, branch)
    tokens, channels = x.shape
    if tokens:
        tile = _tile(channels)
        grid = (triton.cdiv(tokens, tile["ROWS"]),)
        _forward_kernel[grid](x, branch, weight, bias, scale, *outputs, eps, tokens, channels, **tile)
    return outputs


def backward_triton(grad_total, grad_normed, total, mean, rstd, weight, scale):
    grad_x, grad_branch = empty_gradients(grad_normed, total, scale)
    tokens, channels = total.shape
    tile = _tile(channels)
    programs = min(_PROGRAMS, triton.cdiv(tokens, tile["ROWS"]))
    partial = weight.new_empty(programs, 2, channels)
    if tokens:
        _backward_kernel[(programs,)](
            grad_total, grad_normed, total, mean, rstd, weight, scale,
            grad_x, grad_branch if grad_branch.numel() else None, partial, tokens, channels, **tile,
        )  # fmt: skip
    return grad_x, grad_branch, partial.sum(0)
