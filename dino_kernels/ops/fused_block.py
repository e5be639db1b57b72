"""A transformer block on a CPU as one call.

    middle = x + scale * proj(attention(qkv(normed)))    out = middle + scale * mlp(norm(middle))    next_norm(out)

The kernels of `linear`, `attention`, `add_layer_norm` and `mlp` one after the other, on addresses in one piece of
memory: behind a kernel that streamed megabytes through the caches, a tensor costs ten times what it does in a loop, and
so does whatever else Python does.

Dimensions: T tokens, of which drop path leaves A to the attention, M to the MLP and N to the next block; C channels.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dino_kernels._core.native import _C, DTYPES, Products, address
from dino_kernels._core.registry import on_plain_cpu
from dino_kernels.ops.add_layer_norm import GROUPS, count_of
from dino_kernels.ops.linear import products_of

__all__ = ["FusedBlock"]


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
        return dense and on_plain_cpu(normed) and products_of(*operands) != Products.library

    def forward(self, x: Tensor, normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """out [T, C] float32, its next_norm [N, C] of the dtype of normed, and what lies between, for the backward."""
        block = self._native(x, normed)
        kept = torch.empty(block.bytes(), dtype=torch.uint8)
        out, scratch = torch.empty_like(x), normed.new_empty(x.shape)
        next_rows = self.rows[2]
        out_normed = normed.new_empty((x if next_rows is None else next_rows).shape[0], x.shape[1])
        block.forward(
            saved=kept.data_ptr(),
            x=x.data_ptr(),
            normed=normed.data_ptr(),
            out=out.data_ptr(),
            out_normed=out_normed.data_ptr(),
            scratch=scratch.data_ptr(),
        )
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
        (a, c), mlp_rows = normed.shape, self.rows[1]
        branch = max(a, (out if mlp_rows is None else mlp_rows).shape[0])
        grad_x, grad_normed_x = torch.empty_like(out), torch.empty_like(normed)
        scratch, partial = normed.new_empty(2 * branch + 3 * a, c), out.new_empty(GROUPS, 2, c)
        self._native(out, normed).backward(
            saved=kept.data_ptr(),
            grad=address(grad),
            grad_normed=grad_normed.data_ptr(),
            normed=normed.data_ptr(),
            out=out.data_ptr(),
            grad_x=grad_x.data_ptr(),
            grad_normed_x=grad_normed_x.data_ptr(),
            scratch=scratch.data_ptr(),
            partial=partial.data_ptr(),
            **_addresses(grads),
        )
        return grad_x, grad_normed_x

    def _native(self, x: Tensor, normed: Tensor) -> _C.FusedBlock:
        """shape[0], because len() of a tensor is Python."""
        attention_rows, mlp_rows, next_rows = self.rows
        scale, mlp_scale = self.scales
        return _C.FusedBlock(
            **_addresses(self.weights),
            bounds=self.cu_seqlens.data_ptr(),
            scale=address(scale),
            mlp_scale=address(mlp_scale),
            attention_rows=address(attention_rows),
            attention_rows_count=count_of(attention_rows),
            mlp_rows=address(mlp_rows),
            mlp_rows_count=count_of(mlp_rows),
            next_rows=address(next_rows),
            next_rows_count=count_of(next_rows),
            sequences=self.cu_seqlens.shape[0] - 1,
            tokens=x.shape[0],
            channels=x.shape[1],
            heads=self.heads,
            hidden_channels=self.weights[6].shape[0],
            groups=GROUPS,
            eps=self.eps,
            dtype=DTYPES[normed.dtype],
            products=products_of(normed),
            threads=torch.get_num_threads(),
        )


# The order of FusedBlock.weights and of their gradients.
_WEIGHTS = (
    "qkv_weight", "qkv_bias", "proj_weight", "proj_bias", "norm_weight", "norm_bias",
    "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias", "next_norm_weight", "next_norm_bias",
)  # fmt: skip


def _addresses(tensors: Sequence[Tensor]) -> dict[str, int]:
    return {name: t.data_ptr() for name, t in zip(_WEIGHTS, tensors, strict=True)}
