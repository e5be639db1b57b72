"""Triton kernels of weight_norm_ and its gradients; formulas in dino_kernels/ops/weight_norm.py."""

import triton
import triton.language as tl

__all__ = ["backward_triton", "forward_triton"]


@triton.jit
def _forward_kernel(out, v, g, K, D, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """ROWS whole rows a program, here and below."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK)
    at = rows[:, None].to(tl.int64) * D + d[None, :]
    mask = (rows < K)[:, None] & (d < D)[None, :]
    x = tl.load(v + at, mask, other=0.0)
    scale = tl.load(g + rows, rows < K, other=0.0) / tl.sqrt(tl.sum(x * x, axis=1))
    tl.store(out + at, (x * scale[:, None]).to(out.dtype.element_ty), mask)


@triton.jit
def _backward_kernel(
    grad_v, grad_g, grad_w, v, g, K, D, OVERWRITE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK)
    at = rows[:, None].to(tl.int64) * D + d[None, :]
    mask = (rows < K)[:, None] & (d < D)[None, :]
    x = tl.load(v + at, mask, other=0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(x * x, axis=1))
    unit = x * inverse[:, None]
    dw = tl.load(grad_w + at, mask, other=0.0).to(tl.float32)
    along = tl.sum(dw * unit, axis=1)
    scale = tl.load(g + rows, rows < K, other=0.0) * inverse
    dv = scale[:, None] * (dw - along[:, None] * unit)
    if not OVERWRITE:
        dv += tl.load(grad_v + at, mask, other=0.0)
    if grad_g is not None:
        along += tl.load(grad_g + rows, rows < K, other=0.0)
        tl.debug_barrier()  # all threads of a row have read its sum before one of them replaces it
        tl.store(grad_g + rows, along, rows < K)
    tl.store(grad_v + at, dv, mask)


def _tile(channels: int) -> dict[str, int]:
    """16 elements a thread. Without fused multiply-adds all lanes that share a row's sum hold the same."""
    block = triton.next_power_of_2(channels)
    warps = max(4, block // 512)
    return {"ROWS": max(1, 2048 // block), "BLOCK": block, "num_warps": warps, "enable_fp_fusion": False}


def forward_triton(out, v, g):
    tile = _tile(v.shape[1])
    if len(v):
        _forward_kernel[(triton.cdiv(len(v), tile["ROWS"]),)](out, v, g, *v.shape, **tile)


def backward_triton(grad_v, grad_g, grad_w, v, g, overwrite=False):
    tile = _tile(v.shape[1])
    if len(v):
        grid = (triton.cdiv(len(v), tile["ROWS"]),)
        _backward_kernel[grid](grad_v, grad_g, grad_w, v, g, *v.shape, OVERWRITE=overwrite, **tile)
