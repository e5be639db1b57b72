"""Matrix products of Triton with mma.sync (sm_80) and wgmma (sm_90), in all layouts of their operands: a test of the
emulator, run by test_ptx_compiled.py in a separate process, since Triton caches kernels compiled for one target."""

import pytest
import torch
import triton
import triton.language as tl
from ptx import launch

HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32
TILES = [(64, 16, 16, 4), (64, 32, 64, 4), (64, 64, 32, 4), (128, 64, 64, 8), (64, 128, 32, 4), (64, 256, 64, 8)]


@triton.jit
def product(a, b, c, M, N, K, am, ak, bk, bn, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    m, n, k = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        inside = start + k < K
        x = tl.load(a + m[:, None] * am + (start + k)[None, :] * ak, (m < M)[:, None] & inside[None, :], other=0.0)
        y = tl.load(b + (start + k)[:, None] * bk + n[None, :] * bn, inside[:, None] & (n < N)[None, :], other=0.0)
        acc += tl.dot(x, y)
    tl.store(c + m[:, None] * N + n[None, :], acc, (m < M)[:, None] & (n < N)[None, :])


@triton.jit
def twice(a, b, c, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """(a b^T) b, as in attention: the second product has its left operand in registers."""
    m, n, k = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    x = tl.load(a + m[:, None] * BK + k[None, :])
    y = tl.load(b + n[:, None] * BK + k[None, :])
    s = tl.dot(x, tl.trans(y))
    tl.store(c + m[:, None] * BK + k[None, :], tl.dot(s.to(y.dtype), y))


def integers(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Small integers: their products and sums are exact in any order."""
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.mark.parametrize("rows", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize(
    "dtype, tiles",
    [pytest.param(dtype, tiles, marks=() if tiles == TILES[3] else pytest.mark.prove) for dtype in (HALF, BRAIN, FULL)
     for tiles in (*TILES, (128, 128, 128, 8)) if dtype != FULL or tiles[0] * tiles[1] * tiles[2] <= 300_000],
)  # fmt: skip
def test_products(dtype, tiles, rows):
    bm, bn, bk, warps = tiles
    M, N, K = bm - 3, bn - 5, 2 * bk - 1
    a, b = integers(M, K, dtype=dtype), integers(K, N, dtype=dtype)
    x, y = (t if by_rows else t.T.contiguous().T for t, by_rows in zip((a, b), rows, strict=True))
    c = torch.empty(M, N)
    product[(1,)](x, y, c, M, N, K, *x.stride(), *y.stride(), BM=bm, BN=bn, BK=bk, num_warps=warps)
    assert torch.equal(c.double(), a.double() @ b.double())


@pytest.mark.parametrize("dtype", [HALF, BRAIN])
@pytest.mark.parametrize("bm, bn, bk", [(64, 32, 64), (64, 64, 32), (64, 64, 128), (128, 32, 16)])
def test_a_product_of_a_product(dtype, bm, bn, bk):
    a, b = integers(bm, bk, dtype=dtype) // 2, integers(bn, bk, dtype=dtype) // 2
    c = torch.empty(bm, bk)
    twice[(1,)](a, b, c, BM=bm, BN=bn, BK=bk, num_warps=4)
    s = (a.double() @ b.double().T).to(dtype).double()
    assert torch.equal(c.double(), s @ b.double())


def test_the_matrix_instruction_of_the_chip_was_used(request):
    opcodes = {s.opcode.split(".")[0] for used in launch.usage.values() for s in used.program.instructions}
    assert ("wgmma" if request.config.option.ptx_arch == 90 else "mma") in opcodes
