"""Triton kernel of mlp on 16-bit tensors: the first layer's product, with bias and gelu as its epilogue.

The same in the backward pass, the second layer's product with gelu's slope, spills registers (docs/log.md).
"""

import triton
import triton.language as tl

from dino_kernels.triton.bias_gelu import gelu
from dino_kernels.triton.common import operand, shared_memory

__all__ = ["hidden_triton"]


@triton.jit
def _hidden_kernel(
    x, weight, bias, hidden, active, T, H, C,
    EVEN: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, STEP: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """A tile of BLOCK_T x BLOCK_H a program; EVEN: STEP divides C."""
    blocks = tl.cdiv(H, BLOCK_H)
    rows = tl.program_id(0) // blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    h = tl.program_id(0) % blocks * BLOCK_H + tl.arange(0, BLOCK_H)
    c = tl.arange(0, STEP)
    x += rows[:, None].to(tl.int64) * C + c[None, :]
    weight += h[None, :].to(tl.int64) * C + c[:, None]
    acc = tl.zeros((BLOCK_T, BLOCK_H), tl.float32)
    for start in range(0, C, STEP):
        mask_x, mask_weight = (rows < T)[:, None], (h < H)[None, :]
        if not EVEN:
            mask_x &= (start + c < C)[None, :]
            mask_weight &= (start + c < C)[:, None]
        left = operand(tl.load(x + start, mask_x, other=0.0), WIDEN)
        acc = tl.dot(left, operand(tl.load(weight + start, mask_weight, other=0.0), WIDEN), acc)
    at = rows[:, None].to(tl.int64) * H + h[None, :]
    mask = (rows < T)[:, None] & (h < H)[None, :]
    product = acc.to(active.dtype.element_ty)  # the backward pass sees it rounded
    if hidden is not None:
        tl.store(hidden + at, product, mask)
    y = product.to(tl.float32) + tl.load(bias + h, h < H, other=0.0)[None, :]
    tl.store(active + at, gelu(y).to(active.dtype.element_ty), mask)


def hidden_triton(x, weight, bias, keep):
    """(x W^T, or an empty tensor unless `keep`; gelu(x W^T + bias)); x, weight 16-bit, bias float32."""
    (tokens, channels), units = x.shape, len(weight)
    hidden, active = x.new_empty(tokens if keep else 0, units), x.new_empty(tokens, units)
    stages = 3 if shared_memory() > 64 << 10 else 2  # of 32 KiB; AMD has 64
    tile = {"BLOCK_T": 128, "BLOCK_H": 128, "STEP": 64, "num_warps": 8, "num_stages": stages, "enable_fp_fusion": True}
    if tokens:
        grid = (triton.cdiv(tokens, tile["BLOCK_T"]) * triton.cdiv(units, tile["BLOCK_H"]),)
        _hidden_kernel[grid](
            x, weight, bias, hidden if keep else None, active, tokens, units, channels,
            EVEN=channels % tile["STEP"] == 0, WIDEN=triton.knobs.runtime.interpret, **tile,
        )  # fmt: skip
    return hidden, active
