"""Linear layers that multiply by copies of their weights and add gradients where the arena keeps them.

Outside of a training run (no arena) they are torch's own. In one, `Arena` gives each layer `copies` of its weights:
rounded to bfloat16 once a step, by the optimizer's pass, or the weights themselves in float32.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dino_kernels import (
    bias_gelu,
    bias_gelu_reference,
    linear,
    weight_norm_,
    weight_norm_product_backward_,
    without_autograd,
)

_linear_op, _add_product_ = without_autograd("linear"), without_autograd("add_product_")


class _Product(torch.autograd.Function):
    """`linear` with copies; gradients of weight and bias are added to their .grad, in place."""

    @staticmethod
    def forward(ctx, x, weight, bias, weight_copy, bias_copy):  # type: ignore[override]
        ctx.save_for_backward(x, weight_copy)
        ctx.weight, ctx.bias = weight, bias
        return _linear_op(x, weight_copy, bias_copy, False)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[override]
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        into_bias = None if ctx.bias is None else ctx.bias.grad
        _add_product_(ctx.weight.grad.view_as(weight), grad, x, into_bias)
        return _linear_op(grad, weight, None, True) if ctx.needs_input_grad[0] else None, None, None, None, None


class Linear(nn.Linear):
    """x [T, I] -> x weight^T + bias [T, O]; without `add_bias` only the product."""

    copies: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor, add_bias: bool = True) -> Tensor:
        return _linear(x, self.weight, self.bias if add_bias else None, self.copies)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, copies: tuple[Tensor, Tensor] | None) -> Tensor:
    """x weight^T + bias, with copies of both if there are any."""
    if copies is None:
        return F.linear(x, weight.flatten(1), bias)
    weight_copy, bias_copy = copies[0], None if bias is None else copies[1]
    x = x.to(weight_copy.dtype)
    if not torch.is_grad_enabled():
        return _linear_op(x, weight_copy, bias_copy, False)
    return _Product.apply(x, weight, bias, weight_copy, bias_copy)


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x, add_bias=False)
        # The op takes at most float32; a float64 net is there to check others.
        return self.fc2((bias_gelu_reference if x.dtype == torch.float64 else bias_gelu)(x, self.fc1.bias))


class PatchEmbed(nn.Module):
    """Images, each [B, 3, h, w], -> tokens of all their patches [P, C]; a convolution's weights, one product."""

    copies: tuple[Tensor, Tensor] | None = None

    def __init__(self, patch_size: int, embed_dim: int):
        super().__init__()
        self.proj = nn.Conv2d(3, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Sequence[Tensor]) -> Tensor:
        p = self.proj.kernel_size[0]
        grids = [(len(group), group.shape[2] // p, group.shape[3] // p) for group in images]
        counts = [math.prod(grid) for grid in grids]
        dtype = images[0].dtype if self.copies is None else self.copies[0].dtype
        patches = images[0].new_empty(sum(counts), 3 * p * p, dtype=dtype)
        for group, (n, rows, columns), to in zip(images, grids, patches.split(counts), strict=True):
            cut = group[..., : rows * p, : columns * p].unflatten(3, (columns, p)).unflatten(2, (rows, p))
            to.view(n, rows, columns, 3, p, p).copy_(cut.permute(0, 2, 4, 1, 3, 5))
        return _linear(patches, self.proj.weight, self.proj.bias, self.copies)


def hold_copies(net: nn.Module, dtype: torch.dtype) -> None:
    """Has a net that is trained no more multiply by copies of its weights, rounded to `dtype` once."""
    for layer in net.modules():
        if isinstance(layer, Linear | PatchEmbed):
            source = layer if isinstance(layer, Linear) else layer.proj
            assert source.bias is not None
            layer.copies = source.weight.detach().flatten(1).to(dtype), source.bias.detach().to(dtype)


class _WeightNormProduct(torch.autograd.Function):
    """x W^T with the materialized W; gradients are added to those of v and g, in place."""

    @staticmethod
    def forward(ctx, x, v, g, layer):  # type: ignore[override]
        ctx.save_for_backward(x)
        ctx.layer = layer
        return linear(x, layer.rows)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[override]
        (x,) = ctx.saved_tensors
        layer, v, g = ctx.layer, ctx.layer.weight_v, ctx.layer.weight_g
        if v.requires_grad:
            grad_g = g.grad if g.requires_grad else None
            weight_norm_product_backward_(v.grad, grad_g, grad, x, v, g, fresh=layer.stale)
            layer.stale = False
        return linear(grad, layer.rows, transposed=True) if ctx.needs_input_grad[0] else None, None, None, None


class WeightNormLinear(nn.Module):
    """x [N, in_dim] -> x W^T [N, out_dim] with rows W_k = g_k v_k / |v_k| (Salimans and Kingma 2016)."""

    rows: Tensor | None = None  # W, kept by the arena
    stale = False  # the gradient of v is an earlier step's: the next backward clears it

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_dim, 1))
        self.weight_v = nn.Parameter(torch.empty(out_dim, in_dim))
        nn.init.kaiming_uniform_(self.weight_v, a=math.sqrt(5))  # the default of nn.Linear

    def materialize(self) -> None:
        """Renew the kept W, after the weights changed."""
        assert self.rows is not None
        weight_norm_(self.rows, self.weight_v, self.weight_g)

    def forward(self, x: Tensor) -> Tensor:
        if self.rows is None:
            return F.linear(x, torch._weight_norm(self.weight_v, self.weight_g, 0))
        x = x.to(self.rows.dtype)
        if not torch.is_grad_enabled():
            return linear(x, self.rows)
        return _WeightNormProduct.apply(x, self.weight_v, self.weight_g, self)


def init_linear(module: nn.Module) -> None:
    """The reference's start for the linear layers of a ViT and of the head."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
