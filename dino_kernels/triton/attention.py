"""Triton kernels of attention; formulas in dino_kernels/ops/attention.py.

A program owns one block of queries (or of keys) of one head; for a short sequence all blocks of a head, so that its
gradients are made in one launch which reads every input once. No atomics: a repeated call is bitwise equal.
"""

import torch
import triton
import triton.language as tl

from dino_kernels.triton.column_sums import add_column_sums, add_partial_sums
from dino_kernels.triton.common import LOG2_E, operand, shared_memory

__all__ = ["backward_triton", "forward_triton"]

_LN_2 = tl.constexpr(0.6931471805599453)
_SHORT = 320  # tokens up to which one program owns a (sequence, head): what it reads stays in a cache


@triton.jit
def _place(
    cu_seqlens, sequences, first_token, length,
    BLOCK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """(begin and end of its sequence, first row) of a program's block; first >= end if it has nothing to do."""
    block = tl.program_id(0)
    if STEPS == 0:  # all of one length, known on the host
        blocks = tl.cdiv(length, BLOCK)
        begin = first_token + block // blocks * length
        end = begin + length
        first = begin + block % blocks * BLOCK
    else:
        # Sequence i owns the programs from cu_seqlens[i] // BLOCK + i on: never fewer than it has blocks, and known
        # without asking the device for the lengths.
        low = 0
        high = sequences
        for _ in range(STEPS):
            middle = (low + high) // 2
            after = tl.load(cu_seqlens + middle) // BLOCK + middle > block
            high = tl.where(after, middle, high)
            low = tl.where(after, low, middle)
        begin = tl.load(cu_seqlens + low)
        end = tl.load(cu_seqlens + low + 1)
        first = begin + (block - begin // BLOCK - low) * BLOCK
    return begin, end, first


@triton.jit
def _load(x, rows, end, d, stride, D, WIDEN: tl.constexpr):
    """Rows below `end` of a matrix as an operand."""
    mask = (rows < end)[:, None] & (d < D)[None, :]
    return operand(tl.load(x + rows[:, None].to(tl.int64) * stride + d[None, :], mask, other=0.0), WIDEN)


@triton.jit
def _store(x, rows, end, d, stride, D, values):
    mask = (rows < end)[:, None] & (d < D)[None, :]
    tl.store(x + rows[:, None].to(tl.int64) * stride + d[None, :], values.to(x.dtype.element_ty), mask)


@triton.jit
def _store_sums(sums, at, d, D, values):
    """The sums of a block's columns, before they are rounded."""
    if sums is not None:
        tl.store(sums + at + d, tl.sum(values, axis=0), d < D)


# Below, q points to the queries of a head, k at + stride_3, v at + 2 stride_3; out, grad_out and the three parts of
# grad likewise to a head; lse and delta to a head's row. `at` is where sums [blocks, 3, H, D]
# has those of a block of a head's dQ. The exponential of the hardware is exp2: the scale takes the factor log2(e), and
# one fma makes an exponent of a logit. lse is a natural logarithm.


@triton.jit
def _forward_block(
    q, out, lse, begin, end, first, scale, stride_t, stride_3, H, D,
    NEGATIVE: tl.constexpr,
    BLOCK: tl.constexpr, STEP: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    d = tl.arange(0, BLOCK_D)
    rows = first + tl.arange(0, BLOCK)
    queries = _load(q, rows, end, d, stride_t, D, WIDEN)
    if NEGATIVE:  # by a factor > 0, the largest product is the largest logit
        queries = -queries
    factor = tl.maximum(tl.abs(scale) * LOG2_E, 1e-37)  # of a scale of 0, too: 0 * -inf would be NaN
    high = tl.full((BLOCK,), -1e30, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    acc = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    for start in range(begin, end, STEP):
        columns = start + tl.arange(0, STEP)
        keys = _load(q + stride_3, columns, end, d, stride_t, D, WIDEN)
        values = _load(q + 2 * stride_3, columns, end, d, stride_t, D, WIDEN)
        s = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
        s = tl.where((columns < end)[None, :], s, float("-inf"))
        higher = tl.maximum(high, tl.max(s, axis=1) * factor)
        p = tl.exp2(tl.fma(s, factor, -higher[:, None]))
        shrink = tl.exp2(high - higher)
        total = total * shrink + tl.sum(p, axis=1)
        acc = acc * shrink[:, None] + tl.dot(p.to(values.dtype), values, input_precision=PRECISION)
        high = higher
    _store(out, rows, end, d, H * D, D, acc / total[:, None])
    tl.store(lse + rows, (high + tl.log2(total)) * _LN_2, rows < end)


@triton.jit
def _query_block(
    q, grad_out, out, lse, delta, grad, sums, at, begin, end, first, scale, stride_t, stride_3, H, D,
    BLOCK: tl.constexpr, STEP: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """dQ of a block of queries; leaves delta = rowsum(dO * O) for the keys."""
    d = tl.arange(0, BLOCK_D)
    rows = first + tl.arange(0, BLOCK)
    queries = _load(q, rows, end, d, stride_t, D, WIDEN)
    do = _load(grad_out, rows, end, d, H * D, D, WIDEN)
    row_out = _load(out, rows, end, d, H * D, D, True)
    if BLOCK_D > 64:  # the other form would spill on sm_100
        row_delta = tl.sum(do.to(tl.float32) * row_out, axis=1)
    else:  # by fma, a product is not fused into the sum, which so is the same in all lanes that hold it
        row_delta = tl.sum(tl.fma(do.to(tl.float32), row_out, 0.0), axis=1)
    tl.store(delta + rows, row_delta, rows < end)
    row_lse = tl.load(lse + rows, rows < end, other=0.0) * LOG2_E
    acc = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    for start in range(begin, end, STEP):
        columns = start + tl.arange(0, STEP)
        keys = _load(q + stride_3, columns, end, d, stride_t, D, WIDEN)
        values = _load(q + 2 * stride_3, columns, end, d, stride_t, D, WIDEN)
        s = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
        p = tl.where((columns < end)[None, :], tl.exp2(tl.fma(s, scale * LOG2_E, -row_lse[:, None])), 0.0)
        ds = p * (tl.dot(do, tl.trans(values), input_precision=PRECISION) - row_delta[:, None])
        acc += tl.dot(ds.to(keys.dtype), keys, input_precision=PRECISION)
    acc *= scale
    _store(grad, rows, end, d, 3 * H * D, D, acc)
    _store_sums(sums, at, d, D, acc)  # a row past the end is 0


@triton.jit
def _key_block(
    q, grad_out, lse, delta, grad, sums, at, begin, end, first, scale, stride_t, stride_3, H, D,
    BLOCK: tl.constexpr, STEP: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """dK and dV of a block of keys."""
    d = tl.arange(0, BLOCK_D)
    rows = first + tl.arange(0, BLOCK)
    keys = _load(q + stride_3, rows, end, d, stride_t, D, WIDEN)
    values = _load(q + 2 * stride_3, rows, end, d, stride_t, D, WIDEN)
    grad_k = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    grad_v = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    for start in range(begin, end, STEP):
        columns = start + tl.arange(0, STEP)
        queries = _load(q, columns, end, d, stride_t, D, WIDEN)
        do = _load(grad_out, columns, end, d, H * D, D, WIDEN)
        query_lse = tl.load(lse + columns, columns < end, other=0.0) * LOG2_E
        query_delta = tl.load(delta + columns, columns < end, other=0.0)
        # [keys, queries]; a query past the end counts as 1, times a gradient and a delta of 0
        s = tl.dot(keys, tl.trans(queries), input_precision=PRECISION)
        p = tl.exp2(tl.fma(s, scale * LOG2_E, -query_lse[None, :]))
        grad_v += tl.dot(p.to(do.dtype), do, input_precision=PRECISION)
        ds = p * (tl.dot(values, tl.trans(do), input_precision=PRECISION) - query_delta[None, :])
        grad_k += tl.dot(ds.to(queries.dtype), queries, input_precision=PRECISION)
    grad_k *= scale
    _store(grad + H * D, rows, end, d, 3 * H * D, D, grad_k)
    _store(grad + 2 * H * D, rows, end, d, 3 * H * D, D, grad_v)
    if sums is not None:
        inside = (rows < end)[:, None]
        _store_sums(sums, at + H * D, d, D, tl.where(inside, grad_k, 0.0))
        _store_sums(sums, at + 2 * H * D, d, D, tl.where(inside, grad_v, 0.0))


@triton.jit
def _single_block(
    q, grad_out, out, lse, grad, sums, at, begin, end, scale, stride_t, stride_3, H, D,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """All gradients of a sequence that is no longer than a block: its probabilities are computed once.

    In all three, a row past the end is 0.
    """
    d = tl.arange(0, BLOCK_D)
    rows = begin + tl.arange(0, BLOCK)
    queries = _load(q, rows, end, d, stride_t, D, WIDEN)
    keys = _load(q + stride_3, rows, end, d, stride_t, D, WIDEN)
    values = _load(q + 2 * stride_3, rows, end, d, stride_t, D, WIDEN)
    do = _load(grad_out, rows, end, d, H * D, D, WIDEN)
    row_delta = tl.sum(do.to(tl.float32) * _load(out, rows, end, d, H * D, D, True), axis=1)
    row_lse = tl.load(lse + rows, rows < end, other=0.0) * LOG2_E
    s = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
    p = tl.where((rows < end)[None, :], tl.exp2(tl.fma(s, scale * LOG2_E, -row_lse[:, None])), 0.0)
    grad_v = tl.dot(tl.trans(p.to(do.dtype)), do, input_precision=PRECISION)
    _store(grad + 2 * H * D, rows, end, d, 3 * H * D, D, grad_v)
    _store_sums(sums, at + 2 * H * D, d, D, grad_v)
    ds = (p * (tl.dot(do, tl.trans(values), input_precision=PRECISION) - row_delta[:, None])).to(queries.dtype)
    grad_q = tl.dot(ds, keys, input_precision=PRECISION) * scale
    _store(grad, rows, end, d, 3 * H * D, D, grad_q)
    _store_sums(sums, at, d, D, grad_q)
    grad_k = tl.dot(tl.trans(ds), queries, input_precision=PRECISION) * scale
    _store(grad + H * D, rows, end, d, 3 * H * D, D, grad_k)
    _store_sums(sums, at + H * D, d, D, grad_k)


@triton.jit
def _forward_kernel(
    qkv, out, lse, cu_seqlens, sequences, first_token, length, tokens, scale, stride_t, stride_3, stride_h, H, D,
    NEGATIVE: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    begin, end, first = _place(cu_seqlens, sequences, first_token, length, BLOCK, STEPS)
    if first < end:
        _forward_block(
            qkv + head * stride_h, out + head * D, lse + head.to(tl.int64) * tokens, begin, end, first,
            scale, stride_t, stride_3, H, D, NEGATIVE, BLOCK, STEP, BLOCK_D, PRECISION, WIDEN,
        )  # fmt: skip


@triton.jit
def _query_kernel(
    qkv, grad_out, out, lse, delta, grad, sums, cu_seqlens, sequences, first_token, length, tokens, scale,
    stride_t, stride_3, stride_h, H, D,
    STEPS: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    begin, end, first = _place(cu_seqlens, sequences, first_token, length, BLOCK, STEPS)
    row = head.to(tl.int64) * tokens
    if first < end:
        _query_block(
            qkv + head * stride_h, grad_out + head * D, out + head * D, lse + row, delta + row, grad + head * D,
            sums, (tl.program_id(0) * 3 * H + head) * D, begin, end, first, scale, stride_t, stride_3, H, D,
            BLOCK, STEP, BLOCK_D, PRECISION, WIDEN,
        )  # fmt: skip


@triton.jit
def _key_kernel(
    qkv, grad_out, lse, delta, grad, sums, cu_seqlens, sequences, first_token, length, tokens, scale,
    stride_t, stride_3, stride_h, H, D,
    STEPS: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    begin, end, first = _place(cu_seqlens, sequences, first_token, length, BLOCK, STEPS)
    row = head.to(tl.int64) * tokens
    if first < end:
        _key_block(
            qkv + head * stride_h, grad_out + head * D, lse + row, delta + row, grad + head * D,
            sums, (tl.program_id(0) * 3 * H + head) * D, begin, end, first, scale, stride_t, stride_3, H, D,
            BLOCK, STEP, BLOCK_D, PRECISION, WIDEN,
        )  # fmt: skip


@triton.jit
def _short_forward_kernel(
    qkv, out, lse, first_token, length, tokens, scale, stride_t, stride_3, stride_h, H, D,
    NEGATIVE: tl.constexpr,
    BLOCK: tl.constexpr, STEP: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % H
    begin = first_token + tl.program_id(0) // H * length
    for first in range(begin, begin + length, BLOCK):
        _forward_block(
            qkv + head * stride_h, out + head * D, lse + head.to(tl.int64) * tokens, begin, begin + length, first,
            scale, stride_t, stride_3, H, D, NEGATIVE, BLOCK, STEP, BLOCK_D, PRECISION, WIDEN,
        )  # fmt: skip


@triton.jit
def _short_backward_kernel(
    qkv, grad_out, out, lse, delta, grad, sums, first_token, length, tokens, scale, stride_t, stride_3, stride_h, H, D,
    SINGLE: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % H
    sequence = tl.program_id(0) // H
    begin = first_token + sequence * length
    end = begin + length
    at = (sequence * tl.cdiv(length, BLOCK) * 3 * H + head) * D
    qkv += head * stride_h
    grad_out += head * D
    out += head * D
    grad += head * D
    lse += head.to(tl.int64) * tokens
    delta += head.to(tl.int64) * tokens
    if SINGLE:
        _single_block(
            qkv, grad_out, out, lse, grad, sums, at, begin, end,
            scale, stride_t, stride_3, H, D, BLOCK, BLOCK_D, PRECISION, WIDEN,
        )  # fmt: skip
    else:
        for first in range(begin, end, BLOCK):
            _query_block(
                qkv, grad_out, out, lse, delta, grad,
                sums, at + (first - begin) // BLOCK * 3 * H * D,
                begin, end, first, scale, stride_t, stride_3, H, D, BLOCK, STEP, BLOCK_D, PRECISION, WIDEN,
            )  # fmt: skip
        tl.debug_barrier()  # delta is read by other threads than wrote it
        for first in range(begin, end, BLOCK):
            _key_block(
                qkv, grad_out, lse, delta, grad,
                sums, at + (first - begin) // BLOCK * 3 * H * D,
                begin, end, first, scale, stride_t, stride_3, H, D, BLOCK, STEP, BLOCK_D, PRECISION, WIDEN,
            )  # fmt: skip


def _tiles(length: int, channels: int, dtype: torch.dtype, backward: bool = False) -> dict:
    """Own rows (BLOCK) and rows of the other side a step (STEP) of a program, its warps and pipeline stages.

    Chosen from the compiler's reports so that nothing spills on any chip, and BLOCK >= 64 on Hopper, whose matrix
    instruction takes no less. A sequence that fits one block gets no larger one.
    """
    short, shared = length <= _SHORT, shared_memory()
    roomy, narrow = shared > 200 << 10, shared <= 64 << 10  # Hopper and Blackwell; AMD
    block_d, wide = max(16, triton.next_power_of_2(channels)), dtype == torch.float32
    if wide:  # "ieee" products have no tensor cores: blocks of 64 would spill kilobytes of registers a thread
        block = 32 if block_d <= 64 else 16
        step = 16 if narrow else block
    elif block_d > 128:
        block = step = 32
    else:
        block = 64 if roomy or not short or length <= 64 else 32
        step = 64 if roomy and not short else 32
    # Gradients of a short sequence: four programs at a time hide more than a pipeline, whose registers they need.
    unpipelined = backward and short and not wide and (roomy or (narrow and block_d > 64))
    few_warps = narrow or unpipelined
    fits = 16 if length <= 16 else 32 if length <= 32 else 64
    return {
        "BLOCK": min(block, fits),
        "STEP": min(step, fits),
        "BLOCK_D": block_d,
        "PRECISION": "ieee" if wide else "tf32",
        "WIDEN": triton.knobs.runtime.interpret,
        "num_warps": 8 if wide or block_d > 128 or (block_d > 64 and (length <= 64 or not few_warps)) else 4,
        "num_stages": 1 if unpipelined else 3 if block_d <= 64 and roomy and not wide else 2,
    }


def _batches(sequences: int, groups: list[int]) -> list[tuple[int, int, int]]:
    """(first token, sequences, tokens of each or 0 if unknown) of what is launched together."""
    if not groups:
        return [(0, sequences, 0)]
    batches, first = [], 0
    for count, length in zip(groups[::2], groups[1::2], strict=True):
        if count and length:
            batches.append((first, count, length))
        first += count * length
    return batches


def _grid(count: int, length: int, tokens: int, block: int, heads: int) -> tuple[int, int]:
    return (count * triton.cdiv(length, block) if length else triton.cdiv(tokens, block) + count), heads


def forward_triton(qkv, cu_seqlens, groups, scale):
    tokens, _, heads, channels = qkv.shape
    out, lse = qkv.new_empty(tokens, heads, channels), qkv.new_empty(heads, tokens, dtype=torch.float32)
    common = (tokens, scale, *qkv.stride()[:3], heads, channels)
    for first, count, length in _batches(len(cu_seqlens) - 1, groups) if tokens else ():
        tiles = {"NEGATIVE": scale < 0, **_tiles(length or tokens, channels, qkv.dtype)}
        if 0 < length <= _SHORT:
            _short_forward_kernel[(count * heads,)](qkv, out, lse, first, length, *common, **tiles)
        else:
            grid = _grid(count, length, tokens, tiles["BLOCK"], heads)
            steps = 0 if length else count.bit_length()
            _forward_kernel[grid](qkv, out, lse, cu_seqlens, count, first, length, *common, STEPS=steps, **tiles)
    return out, lse


def backward_triton(grad_out, qkv, out, lse, cu_seqlens, groups, scale, sums):
    assert grad_out.is_contiguous() and out.is_contiguous() and lse.is_contiguous()
    tokens, _, heads, channels = qkv.shape
    grad, delta = qkv.new_empty(qkv.shape), torch.empty_like(lse)
    common = (tokens, scale, *qkv.stride()[:3], heads, channels)
    batches = []
    for first, count, length in _batches(len(cu_seqlens) - 1, groups) if tokens else ():
        tiles = _tiles(length or tokens, channels, qkv.dtype, backward=True)
        batches.append((first, count, length, _grid(count, length, tokens, tiles["BLOCK"], heads), tiles))
    partial, rows = None, 0
    if sums is not None and channels == 64:  # as in every ViT; with other numbers of channels registers would spill
        # Of unknown lengths, some programs have no block.
        new = qkv.new_empty if groups else qkv.new_zeros
        partial = new(sum(grid[0] for *_, grid, _ in batches), 1, 3 * heads * channels, dtype=torch.float32)
    for first, count, length, grid, tiles in batches:
        of_batch = None if partial is None else partial[rows:]
        rows += grid[0]
        if 0 < length <= _SHORT:
            single = length <= tiles["BLOCK"]
            _short_backward_kernel[(count * heads,)](
                qkv, grad_out, out, lse, delta, grad, of_batch, first, length, *common, SINGLE=single, **tiles
            )
        else:
            place = (of_batch, cu_seqlens, count, first, length, *common)
            steps = 0 if length else count.bit_length()
            _query_kernel[grid](qkv, grad_out, out, lse, delta, grad, *place, STEPS=steps, **tiles)
            _key_kernel[grid](qkv, grad_out, lse, delta, grad, *place, STEPS=steps, **tiles)
    if partial is not None:
        add_partial_sums(partial, sums)
    elif sums is not None:
        add_column_sums(grad.flatten(1), sums)
    return grad
