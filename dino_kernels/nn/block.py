"""A transformer block over packed sequences of tokens.

    middle = x + scale * gamma1 * attention(norm1(x))        out = middle + scale * gamma2 * mlp(norm2(middle))

`scale` is drop path's, gamma layer scale's, if any. The block takes norm1(x) and returns the next block's norm1(out),
since a sum and the norm that reads it are one pass over memory.

Dimensions: S sequences, T tokens of all sequences together, C channels, H heads of D = C / H channels.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino_kernels._core.device import on_gpu
from dino_kernels._core.native import DTYPES
from dino_kernels._core.registry import once_differentiable, without_autograd
from dino_kernels.nn.layers import LayerScale, Linear, Mlp, watched
from dino_kernels.nn.packing import Branch, Packing, split_sequences
from dino_kernels.ops.add_layer_norm import add_layer_norm, add_layer_norm_reference
from dino_kernels.ops.attention import attention
from dino_kernels.ops.fused_block import FusedBlock

__all__ = ["Block"]


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
        qkv = self.project(x)
        if qkv.dtype == torch.float64:  # the op takes at most float32
            groups = (group.permute(2, 0, 3, 1, 4) for group in split_sequences(qkv, packing.groups))
            heads = [F.scaled_dot_product_attention(*group).transpose(1, 2).flatten(0, 1) for group in groups]
            return self.proj(torch.cat(heads).flatten(1))
        return self.proj(attention(qkv, packing.cu_seqlens, groups=packing.groups).flatten(1))

    def class_tokens(self, x: Tensor, packing: Packing) -> Tensor:
        """`forward` of the first token of each sequence [S, C]."""
        if type(self.qkv) is not Linear:  # whose weight may not be all that it multiplies by
            return self(x, packing).index_select(0, packing.cu_seqlens[:-1])
        return self.proj(_class_heads(x, self, packing)[0])


class Block(nn.Module):
    """Pre-norm transformer block over packed tokens [T, C]; formula in the module's docstring.

    Args:
        dim: channels C, at most 4096.
        num_heads: H, divides dim.
        mlp_ratio: hidden width of the MLP over dim.
        layer_scale: what the factors gamma1 and gamma2 of each branch's channels start at, parameters ls1.gamma and
            ls2.gamma [C] (Touvron et al. 2021, arXiv 2103.17239); None: it has none.
    """

    named: tuple[nn.Parameter, ...]

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 4.0, layer_scale: float | None = None):
        super().__init__()
        if num_heads < 1 or dim < 1 or dim % num_heads:
            raise ValueError(f"num_heads must divide dim, got dim={dim} and num_heads={num_heads}")
        self.dim = dim
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale(self.attn.proj, layer_scale)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.ls2 = nn.Identity() if layer_scale is None else LayerScale(self.mlp.fc2, layer_scale)
        # What a module finds by name, and a generator of parameters, are slow to ask for at each call.
        self.linears = self.attn.qkv, self.attn.proj, self.mlp.fc1, self.mlp.fc2
        self.scales = self.ls1, self.ls2
        # What holds the copies, the bias and the gradients of the last product of each branch.
        self.ends = tuple(
            scale if isinstance(scale, LayerScale) else layer
            for scale, layer in zip(self.scales, self.linears[1::2], strict=True)
        )
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
        """Residual stream and its norm1 -> residual stream and its `next_norm`.

        Args:
            x: [T, C], of any float dtype; with copies of weights float32, float16 or bfloat16.
            normed: norm1(x) [A, C]: of all tokens, or of those that drop path leaves to the attention.
            next_norm: norm1 of the next block, or what follows the last one; its eps is that of norm2.
            packing: of x.
            drop_path: what is left of the attention, of the MLP and of the next block's attention; a row of
                `dino_kernels.nn.drop_path`. None: everything.
            class_only: carry just the first token of each sequence past the attention.

        Returns:
            [T, C], of the dtype of x, and its next_norm [N, C], of the dtype of normed or of the copies; with
            class_only the first tokens' [S, C].

        Raises:
            ValueError: a shape, dtype or device that does not fit the above.
        """
        branches = drop_path or (Branch(packing),) * 3
        self._check(x, normed, next_norm, packing, branches[0].packing)
        if class_only:
            x = x.index_select(0, packing.cu_seqlens[:-1])
            branches = branches[0].class_tokens(), branches[1].class_tokens(), branches[2].class_tokens()
        attn, mlp = self.attn, self.mlp
        # As LoRA does: each is called by itself.
        replaced = self.linears != (attn.qkv, attn.proj, mlp.fc1, mlp.fc2) or self.scales != (self.ls1, self.ls2)
        if (copies := self.linears[0].copies) is not None and not replaced:
            x, normed = x.contiguous(), normed.to(copies[0].dtype).contiguous()
            named = *self.named, next_norm.weight, next_norm.bias  # so that autograd sees them
            if not class_only and (fused := self._fused(next_norm, branches)).fits(x, normed):
                if torch.is_grad_enabled():
                    return _Fused.apply(x, normed, self, fused, *named)
                return fused.forward(x, normed)[:2]
            arguments = x, normed, self, next_norm, branches, class_only
            if torch.is_grad_enabled():
                return _Unfused.apply(*arguments, *named)
            x, normed, *_ = _unfused_forward(*arguments, keep=False)
            return x, normed
        attention_branch, mlp_branch, next_branch = branches
        attend = self.attn.class_tokens if class_only else self.attn
        branch = self.ls1(attend(normed, attention_branch.packing))
        x, normed = _add_norm(x, branch, self.norm2, attention_branch, mlp_branch)
        return _add_norm(x, self.ls2(self.mlp(normed)), next_norm, mlp_branch, next_branch)

    def watched(self, next_norm: nn.LayerNorm) -> bool:
        """Whether hooks look at the block, at a part of it or at the norm behind it: then `class_only` would hide from
        them the other tokens."""
        return watched(next_norm, *self.modules())

    def _check(self, x: Tensor, normed: Tensor, next_norm: nn.LayerNorm, packing: Packing, attended: Packing) -> None:
        """With copies the kernels are called without their own checks."""
        weight, dim = self.named[0], self.dim
        if x.shape != (packing.tokens, dim) or normed.shape != (attended.tokens, dim):
            raise ValueError(
                f"x and normed must have shapes {[packing.tokens, dim]} and {[attended.tokens, dim]}, as packed, "
                f"got {list(x.shape)} and {list(normed.shape)}"
            )
        if not x.device == normed.device == packing.cu_seqlens.device == weight.device:
            raise ValueError(
                f"x, normed and packing must be on {weight.device} as the weights, "
                f"got {x.device}, {normed.device} and {packing.cu_seqlens.device}"
            )
        if self.linears[0].copies is not None and x.dtype not in DTYPES:
            raise ValueError(f"x must be float32, float16 or bfloat16 where weights have copies, got {x.dtype}")
        if next_norm.weight.shape != (dim,) or next_norm.eps != self.norm2.eps:
            raise ValueError(
                f"next_norm must have {dim} channels and eps {self.norm2.eps}, "
                f"got {list(next_norm.weight.shape)} and {next_norm.eps}"
            )

    def _apply(self, *arguments: Any, **options: Any) -> "Block":
        """A move to another device may replace parameters."""
        super()._apply(*arguments, **options)
        _name_parameters(self)
        return self

    def _fused(self, next_norm: nn.LayerNorm, branches: tuple[Branch, Branch, Branch]) -> FusedBlock:
        (w_qkv, _, w1, _), (proj, fc2) = (layer.copies[0] for layer in self.linears if layer.copies), self.ends
        assert proj.copies and fc2.copies
        _, b_qkv, _, _, *norm, _, b1, _, _ = self.named[:10]
        first = w_qkv, b_qkv, proj.copies[0], proj.bias, *norm
        weights = *first, w1, b1, fc2.copies[0], fc2.bias, next_norm.weight, next_norm.bias
        (packing, scale, *_), (_, mlp_scale, *_), _ = branches
        rows = [branch.rows for branch in branches]
        return FusedBlock(weights, self.attn.num_heads, next_norm.eps, packing.cu_seqlens, (scale, mlp_scale), rows)


def _name_parameters(block: Block, _: Any = None) -> None:
    parts = block.attn, block.norm2, block.mlp, block.ls1, block.ls2
    block.named = tuple(parameter for part in parts for parameter in part.parameters())


def _gradients_of_ends(block: Block) -> list[tuple[Any, Any]]:
    """What a backward pass adds the gradients of the weights and biases of `block.ends` to."""
    return [e.new_gradients() if isinstance(e, LayerScale) else (e.weight.grad, e.bias.grad) for e in block.ends]


def _unscale_gradients(block: Block, of_ends: list[tuple[Any, Any]]) -> None:
    """After that backward pass: those of scaled weights become those of the weights and the scale."""
    for end, grads in zip(block.ends, of_ends, strict=True):
        if isinstance(end, LayerScale):
            end.add_gradients(*grads)


def _like(x: Tensor) -> dict[str, Any]:
    return {"size": x.shape, "dtype": x.dtype, "device": x.device}


def _dense(grad: Tensor | None, grad_normed: Tensor | None, like: dict[str, Any]) -> tuple[Tensor | None, Tensor]:
    """The kernels take dense memory; a result that nobody used has no gradient."""
    grad = None if grad is None else grad.contiguous()
    return grad, torch.zeros(**like) if grad_normed is None else grad_normed.contiguous()


class _Fused(torch.autograd.Function):
    """`FusedBlock`. Gradients of weights are added to their .grad in place."""

    @staticmethod
    def forward(ctx, x, normed, block, fused, *parameters):  # type: ignore[override]
        out, out_normed, kept = fused.forward(x, normed)
        ctx.save_for_backward(normed, out, kept)
        ctx.block, ctx.fused, ctx.parameters, ctx.normed_like = block, fused, parameters, _like(out_normed)
        ctx.set_materialize_grads(False)
        return out, out_normed

    @staticmethod
    @once_differentiable("Block", "torch's own modules")
    def backward(ctx, grad, grad_normed):  # type: ignore[override]
        normed, out, kept = ctx.saved_tensors
        grad, grad_normed = _dense(grad, grad_normed, ctx.normed_like)
        grads = [parameter.grad for parameter in ctx.parameters]
        proj, fc2 = of_ends = _gradients_of_ends(ctx.block)
        grads = [*grads[:2], *proj, *grads[4:8], *fc2, *grads[-2:]]
        grad, grad_normed = ctx.fused.backward_(grad, grad_normed, normed, out, kept, grads)
        _unscale_gradients(ctx.block, of_ends)
        return grad, grad_normed, None, None, *[None] * len(ctx.parameters)


_linear, _add_product_ = without_autograd("linear"), without_autograd("add_product_")
_attention, _attention_backward_ = without_autograd("attention"), without_autograd("attention_backward_")
_norm, _norm_backward_ = without_autograd("add_layer_norm"), without_autograd("add_layer_norm_backward_")
_mlp, _mlp_backward_ = without_autograd("mlp"), without_autograd("mlp_backward_")


def _heads(normed: Tensor, attn: Any, packing: Packing) -> tuple[Tensor, ...]:
    """What the attention projects [T, C], and what else is saved for backward."""
    qkv = _linear(normed, *attn.qkv.copies, False).unflatten(1, (3, attn.num_heads, -1))
    heads, lse = _attention(qkv, packing.cu_seqlens, packing.flat, qkv.shape[3] ** -0.5)
    return heads.flatten(1), qkv, heads, lse


def _heads_backward(grad: Tensor, normed: Tensor, attn: Any, packing: Packing, *kept: Tensor) -> Tensor:
    qkv, heads, lse = kept
    bias = attn.qkv.bias.grad
    in_attention, in_linear = (bias, None) if on_gpu(grad.device) else (None, bias)
    arguments = grad.view_as(heads), qkv, heads, lse, packing.cu_seqlens, packing.flat, qkv.shape[3] ** -0.5
    grad_qkv = _attention_backward_(*arguments, in_attention).flatten(1)
    return _linear_gradients(grad_qkv, normed, attn.qkv.copies[0], attn.qkv.weight.grad, in_linear)


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


def _unfused_forward(
    x: Tensor,
    normed: Tensor,
    block: Block,
    next_norm: nn.LayerNorm,
    branches: tuple[Branch, Branch, Branch],
    class_only: bool,
    keep: bool,
) -> tuple[Tensor, ...]:
    """The block's two results, and what is saved for backward of what lies between."""
    attn, norm, fc1, (proj, fc2) = block.attn, block.norm2, block.mlp.fc1, block.ends
    assert attn.qkv.copies and proj.copies and fc1.copies and fc2.copies
    (packing, scale, rows, _), (_, mlp_scale, mlp_rows, _), (_, _, next_rows, _) = branches
    heads, *attended = (_class_heads if class_only else _heads)(normed, attn, packing)
    heads = heads.to(normed.dtype)
    branch = _linear(heads, *proj.copies, False)
    middle, middle_normed, mean, rstd = _norm(x, branch, norm.weight, norm.bias, scale, rows, mlp_rows, norm.eps)
    bias2 = fc2.copies[1] if on_gpu(x.device) else fc2.bias
    branch, hidden = _mlp(middle_normed, fc1.copies[0], fc1.bias, fc2.copies[0], bias2, keep)
    out, out_normed, out_mean, out_rstd = _norm(
        middle, branch, next_norm.weight, next_norm.bias, mlp_scale, mlp_rows, next_rows, next_norm.eps
    )
    return out, out_normed, heads, middle, middle_normed, mean, rstd, hidden, out_mean, out_rstd, *attended


class _Unfused(torch.autograd.Function):
    """The block's ops as one node, where `FusedBlock` does not fit: on a GPU, and of class tokens alone.

    Nine nodes through torch's dispatcher cost more than the smaller ops do; and on a GPU the gradients of biases come
    out of passes of their neighbours, which separate nodes could not share. Gradients of weights are added to their
    .grad in place.
    """

    @staticmethod
    def forward(ctx, x, normed, block, next_norm, branches, class_only, *parameters):  # type: ignore[override]
        out, out_normed, *between = _unfused_forward(x, normed, block, next_norm, branches, class_only, keep=True)
        ctx.save_for_backward(normed, out, *between)
        ctx.modules, ctx.branches, ctx.class_only, ctx.count = (block, next_norm), branches, class_only, len(parameters)
        ctx.normed_like = _like(out_normed)
        ctx.set_materialize_grads(False)
        return out, out_normed

    @staticmethod
    @once_differentiable("Block", "torch's own modules")
    def backward(ctx, grad, grad_normed):  # type: ignore[override]
        block, next_norm = ctx.modules
        attn, fc1, (proj, fc2) = block.attn, block.mlp.fc1, block.ends
        normed, out, heads, middle, middle_normed, mean, rstd, hidden, out_mean, out_rstd, *attended = ctx.saved_tensors
        attention_branch, mlp_branch, next_branch = ctx.branches
        grad, grad_normed = _dense(grad, grad_normed, ctx.normed_like)
        # The gradient of the bias that a branch ends with comes out of the norm's pass, or of the linear layer's;
        # that of queries, keys and values likewise out of the attention's.
        (into_proj, bias1), (into_fc2, bias2) = of_ends = _gradients_of_ends(block)
        biases = bias1, bias2
        in_norm, in_linear = (biases, (None, None)) if on_gpu(out.device) else ((None, None), biases)
        stats = out, out_mean, out_rstd
        grad, grad_branch = _norm_gradients(grad, grad_normed, stats, next_norm, mlp_branch, next_branch, in_norm[1])
        grads = fc1.weight.grad, fc1.bias.grad, into_fc2, in_linear[1]
        weights = fc1.copies[0], fc1.bias, fc2.copies[0]
        grad_normed = _mlp_backward_(grad_branch, middle_normed, hidden, *weights, *grads)
        stats = middle, mean, rstd
        branches = attention_branch, mlp_branch
        grad, grad_branch = _norm_gradients(grad, grad_normed, stats, block.norm2, *branches, in_norm[0])
        grad_heads = _linear_gradients(grad_branch, heads, proj.copies[0], into_proj, in_linear[0])
        _unscale_gradients(block, of_ends)
        attend_backward = _class_heads_backward if ctx.class_only else _heads_backward
        grad_normed = attend_backward(grad_heads, normed, attn, attention_branch.packing, *attended)
        return grad, grad_normed, *[None] * (4 + ctx.count)


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


def _linear_gradients(grad: Tensor, x: Tensor, weight: Tensor, into: Tensor, grad_bias: Tensor | None) -> Tensor:
    """The gradient of x; that of weight is added to `into`."""
    _add_product_(into, grad, x, grad_bias)
    return _linear(grad, weight, None, True)


def _add_norm(x: Tensor, branch: Tensor, norm: nn.LayerNorm, added: Branch, read: Branch) -> tuple[Tensor, Tensor]:
    takes = x.dtype != torch.float64 and norm.weight.dtype == torch.float32
    op = add_layer_norm if takes else add_layer_norm_reference
    options = {"scale": added.scale, "rows": added.rows, "normed_rows": read.rows}
    x, normed = op(x, branch, norm.weight, norm.bias, **options, eps=norm.eps)
    if watched(norm):  # its hooks run only where it is called
        normed = norm(x if read.rows is None else x.index_select(0, read.rows)).to(branch.dtype)
    return x, normed
