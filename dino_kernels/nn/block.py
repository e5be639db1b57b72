"""A transformer block over packed sequences of tokens.

Dimensions: S sequences, T tokens of all sequences together, C channels, H heads of D = C / H channels.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from dino_train.common.device import gpu_of
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dino_kernels import FusedBlock, add_layer_norm, add_layer_norm_reference, attention, without_autograd
from dino_kernels.nn.layers import Linear, Mlp


class Packing(NamedTuple):
    """Bounds of the sequences [S + 1], int32, and the same on the host: (sequences, tokens of each)."""

    cu_seqlens: Tensor
    groups: list[tuple[int, int]]

    @property
    def flat(self) -> list[int]:
        return [n for group in self.groups for n in group]

    @property
    def tokens(self) -> int:
        return sum(count * length for count, length in self.groups)


def split_sequences(x: Tensor, groups: list[tuple[int, int]]) -> list[Tensor]:
    """[T, C] -> for each group [sequences, tokens, C]"""
    parts = x.split([count * length for count, length in groups])
    return [part.unflatten(0, group) for part, group in zip(parts, groups, strict=True)]


class Branch(NamedTuple):
    """What drop path leaves of a block's branch: some of the sequences, or all of them with factors of zero.

    rows and sequences, int32 and rising, say which of all tokens and sequences are left; None: all.
    """

    packing: Packing  # of the sequences that are left
    scale: Tensor | None = None  # factor of each of their tokens; None: 1
    rows: Tensor | None = None
    sequences: Tensor | None = None

    @staticmethod
    def of_kept(packing: Packing, kept: np.ndarray, factors: np.ndarray) -> "list[Branch]":
        """For each row of kept [R, S] the sequences of a packing on the CPU for which it is true, times its factor.

        kept: bool. factors: float32 [R].
        """
        counts, lengths = np.array(packing.groups).T
        tokens, count = lengths.repeat(counts), len(kept)
        left = np.stack([part.sum(1) for part in np.split(kept, counts.cumsum()[:-1], 1)], 1).tolist()
        bounds = np.zeros((count, 1 + len(tokens)), np.int32)
        (kept * tokens).cumsum(1, out=bounds[:, 1:])
        sizes, of_tokens = kept.sum(1), kept.repeat(tokens, 1)

        def pieces(values: np.ndarray, chosen: np.ndarray, sizes: np.ndarray) -> tuple[Tensor, ...]:
            return torch.from_numpy(np.broadcast_to(values, chosen.shape)[chosen]).split(sizes.tolist())

        columns = zip(
            pieces(bounds, np.hstack((np.ones((count, 1), bool), kept)), 1 + sizes),
            pieces(factors[:, None], of_tokens, bounds[:, -1]),
            pieces(np.arange(packing.tokens, dtype=np.int32), of_tokens, bounds[:, -1]),
            pieces(np.arange(len(tokens), dtype=np.int32), kept, sizes),
            left,
            strict=True,
        )
        return [
            Branch(packing, scale)
            if len(sequences) == len(tokens)
            else Branch(Packing(bound, list(zip(groups, lengths.tolist(), strict=True))), scale, rows, sequences)
            for bound, scale, rows, sequences, groups in columns
        ]

    def class_tokens(self) -> "Branch":
        """The same of sequences of one token."""
        first = self.packing.cu_seqlens[:-1]
        scale = None if self.scale is None else self.scale.index_select(0, first)
        return Branch(self.packing, scale, self.sequences, self.sequences)


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def project(self, x: Tensor) -> Tensor:
        """[T, C] -> queries, keys and values [T, 3, H, D]."""
        return self.qkv(x).unflatten(1, (3, self.num_heads, -1))

    def forward(self, x: Tensor, packing: Packing) -> Tensor:
        return self.proj(attention(self.project(x), packing.cu_seqlens, groups=packing.groups).flatten(1))

    def class_tokens(self, x: Tensor, packing: Packing) -> Tensor:
        """`forward` of the first token of each sequence [S, C]."""
        return self.proj(_class_heads(x, self, packing)[0])


class Block(nn.Module):
    """Pre-norm transformer block over packed tokens [T, C]."""

    named: tuple[nn.Parameter, ...]

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        # What a module finds by name, and a generator of parameters, are slow to ask for at each call.
        self.linears = self.attn.qkv, self.attn.proj, self.mlp.fc1, self.mlp.fc2
        _name_parameters(self)
        self.register_load_state_dict_post_hook(_name_parameters)  # which may assign other ones

    def forward(
        self,
        x: Tensor,
        normed: Tensor,
        next_norm: nn.LayerNorm,
        packing: Packing,
        drop_path: tuple[Branch, Branch, Branch] | None = None,
        class_only: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Residual stream and its norm1 -> residual stream and its `next_norm`: sums and norms are one pass.

        `drop_path` says what is left of the attention, whose tokens alone are in `normed`, of the MLP and of the next
        block's attention. With `class_only` just the class tokens are carried past the attention and returned.
        """
        branches = drop_path or (Branch(packing),) * 3
        if class_only:
            x = x.index_select(0, packing.cu_seqlens[:-1])
            branches = branches[0].class_tokens(), branches[1].class_tokens(), branches[2].class_tokens()
        if (copies := self.linears[0].copies) is not None:
            normed = normed.to(copies[0].dtype)
            named = *self.named, next_norm.weight, next_norm.bias  # so that autograd sees them
            if not class_only and (whole := self._whole(next_norm, branches)).fits(x, normed):
                if torch.is_grad_enabled():
                    return _Whole.apply(x, normed, whole, *named)
                return whole.forward(x, normed)[:2]
            arguments = x, normed, self, next_norm, branches, class_only
            if torch.is_grad_enabled():
                return _Chain.apply(*arguments, *named)
            x, normed, *_ = _chain(*arguments, keep=False)
            return x, normed
        attention_branch, mlp_branch, next_branch = branches
        attend = self.attn.class_tokens if class_only else self.attn
        branch = attend(normed, attention_branch.packing)
        x, normed = _add_norm(x, branch, self.norm2, attention_branch, mlp_branch)
        return _add_norm(x, self.mlp(normed), next_norm, mlp_branch, next_branch)

    def _whole(self, next_norm: nn.LayerNorm, branches: tuple[Branch, Branch, Branch]) -> FusedBlock:
        w_qkv, w_proj, w1, w2 = (layer.copies[0] for layer in self.linears if layer.copies)
        _, b_qkv, _, b_proj, *norm, _, b1, _, b2 = self.named
        weights = w_qkv, b_qkv, w_proj, b_proj, *norm, w1, b1, w2, b2, next_norm.weight, next_norm.bias
        (packing, scale, *_), (_, mlp_scale, *_), _ = branches
        rows = [branch.rows for branch in branches]
        assert next_norm.eps == self.norm2.eps
        return FusedBlock(weights, self.attn.num_heads, next_norm.eps, packing.cu_seqlens, (scale, mlp_scale), rows)


def _name_parameters(block: Block, _: Any = None) -> None:
    block.named = *block.attn.parameters(), *block.norm2.parameters(), *block.mlp.parameters()


def _like(x: Tensor) -> dict[str, Any]:
    return {"size": x.shape, "dtype": x.dtype, "device": x.device}


def _dense(grad: Tensor | None, grad_normed: Tensor | None, like: dict[str, Any]) -> tuple[Tensor | None, Tensor]:
    """The kernels take dense memory; a result that nobody used has no gradient."""
    grad = None if grad is None else grad.contiguous()
    return grad, torch.zeros(**like) if grad_normed is None else grad_normed.contiguous()


class _Whole(torch.autograd.Function):
    """A block's kernels in one call. Gradients of weights are added where the arena keeps them."""

    @staticmethod
    def forward(ctx, x, normed, block, *parameters):  # type: ignore[override]
        out, out_normed, kept = block.forward(x, normed)
        ctx.save_for_backward(normed, out, kept)
        ctx.block, ctx.parameters, ctx.normed_like = block, parameters, _like(out_normed)
        ctx.set_materialize_grads(False)
        return out, out_normed

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, grad_normed):  # type: ignore[override]
        normed, out, kept = ctx.saved_tensors
        grad, grad_normed = _dense(grad, grad_normed, ctx.normed_like)
        grads = [parameter.grad for parameter in ctx.parameters]
        return *ctx.block.backward_(grad, grad_normed, normed, out, kept, grads), *[None] * 13


_linear, _add_product_ = without_autograd("linear"), without_autograd("add_product_")
_attention, _attention_backward_ = without_autograd("attention"), without_autograd("attention_backward_")
_norm, _norm_backward_ = without_autograd("add_layer_norm"), without_autograd("add_layer_norm_backward_")
_mlp, _mlp_backward_ = without_autograd("mlp"), without_autograd("mlp_backward_")


def _heads(normed: Tensor, attn: Any, packing: Packing) -> tuple[Tensor, ...]:
    """What the attention projects [T, C], and what a backward needs besides."""
    qkv = _linear(normed, *attn.qkv.copies, False).unflatten(1, (3, attn.num_heads, -1))
    heads, lse = _attention(qkv, packing.cu_seqlens, packing.flat, qkv.shape[3] ** -0.5)
    return heads.flatten(1), qkv, heads, lse


def _heads_backward(grad: Tensor, normed: Tensor, attn: Any, packing: Packing, *kept: Tensor) -> Tensor:
    qkv, heads, lse = kept
    bias = attn.qkv.bias.grad
    in_attention, in_linear = (bias, None) if gpu_of(grad.device) else (None, bias)
    arguments = grad.view_as(heads), qkv, heads, lse, packing.cu_seqlens, packing.flat, qkv.shape[3] ** -0.5
    grad_qkv = _attention_backward_(*arguments, in_attention).flatten(1)
    return _linear_gradients(grad_qkv, normed, attn.qkv, in_linear)


def _class_heads(normed: Tensor, attn: Any, packing: Packing) -> tuple[Tensor, ...]:
    """`_heads` of the first token of each sequence [S, C], by the weights themselves: its products are small.

    No token needs a key or a value: <q, W_k x> = <W_k^T q, x>, where b_k would move all logits of a query alike, and
    the mean of W_v x + b_v is that of x, mapped.
    """
    (weight, bias), dim = (attn.qkv.weight, attn.qkv.bias), normed.shape[1]
    w_k, w_v = weight[dim:].view(2, attn.num_heads, -1, dim)
    x = normed.to(weight.dtype)
    q = F.linear(x.index_select(0, packing.cu_seqlens[:-1]), weight[:dim], bias[:dim]) * w_k.shape[1] ** -0.5
    queries = torch.bmm(_by_head(q, w_k), w_k).transpose(0, 1)  # [S, H, C]
    groups = split_sequences(x, packing.groups)
    rows = queries.split([len(tokens) for tokens in groups])
    softmaxes = [torch.bmm(row, tokens.mT).softmax(-1) for row, tokens in zip(rows, groups, strict=True)]
    means = torch.cat([torch.bmm(p, tokens) for p, tokens in zip(softmaxes, groups, strict=True)])
    heads = torch.bmm(means.transpose(0, 1), w_v.mT).transpose(0, 1).flatten(1) + bias[2 * dim :]
    return heads, q, queries, means, *softmaxes


def _class_heads_backward(grad: Tensor, normed: Tensor, attn: Any, packing: Packing, *kept: Tensor) -> Tensor:
    q, queries, means, *softmaxes = kept
    (weight, bias), dim, first = (attn.qkv.weight, attn.qkv.bias), normed.shape[1], packing.cu_seqlens[:-1]
    w_k, w_v = weight[dim:].view(2, attn.num_heads, -1, dim)
    into_k, into_v = weight.grad[dim:].view(2, *w_k.shape)
    x, grad = normed.to(weight.dtype), grad.to(weight.dtype)
    bias.grad[2 * dim :].add_(grad.sum(0))
    of_heads = _by_head(grad, w_k)
    into_v.baddbmm_(of_heads.mT, means.transpose(0, 1))
    of_means = torch.bmm(of_heads, w_v).transpose(0, 1)
    totals = (of_means * means).sum(-1, keepdim=True)
    grad_x, of_queries = torch.empty_like(x), torch.empty_like(means)
    parts = [len(p) for p in softmaxes]
    pieces = (t.split(parts) for t in (queries, of_means, totals, of_queries))
    groups = (split_sequences(t, packing.groups) for t in (x, grad_x))
    for p, row, of_mean, total, of_row, tokens, out in zip(softmaxes, *pieces, *groups, strict=True):
        of_logits = torch.baddbmm(total, of_mean, tokens.mT, beta=-1).mul_(p)
        torch.bmm(of_logits, tokens, out=of_row)
        torch.bmm(p.mT, of_mean, out=out).baddbmm_(of_logits.mT, row)
    of_queries = of_queries.transpose(0, 1)
    into_k.baddbmm_(_by_head(q, w_k).mT, of_queries)
    of_q = torch.bmm(of_queries, w_k.mT).transpose(0, 1).flatten(1) * w_k.shape[1] ** -0.5
    weight.grad[:dim].addmm_(of_q.t(), x.index_select(0, first))
    bias.grad[:dim].add_(of_q.sum(0))
    return grad_x.index_add_(0, first, of_q @ weight[:dim]).to(normed.dtype)


def _by_head(x: Tensor, weight: Tensor) -> Tensor:
    """[S, C] -> [H, S, D]"""
    return x.view(len(x), *weight.shape[:2]).transpose(0, 1)


def _chain(
    x: Tensor,
    normed: Tensor,
    block: Block,
    next_norm: nn.LayerNorm,
    branches: tuple[Branch, Branch, Branch],
    class_only: bool,
    keep: bool,
) -> tuple[Tensor, ...]:
    """The block's two results, and what a backward needs of what lies between."""
    attn, norm, fc1, fc2 = block.attn, block.norm2, block.mlp.fc1, block.mlp.fc2
    assert attn.qkv.copies and attn.proj.copies and fc1.copies and fc2.copies
    (packing, scale, rows, _), (_, mlp_scale, mlp_rows, _), (_, _, next_rows, _) = branches
    heads, *attended = (_class_heads if class_only else _heads)(normed, attn, packing)
    heads = heads.to(normed.dtype)
    branch = _linear(heads, *attn.proj.copies, False)
    middle, middle_normed, mean, rstd = _norm(x, branch, norm.weight, norm.bias, scale, rows, mlp_rows, norm.eps)
    bias2 = fc2.copies[1] if gpu_of(x.device) else fc2.bias
    branch, hidden = _mlp(middle_normed, fc1.copies[0], fc1.bias, fc2.copies[0], bias2, keep)
    out, out_normed, out_mean, out_rstd = _norm(
        middle, branch, next_norm.weight, next_norm.bias, mlp_scale, mlp_rows, next_rows, next_norm.eps
    )
    return out, out_normed, heads, middle, middle_normed, mean, rstd, hidden, out_mean, out_rstd, *attended


class _Chain(torch.autograd.Function):
    """`_chain` as one node: nine, each through torch's dispatcher, cost more than the smaller ops do.

    Gradients of weights are added where the arena keeps them.
    """

    @staticmethod
    def forward(ctx, x, normed, block, next_norm, branches, class_only, *_):  # type: ignore[override]
        out, out_normed, *between = _chain(x, normed, block, next_norm, branches, class_only, keep=True)
        ctx.save_for_backward(normed, out, *between)
        ctx.modules, ctx.branches, ctx.class_only = (block, next_norm), branches, class_only
        ctx.normed_like = _like(out_normed)
        ctx.set_materialize_grads(False)
        return out, out_normed

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, grad_normed):  # type: ignore[override]
        block, next_norm = ctx.modules
        attn, fc1, fc2 = block.attn, block.mlp.fc1, block.mlp.fc2
        normed, out, heads, middle, middle_normed, mean, rstd, hidden, out_mean, out_rstd, *attended = ctx.saved_tensors
        attention_branch, mlp_branch, next_branch = ctx.branches
        grad, grad_normed = _dense(grad, grad_normed, ctx.normed_like)
        # The gradient of the bias that a branch ends with comes out of the norm's pass, or of the linear layer's;
        # that of queries, keys and values likewise out of the attention's.
        biases = attn.proj.bias.grad, fc2.bias.grad
        in_norm, in_linear = (biases, (None, None)) if gpu_of(out.device) else ((None, None), biases)
        stats = out, out_mean, out_rstd
        grad, grad_branch = _norm_gradients(grad, grad_normed, stats, next_norm, mlp_branch, next_branch, in_norm[1])
        grads = fc1.weight.grad, fc1.bias.grad, fc2.weight.grad, in_linear[1]
        weights = fc1.copies[0], fc1.bias, fc2.copies[0]
        grad_normed = _mlp_backward_(grad_branch, middle_normed, hidden, *weights, *grads)
        stats = middle, mean, rstd
        branches = attention_branch, mlp_branch
        grad, grad_branch = _norm_gradients(grad, grad_normed, stats, block.norm2, *branches, in_norm[0])
        grad_heads = _linear_gradients(grad_branch, heads, attn.proj, in_linear[0])
        attend_backward = _class_heads_backward if ctx.class_only else _heads_backward
        grad_normed = attend_backward(grad_heads, normed, attn, attention_branch.packing, *attended)
        return grad, grad_normed, *[None] * 16


def _norm_gradients(
    grad: Tensor | None,
    grad_normed: Tensor,
    stats: tuple[Tensor, Tensor, Tensor],
    norm: Any,
    added: Branch,
    read: Branch,
    branch_sums: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Gradients of the residual stream and of the branch that was added to it; `read` read the norm."""
    arguments = *stats, norm.weight, added.scale, added.rows, read.rows, norm.weight.grad, norm.bias.grad, branch_sums
    grad, grad_branch = _norm_backward_(grad, grad_normed, *arguments)
    return grad, grad_branch if grad_branch.ndim == 2 else grad


def _linear_gradients(grad: Tensor, x: Tensor, layer: Any, grad_bias: Tensor | None) -> Tensor:
    """The gradient of x."""
    _add_product_(layer.weight.grad, grad, x, grad_bias)
    return _linear(grad, layer.copies[0], None, True)


def _add_norm(x: Tensor, branch: Tensor, norm: nn.LayerNorm, added: Branch, read: Branch) -> tuple[Tensor, Tensor]:
    op = add_layer_norm_reference if x.dtype == torch.float64 else add_layer_norm
    options = {"scale": added.scale, "rows": added.rows, "normed_rows": read.rows}
    return op(x, branch, norm.weight, norm.bias, **options, eps=norm.eps)
