"""Triton kernels of bias_gelu; formulas in dino_kernels/ops/bias_gelu.py."""

import torch
import triton
import triton.language as tl

from dino_kernels._core.results import empty_output
from dino_kernels.triton.column_sums import add_partial_sums

__all__ = ["backward_triton", "forward_triton", "gelu"]

_PROGRAMS = 3168  # of the backward pass: four times six on each multiprocessor of an H100 or H200, as many as fit


@triton.jit
def _clamped_magnitude(y):
    return tl.minimum(tl.abs(y), 8.0, propagate_nan=tl.PropagateNan.ALL)  # by default it would drop a NaN


@triton.jit
def _upper_tail(a):
    """Q(a) for 0 <= a <= 8; minimax in log2 Q, weighted by what an error there does to gelu."""
    p = 9.62331868e-08 * a - 2.69186603e-06
    p = p * a + 2.86689447e-05
    p = p * a - 0.000119625671
    p = p * a - 0.000318522827
    p = p * a + 0.00731778331
    p = p * a - 0.0526791997
    p = p * a - 0.459147513
    p = p * a - 1.15111184
    return tl.exp2(p * a - 1.0)


@triton.jit
def gelu(y):
    a = _clamped_magnitude(y)
    return tl.maximum(y, 0.0) - a * _upper_tail(a)


@triton.jit
def _forward_kernel(x, bias, out, T, C, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """A tile of ROWS x BLOCK a program."""
    blocks = tl.cdiv(C, BLOCK)
    rows = tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    at = rows[:, None].to(tl.int64) * C + c[None, :]
    mask = (rows < T)[:, None] & (c < C)[None, :]
    y = tl.load(x + at, mask, other=0.0).to(tl.float32)
    y += tl.load(bias + c, c < C, other=0.0).to(tl.float32)[None, :]
    tl.store(out + at, gelu(y).to(out.dtype.element_ty), mask)


@triton.jit
def _backward_kernel(grad_out, x, bias, grad_x, out, partial, T, C, groups, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK columns and every so many blocks of ROWS rows a program, and their share of the bias' gradient."""
    blocks = tl.cdiv(C, BLOCK)
    group = tl.program_id(0) // blocks
    c = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    b = tl.load(bias + c, c < C, other=0.0).to(tl.float32)[None, :]
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(group * ROWS, T, groups * ROWS):
        rows = first + tl.arange(0, ROWS)
        at = rows[:, None].to(tl.int64) * C + c[None, :]
        mask = (rows < T)[:, None] & (c < C)[None, :]
        g = tl.load(grad_out + at, mask, other=0.0).to(tl.float32)
        y = tl.load(x + at, mask, other=0.0).to(tl.float32) + b
        a = _clamped_magnitude(y)
        tail = _upper_tail(a)
        if out is not None:
            tl.store(out + at, (tl.maximum(y, 0.0) - a * tail).to(out.dtype.element_ty), mask)
        slope = tail - a * tl.exp2(-0.72134752 * a * a - 1.32574806)  # gelu'(-|y|)
        d = g * tl.where(y < 0, slope, 1.0 - slope)
        tl.store(grad_x + at, d.to(grad_x.dtype.element_ty), mask)
        total += d
    tl.store(partial + group * C + c, tl.sum(total, axis=0), c < C)


def _tile(channels: int) -> dict[str, int]:
    """16 elements a thread; 256 divides the hidden widths of all ViTs."""
    block = min(256, triton.next_power_of_2(channels))
    return {"ROWS": 2048 // block, "BLOCK": block, "num_warps": 4, "enable_fp_fusion": True}


def forward_triton(x, bias):
    out = torch.empty_like(x)
    tokens, channels = x.shape
    if tokens:
        tile = _tile(channels)
        programs = triton.cdiv(tokens, tile["ROWS"]) * triton.cdiv(channels, tile["BLOCK"])
        _forward_kernel[(programs,)](x, bias, out, tokens, channels, **tile)
    return out


def backward_triton(grad_out, x, bias, again, grad_bias=None):
    """As the op; the gradient of the bias is added to `grad_bias`, float32 [C], if it is given."""
    grad_x, out = torch.empty_like(x), empty_output(x, again)
    tokens, channels = x.shape
    tile = _tile(channels)
    blocks = triton.cdiv(channels, tile["BLOCK"])
    groups = min(triton.cdiv(_PROGRAMS, blocks), triton.cdiv(tokens, tile["ROWS"]))
    partial = bias.new_empty(groups, 1, channels, dtype=torch.float32)
    if tokens:
        _backward_kernel[(groups * blocks,)](
            grad_out, x, bias, grad_x, out if again else None, partial, tokens, channels, groups, **tile
        )
    if grad_bias is not None:
        add_partial_sums(partial, grad_bias)
        return grad_x, grad_bias, out
    grad_bias = partial.new_empty(channels)
    add_partial_sums(partial, grad_bias, overwrite=True)
    return grad_x, grad_bias.to(bias.dtype), out
