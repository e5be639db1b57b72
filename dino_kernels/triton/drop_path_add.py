"""Triton kernel of drop_path_add; formulas in dino_kernels/ops/drop_path_add.py."""

import torch
import triton
import triton.language as tl

__all__ = ["backward_triton", "forward_triton"]


@triton.jit
def _kernel(x, branch, scale, out, T, C, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """out = x + scale * branch, or scale * branch where x is None; a tile of ROWS x BLOCK a program."""
    blocks = tl.cdiv(C, BLOCK)
    rows = tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    at = rows[:, None].to(tl.int64) * C + c[None, :]
    mask = (rows < T)[:, None] & (c < C)[None, :]
    y = tl.load(branch + at, mask, other=0.0).to(tl.float32)
    y *= tl.load(scale + rows, rows < T, other=0.0)[:, None]
    if x is not None:
        y += tl.load(x + at, mask, other=0.0).to(tl.float32)
    tl.store(out + at, y.to(out.dtype.element_ty), mask)


def forward_triton(x, branch, scale):
    out = torch.empty_like(x)
    _run_triton(x, branch, scale, out)
    return out


def backward_triton(grad_out, scale, dtype):
    grad_branch = torch.empty_like(grad_out, dtype=dtype)
    _run_triton(None, grad_out, scale, grad_branch)
    return grad_branch


def _run_triton(x, branch, scale, out):
    tokens, channels = out.shape
    block = min(128, triton.next_power_of_2(channels))  # divides the widths of all ViTs but the smallest
    rows = 2048 // block
    if tokens:
        programs = triton.cdiv(tokens, rows) * triton.cdiv(channels, block)
        _kernel[(programs,)](x, branch, scale, out, tokens, channels, ROWS=rows, BLOCK=block, num_warps=4)
