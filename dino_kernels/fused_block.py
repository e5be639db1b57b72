"""A transformer block on a CPU as one call.

    middle = x + scale * proj(attention(qkv(normed)))    out = middle + scale * mlp(norm(middle))    next_norm(out)

The kernels of `linear`, `attention`, `add_layer_norm` and `mlp` one after the other, on addresses in one piece of
memory: behind a kernel that streamed megabytes through the caches, a tensor costs ten times what it does in a loop.

Dimensions: T tokens, of which drop path leaves A to the attention, M to the MLP and N to the next block; C channels.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from dino_kernels._native import _C, DTYPES, address
from dino_kernels._ops import on_plain_cpu
from dino_kernels.add_layer_norm import GROUPS, numbers
from dino_kernels.linear import TILES, products_of

__all__ = ["FusedBlock"]

_F32 = DTYPES[torch.float32]
_BY_TILES = 2  # bf16_products of AttentionArgs in csrc/kernels.h, where the processor has them


class FusedBlock(NamedTuple):
    """Operands of a block, contiguous; `fits` alone is checked.

    weights: of qkv [3 C, C], proj [C, C], norm, fc1 [hidden, C], fc2 [C, hidden] and next_norm each the weight and the
        bias; matrices have the dtype of the norms, bfloat16 or float32, vectors are float32.
    cu_seqlens: bounds of the sequences in A tokens, as of `attention`.
    scales: factors of the attention's and the MLP's rows [A] and [M], float32, or None.
    rows: the numbers of the A, M and N tokens, int32, or None for all.
    """

    weights: Sequence[Tensor]
    heads: int
    eps: float
    cu_seqlens: Tensor
    scales: Sequence[Tensor | None]
    rows: Sequence[Tensor | None]

    def fits(self, x: Tensor, normed: Tensor) -> bool:
        """Whether the kernels take x [T, C] and its norm [A, C]."""
        dense = x.dtype == torch.float32 and x.is_contiguous()
        operands = normed, *self.weights[:3:2], *self.weights[6:9:2]
        return dense and on_plain_cpu(normed) and bool(products_of(*operands))

    def forward(self, x: Tensor, normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """out [T, C] float32, its next_norm [N, C] of the dtype of normed, and what lies between, for the backward."""
        tokens, c, a, m, n, hidden = sizes = self._sizes(x)
        dtype, products, threads = by = self._by(normed)
        layout = self._layout(sizes, normed.itemsize, products)
        kept = torch.empty(layout[-1], dtype=torch.uint8)
        qkv, heads, lse, middle, middle_normed, mean, rstd, out_mean, out_rstd, first = _pieces(kept, layout)
        scratch = normed.new_empty(max(a, m), c)
        out, out_normed = torch.empty_like(x), normed.new_empty(n, c)
        w_qkv, b_qkv, w_proj, b_proj, w_norm, b_norm, w1, b1, w2, b2, w_next, b_next = _addresses(self.weights)
        (scale, mlp_scale), rows, branch = _addresses(self.scales), self._rows(), scratch.data_ptr()
        norm = (tokens, c, _F32, dtype, self.eps, threads)
        _C.linear(normed.data_ptr(), w_qkv, b_qkv, qkv, a, c, 3 * c, False, *by)
        _C.attention([qkv, self.cu_seqlens.data_ptr(), heads, lse], *self._attention(a, c, dtype), threads)
        _C.linear(heads, w_proj, b_proj, branch, a, c, c, False, *by)
        operands = x.data_ptr(), branch, scale, w_norm, b_norm
        _C.add_layer_norm(*operands, middle, middle_normed, mean, rstd, *rows[:2], *norm)
        _C.mlp([middle_normed, w1, w2, b1, b2, branch, first], m, c, hidden, *by)
        operands = middle, branch, mlp_scale, w_next, b_next
        _C.add_layer_norm(*operands, out.data_ptr(), out_normed.data_ptr(), out_mean, out_rstd, *rows[1:], *norm)
        return out, out_normed, kept

    def backward_(
        self,
        grad: Tensor | None,
        grad_normed: Tensor,
        normed: Tensor,
        out: Tensor,
        kept: Tensor,
        grads: Sequence[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Gradients of x and normed, from those of out (or None) and its norm; `grads`, float32 as the weights, are
        added to."""
        tokens, c, a, m, _, hidden = sizes = self._sizes(out)
        dtype, products, threads = by = self._by(normed)
        pieces = _pieces(kept, self._layout(sizes, normed.itemsize, products))
        qkv, heads, lse, middle, middle_normed, mean, rstd, out_mean, out_rstd, first = pieces
        grad_x, grad_normed_x = torch.empty_like(out), torch.empty_like(normed)
        branches, grad_qkv = normed.new_empty(2, max(a, m), c), normed.new_empty(a, 3 * c)
        partial = out.new_empty(GROUPS, 2, c)
        w_qkv, _, w_proj, _, w_norm, _, w1, b1, w2, _, w_next, _ = _addresses(self.weights)
        into = [t.data_ptr() for t in grads]  # a None is an error here, in the kernels it would be address 0
        of_qkv, of_b_qkv, of_proj, of_b_proj, *of_norm, of_w1, of_b1, of_w2, of_b2, of_next, of_b_next = into
        (scale, mlp_scale), rows = _addresses(self.scales), self._rows()
        of_x, of_rows, of_sums, of_branch, other = _addresses((grad_x, grad_qkv, partial, *branches))
        norm = (tokens, c, min(GROUPS, tokens), _F32, dtype, threads)
        results = of_x, of_branch, of_sums
        operands = *_addresses((grad, grad_normed, out)), out_mean, out_rstd, w_next, mlp_scale
        _C.add_layer_norm_backward(*operands, *results, of_next, of_b_next, *rows[1:], *norm)
        matrices = [w1, w2, b1, other, of_w1, of_b1, of_w2, of_b2]
        _C.mlp_backward([of_branch, middle_normed, first, *matrices], m, c, hidden, *by)
        sums = of_x, other, middle, mean, rstd, w_norm, scale  # grad_x is read and written a row at a time
        _C.add_layer_norm_backward(*sums, *results, *of_norm, *rows[:2], *norm)
        _C.add_linear(of_proj, of_branch, heads, of_b_proj, a, c, c, *by)
        _C.linear(of_branch, w_proj, 0, other, a, c, c, True, *by)
        tensors = [qkv, self.cu_seqlens.data_ptr(), heads, lse, other, of_rows]
        _C.attention(tensors, *self._attention(a, c, dtype), threads)
        _C.add_linear(of_qkv, of_rows, normed.data_ptr(), of_b_qkv, a, 3 * c, c, *by)
        _C.linear(of_rows, w_qkv, 0, grad_normed_x.data_ptr(), a, 3 * c, c, True, *by)
        return grad_x, grad_normed_x

    def _sizes(self, x: Tensor) -> tuple[int, int, int, int, int, int]:
        """T, C, A, M, N and hidden channels; shape[0], because len() of a tensor is Python."""
        a, m, n = ((x if rows is None else rows).shape[0] for rows in self.rows)
        return *x.shape, a, m, n, self.weights[6].shape[0]  # type: ignore[return-value]

    def _layout(self, sizes: tuple[int, int, int, int, int, int], e: int, products: int) -> list[int]:
        """Where in `kept` each piece begins, and its length; e: bytes a value."""
        tokens, c, a, m, n, hidden = sizes
        pieces = [3 * e * a * c, e * a * c, 4 * self.heads * a, 4 * tokens * c, e * m * c, 4 * m, 4 * m, 4 * n, 4 * n]
        pieces.append(0 if products == TILES else e * m * hidden)  # the MLP's first product
        return list(accumulate((-(-size // 64) * 64 for size in pieces), initial=0))

    def _by(self, normed: Tensor) -> tuple[int, int, int]:
        return DTYPES[normed.dtype], products_of(normed), torch.get_num_threads()

    def _attention(self, tokens: int, c: int, dtype: int) -> tuple[list[int], int, float, int]:
        d = c // self.heads
        return [self.cu_seqlens.shape[0] - 1, tokens, self.heads, d, 3 * c, c, d], dtype, d**-0.5, _BY_TILES

    def _rows(self) -> list[tuple[int, int]]:
        return [numbers(rows) for rows in self.rows]


def _pieces(kept: Tensor, layout: list[int]) -> list[int]:
    return [kept.data_ptr() + begin if end > begin else 0 for begin, end in pairwise(layout)]


def _addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    return [address(t) for t in tensors]
