"""Self-attention over packed sequences, without a mask.

    out_i = sum_j softmax_j(scale <q_i, k_j>) v_j        j over the tokens of i's sequence, per head

Dimensions: T tokens in S sequences (sequence i is rows cu_seqlens[i] to cu_seqlens[i+1]), H heads, D channels a head.
Backward, with P the probabilities, rebuilt from lse (the natural logarithm of each row's sum of exponentials):

    dV = P^T dO    dP = dO V^T    dS = P * (dP - rowsum(dO * O))    dQ = scale dS K    dK = scale dS^T Q
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dino_kernels._native import DTYPES

__all__ = ["attention", "attention_reference"]


def attention(qkv: Tensor, cu_seqlens: Tensor, *, scale: float | None = None) -> Tensor:
    """Multi-head self-attention of every sequence to itself; gradients to qkv.

    Caron et al. 2021 (ViT, as vision_transformer.py:81-92 of the reference), on packed sequences of any mix of
    lengths. Softmax statistics are float32; a repeated call is bitwise equal.

    Args:
        qkv: queries, keys, values [T, 3, H, D]; float32, float16 or bfloat16; adjacent channels (stride 1), the
            other dimensions may be strided; D from 1 to 256.
        cu_seqlens: bounds of the sequences [S+1], int32, contiguous, on qkv's device: from 0 to T, never
            falling.
        scale: factor on the logits; D ** -0.5 by default.

    Returns:
        [T, H, D], in the dtype of qkv.

    Raises:
        ValueError: a shape, dtype or device that does not fit the above. The bounds' values are checked on the
            CPU only: on a GPU that would wait for the device.
    """
    fits = qkv.ndim == 4 and qkv.shape[1] == 3 and 1 <= qkv.shape[3] <= 256
    if not fits or qkv.dtype not in DTYPES or qkv.stride(3) != 1:
        raise ValueError(
            "qkv must have shape [T, 3, H, D] with 1 <= D <= 256, dtype float32, float16 or bfloat16 and adjacent "
            f"channels (stride 1), got shape {list(qkv.shape)}, {qkv.dtype}, strides {list(qkv.stride())}"
        )
    if cu_seqlens.ndim != 1 or cu_seqlens.dtype != torch.int32 or not len(cu_seqlens) or cu_seqlens.stride(0) != 1:
        raise ValueError(
            "cu_seqlens must have shape [S+1], dtype int32 and stride 1, "
            f"got {list(cu_seqlens.shape)}, {cu_seqlens.dtype}, strides {list(cu_seqlens.stride())}"
        )
    if qkv.device != cu_seqlens.device:
        raise ValueError(f"qkv and cu_seqlens must be on one device, got {qkv.device} and {cu_seqlens.device}")
    scale = qkv.shape[3] ** -0.5 if scale is None else float(scale)
    return torch.ops.dino_kernels.attention(qkv, cu_seqlens, scale)[0]


def attention_reference(qkv: Tensor, cu_seqlens: Tensor, *, scale: float | None = None) -> Tensor:
    """`attention` in plain PyTorch, a sequence at a time."""
    scale = qkv.shape[3] ** -0.5 if scale is None else scale
    outs = []
    for sequence in qkv.split(cu_seqlens.diff().tolist()):
        q, k, v = sequence.permute(1, 2, 0, 3)
        outs.append(((q @ k.transpose(-2, -1) * scale).softmax(dim=-1) @ v).transpose(0, 1))
    return torch.cat(outs)


# --- registration ------------------------------------------------------------------------------------


@torch.library.custom_op("dino_kernels::attention", mutates_args=(), device_types="cpu")
def _attention(qkv: Tensor, cu_seqlens: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(out [T, H, D], lse [H, T] float32)"""
    return _forward_cpu(qkv, cu_seqlens, scale)


@_attention.register_kernel("cuda")
def _(qkv, cu_seqlens, scale):
    with torch.cuda.device(qkv.device):  # Triton launches on the current device
        return _forward_triton(qkv, cu_seqlens, scale)


@_attention.register_fake
def _(qkv, cu_seqlens, scale):
    return _outputs(qkv)


@torch.library.custom_op("dino_kernels::attention_backward", mutates_args=(), device_types="cpu")
def _attention_backward(
    grad_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor, scale: float
) -> Tensor:
    return _backward_cpu(grad_out, qkv, out, lse, cu_seqlens, scale)


@_attention_backward.register_kernel("cuda")
def _(grad_out, qkv, out, lse, cu_seqlens, scale):
    with torch.cuda.device(qkv.device):
        return _backward_triton(grad_out, qkv, out, lse, cu_seqlens, scale)


@_attention_backward.register_fake
def _(grad_out, qkv, out, lse, cu_seqlens, scale):
    return qkv.new_empty(qkv.shape)


def _outputs(qkv: Tensor) -> tuple[Tensor, Tensor]:
    tokens, _, heads, channels = qkv.shape
    return qkv.new_empty(tokens, heads, channels), qkv.new_empty(heads, tokens, dtype=torch.float32)


def _setup(ctx, inputs, output) -> None:
    qkv, cu_seqlens, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(qkv, *output, cu_seqlens)


def _backward(ctx, grad_out, _):
    qkv, out, lse, cu_seqlens = ctx.saved_tensors
    grad = torch.ops.dino_kernels.attention_backward(grad_out.contiguous(), qkv, out, lse, cu_seqlens, ctx.scale)
    return grad, None, None


_attention.register_autograd(_backward, setup_context=_setup)


# --- CPU: torch's products over groups of equal length -----------------------------------------------
# (Against them torch's scaled_dot_product_attention takes 2.5 times as long in bfloat16, 0.8 times in float32.)


_Group = tuple[slice | Tensor, int]  # rows of all sequences of one length, and how many sequences


def _groups(tokens: int, cu_seqlens: Tensor) -> list[_Group]:
    """Sequences by length: neighbors as a slice, which costs no copy, scattered ones by their row numbers."""
    bounds = cu_seqlens.tolist()
    begins: dict[int, list[int]] = {}
    for begin, end in zip(bounds, bounds[1:], strict=False):
        begins.setdefault(end - begin, []).append(begin)
    if bounds[0] != 0 or bounds[-1] != tokens or min(begins, default=0) < 0:
        raise ValueError(
            f"cu_seqlens must rise from 0 to the number of tokens {tokens}, got {bounds[:8]}...{bounds[-1]}"
        )
    begins.pop(0, None)
    groups: list[_Group] = []
    for length, firsts in begins.items():
        if firsts[-1] - firsts[0] == length * (len(firsts) - 1):
            groups.append((slice(firsts[0], firsts[-1] + length), len(firsts)))
        else:
            rows = torch.tensor(firsts)[:, None] + torch.arange(length)
            groups.append((rows.flatten(), len(firsts)))
    return groups


def _read(x: Tensor, group: _Group) -> Tensor:
    """A group's rows of x [T, H, D] as [sequences * H, length, D]: one copy, where torch's products would make many."""
    rows, count = group
    return x[rows].unflatten(0, (count, -1)).transpose(1, 2).flatten(0, 1)


def _write(x: Tensor, group: _Group, values: Tensor) -> None:
    """The inverse of `_read`."""
    rows, count = group
    values = values.unflatten(0, (count, -1))
    if isinstance(rows, slice):
        x[rows].unflatten(0, (count, -1)).transpose(1, 2).copy_(values)
    else:
        x[rows] = values.transpose(1, 2).flatten(0, 1).to(x.dtype)


def _logits(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """scale q k^T, float32 whatever the inputs."""
    return torch.baddbmm(q.new_empty(()), q, k.transpose(1, 2), beta=0, alpha=scale).float()


def _forward_cpu(qkv, cu_seqlens, scale):
    out, lse = _outputs(qkv)
    for group in _groups(len(qkv), cu_seqlens):
        q, k, v = (_read(x, group) for x in qkv.unbind(1))
        p = _logits(q, k, scale)
        high = p.amax(dim=-1, keepdim=True)
        total = p.sub_(high).exp_().sum(dim=-1, keepdim=True)
        _write(out, group, (p.to(v.dtype) @ v).float().div_(total))  # dividing here touches D columns, not `length`
        _write(lse.T.unsqueeze(-1), group, total.log_().add_(high))
    return out, lse


def _backward_cpu(grad_out, qkv, out, lse, cu_seqlens, scale):
    grad = qkv.new_empty(qkv.shape)
    for group in _groups(len(qkv), cu_seqlens):
        q, k, v = (_read(x, group) for x in qkv.unbind(1))
        do = _read(grad_out, group)
        p = _logits(q, k, scale).sub_(_read(lse.T.unsqueeze(-1), group)).exp_()
        delta = (do.float() * _read(out, group)).sum(dim=-1, keepdim=True)
        ds = (do @ v.transpose(1, 2)).float().sub_(delta).mul_(p).to(q.dtype)
        grads = (ds @ k).mul_(scale), (ds.transpose(1, 2) @ q).mul_(scale), p.to(v.dtype).transpose(1, 2) @ do
        for whole, part in zip(grad.unbind(1), grads, strict=True):
            _write(whole, group, part)
    return grad


# --- GPU: flash attention; one program a block of queries (or keys) of one head ----------------------


@triton.jit
def _find(cu_seqlens, sequences, block, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    """Sequence and first row that program `block` owns: (begin, end, first), first >= end if it has nothing to do.

    Sequence i owns the programs from cu_seqlens[i] // BLOCK + i on: never fewer than it has blocks, and known
    without asking the device for the lengths.
    """
    low = 0
    high = sequences
    for _ in range(STEPS):
        middle = (low + high) // 2
        after = tl.load(cu_seqlens + middle) // BLOCK + middle > block
        high = tl.where(after, middle, high)
        low = tl.where(after, low, middle)
    begin = tl.load(cu_seqlens + low)
    return begin, tl.load(cu_seqlens + low + 1), begin + (block - begin // BLOCK - low) * BLOCK


@triton.jit
def _forward_kernel(
    qkv, cu_seqlens, out, lse, sequences, tokens, scale, stride_t, stride_3, stride_h, H, D,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, STEPS: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    begin, end, first = _find(cu_seqlens, sequences, tl.program_id(0), BLOCK, STEPS)
    if first >= end:
        return
    d = tl.arange(0, BLOCK_D)
    rows = first + tl.arange(0, BLOCK)
    q_ptr = qkv + head * stride_h + d[None, :]
    row_mask = (rows < end)[:, None] & (d < D)[None, :]
    q = _operand(tl.load(q_ptr + rows[:, None].to(tl.int64) * stride_t, row_mask, other=0.0), WIDEN)
    high = tl.full((BLOCK,), -1e38, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    acc = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    for start in range(begin, end, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = (columns < end)[:, None] & (d < D)[None, :]
        at = q_ptr + columns[:, None].to(tl.int64) * stride_t
        k = _operand(tl.load(at + stride_3, mask, other=0.0), WIDEN)
        v = _operand(tl.load(at + 2 * stride_3, mask, other=0.0), WIDEN)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        s = tl.where((columns < end)[None, :], s, float("-inf"))
        higher = tl.maximum(high, tl.max(s, axis=1))
        p = tl.exp(s - higher[:, None])
        shrink = tl.exp(high - higher)
        total = total * shrink + tl.sum(p, axis=1)
        acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
        high = higher
    out_ptr = out + (rows[:, None].to(tl.int64) * H + head) * D + d[None, :]
    tl.store(out_ptr, (acc / total[:, None]).to(out.dtype.element_ty), row_mask)
    tl.store(lse + head.to(tl.int64) * tokens + rows, high + tl.log(total), rows < end)


@triton.jit
def _query_kernel(
    grad_out, qkv, out, lse, delta, cu_seqlens, grad, sequences, tokens, scale, stride_t, stride_3, stride_h, H, D,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, STEPS: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """dQ of a block of queries; leaves delta = rowsum(dO * O) for the keys' kernel."""
    head = tl.program_id(1)
    begin, end, first = _find(cu_seqlens, sequences, tl.program_id(0), BLOCK, STEPS)
    if first >= end:
        return
    d = tl.arange(0, BLOCK_D)
    rows = first + tl.arange(0, BLOCK)
    row_mask = (rows < end)[:, None] & (d < D)[None, :]
    q_ptr = qkv + head * stride_h + d[None, :]
    out_offset = (rows[:, None].to(tl.int64) * H + head) * D + d[None, :]
    q = _operand(tl.load(q_ptr + rows[:, None].to(tl.int64) * stride_t, row_mask, other=0.0), WIDEN)
    do = _operand(tl.load(grad_out + out_offset, row_mask, other=0.0), WIDEN)
    o = tl.load(out + out_offset, row_mask, other=0.0).to(tl.float32)
    row_delta = tl.sum(do.to(tl.float32) * o, axis=1)
    statistics = head.to(tl.int64) * tokens + rows
    tl.store(delta + statistics, row_delta, rows < end)
    row_lse = tl.load(lse + statistics, rows < end, other=0.0)
    acc = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    for start in range(begin, end, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = (columns < end)[:, None] & (d < D)[None, :]
        at = q_ptr + columns[:, None].to(tl.int64) * stride_t
        k = _operand(tl.load(at + stride_3, mask, other=0.0), WIDEN)
        v = _operand(tl.load(at + 2 * stride_3, mask, other=0.0), WIDEN)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        p = tl.where((columns < end)[None, :], tl.exp(s - row_lse[:, None]), 0.0)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        ds = p * (dp - row_delta[:, None])
        acc += tl.dot(ds.to(k.dtype), k, input_precision=PRECISION)
    grad_ptr = grad + (rows[:, None].to(tl.int64) * 3 * H + head) * D + d[None, :]
    tl.store(grad_ptr, (acc * scale).to(grad.dtype.element_ty), row_mask)


@triton.jit
def _key_kernel(
    grad_out, qkv, lse, delta, cu_seqlens, grad, sequences, tokens, scale, stride_t, stride_3, stride_h, H, D,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, STEPS: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """dK and dV of a block of keys."""
    head = tl.program_id(1)
    begin, end, first = _find(cu_seqlens, sequences, tl.program_id(0), BLOCK, STEPS)
    if first >= end:
        return
    d = tl.arange(0, BLOCK_D)
    rows = first + tl.arange(0, BLOCK)
    row_mask = (rows < end)[:, None] & (d < D)[None, :]
    q_ptr = qkv + head * stride_h + d[None, :]
    at = q_ptr + rows[:, None].to(tl.int64) * stride_t
    k = _operand(tl.load(at + stride_3, row_mask, other=0.0), WIDEN)
    v = _operand(tl.load(at + 2 * stride_3, row_mask, other=0.0), WIDEN)
    grad_k = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    grad_v = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    for start in range(begin, end, BLOCK):
        queries = start + tl.arange(0, BLOCK)
        mask = (queries < end)[:, None] & (d < D)[None, :]
        q = _operand(tl.load(q_ptr + queries[:, None].to(tl.int64) * stride_t, mask, other=0.0), WIDEN)
        out_offset = (queries[:, None].to(tl.int64) * H + head) * D + d[None, :]
        do = _operand(tl.load(grad_out + out_offset, mask, other=0.0), WIDEN)
        statistics = head.to(tl.int64) * tokens + queries
        query_lse = tl.load(lse + statistics, queries < end, other=0.0)
        query_delta = tl.load(delta + statistics, queries < end, other=0.0)
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale  # [keys, queries]
        p = tl.where((queries < end)[None, :], tl.exp(s - query_lse[None, :]), 0.0)
        grad_v += tl.dot(p.to(do.dtype), do, input_precision=PRECISION)
        ds = p * (tl.dot(v, tl.trans(do), input_precision=PRECISION) - query_delta[None, :])
        grad_k += tl.dot(ds.to(q.dtype), q, input_precision=PRECISION)
    grad_ptr = grad + (rows[:, None].to(tl.int64) * 3 * H + head) * D + d[None, :]
    tl.store(grad_ptr + H * D, (grad_k * scale).to(grad.dtype.element_ty), row_mask)
    tl.store(grad_ptr + 2 * H * D, grad_v.to(grad.dtype.element_ty), row_mask)


@triton.jit
def _operand(x, WIDEN: tl.constexpr):
    """An operand of tl.dot in its own dtype, for the tensor cores; the interpreter multiplies float32 only."""
    return x.to(tl.float32) if WIDEN else x


def _launch(qkv, cu_seqlens):
    """(grid, constants) of all three kernels."""
    tokens, _, heads, channels = qkv.shape
    sequences = len(cu_seqlens) - 1
    block_d, wide = max(16, triton.next_power_of_2(channels)), qkv.dtype == torch.float32
    # Rows of 512 bytes and more: half the block, or the tiles outgrow Hopper's 227 KiB of shared memory. float32
    # has no tensor cores here ("ieee"): blocks of 64 would spill kilobytes of registers a thread.
    block = (32 if wide else 64) // (2 if block_d * qkv.element_size() > 256 else 1)
    grid = (triton.cdiv(tokens, block) + sequences, heads)
    return grid, {
        "BLOCK": block,
        "BLOCK_D": block_d,
        "STEPS": sequences.bit_length(),
        "PRECISION": "ieee" if wide else "tf32",
        "WIDEN": triton.knobs.runtime.interpret,
        "num_warps": 8 if wide or block_d > 64 else 4,
    }


def _forward_triton(qkv, cu_seqlens, scale):
    out, lse = _outputs(qkv)
    tokens, _, heads, channels = qkv.shape
    if tokens:
        grid, constants = _launch(qkv, cu_seqlens)
        _forward_kernel[grid](
            qkv, cu_seqlens, out, lse, len(cu_seqlens) - 1, tokens, scale, *qkv.stride()[:3], heads, channels,
            **constants,
        )  # fmt: skip
    return out, lse


def _backward_triton(grad_out, qkv, out, lse, cu_seqlens, scale):
    assert grad_out.is_contiguous() and out.is_contiguous() and lse.is_contiguous()
    grad, delta = qkv.new_empty(qkv.shape), torch.empty_like(lse)
    tokens, _, heads, channels = qkv.shape
    if tokens:
        grid, constants = _launch(qkv, cu_seqlens)
        sizes = (len(cu_seqlens) - 1, tokens, scale, *qkv.stride()[:3], heads, channels)
        _query_kernel[grid](grad_out, qkv, out, lse, delta, cu_seqlens, grad, *sizes, **constants)
        _key_kernel[grid](grad_out, qkv, lse, delta, cu_seqlens, grad, *sizes, **constants)
    return grad
