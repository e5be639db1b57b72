"""Layers whose products read copies of their weights, and which add gradients in place.

By itself a layer is torch's own operation. `FlatParameters` gives it `copies` of its weights, rounded to 16 bit once a
step, or the float32 weights themselves. Then its product is `dino_kernels.linear`'s, its result has the dtype of the
copies, and the backward pass adds the gradients of weights to their `.grad` in place: all parameters of such a layer
must be trained, or none of them.

Dimensions: T rows (tokens), I inputs, O outputs.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino_kernels._core.registry import once_differentiable, without_autograd
from dino_kernels.ops.bias_gelu import bias_gelu, bias_gelu_reference
from dino_kernels.ops.linear import linear
from dino_kernels.ops.weight_norm import weight_norm_, weight_norm_product_backward_

__all__ = ["LayerScale", "Linear", "Mlp", "PatchEmbed", "WeightNormLinear", "hold_copies"]

_linear_op, _add_product_ = without_autograd("linear"), without_autograd("add_product_")
_CopyOf = Callable[[Tensor], Tensor]


def _check_input(x: Tensor, channels: int, weight: Tensor) -> None:
    """The ops are called without their own checks."""
    if x.ndim != 2 or x.shape[1] != channels or not x.is_floating_point() or x.device != weight.device:
        raise ValueError(
            f"x must have shape [T, {channels}], a floating-point dtype and be on {weight.device} as the weights, "
            f"got {list(x.shape)}, {x.dtype} on {x.device}"
        )


def watched(*modules: nn.Module) -> bool:
    """Whether hooks look at one of the modules, which then must be called, as a whole and on all tokens."""
    return any(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
        for module in modules
    )


class _Product(torch.autograd.Function):
    """`linear` with copies; gradients of weight and bias are added to their .grad, in place."""

    @staticmethod
    def forward(ctx, x, weight, bias, weight_copy, bias_copy):  # type: ignore[override]
        ctx.save_for_backward(x, weight_copy)
        ctx.weight, ctx.bias = weight, bias
        return _linear_op(x, weight_copy, bias_copy, False)

    @staticmethod
    @once_differentiable("Linear", "torch's own modules")
    def backward(ctx, grad):  # type: ignore[override]
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        if ctx.needs_input_grad[1]:
            into_bias = None if ctx.bias is None else ctx.bias.grad
            _add_product_(ctx.weight.grad.view_as(weight), grad, x, into_bias)
        return _linear_op(grad, weight, None, True) if ctx.needs_input_grad[0] else None, None, None, None, None


class Linear(nn.Linear):
    """out = x weight^T + bias; parameters and their start as of torch.nn.Linear, weight [O, I] and bias [O] or none."""

    copies: tuple[Tensor, Tensor | None] | None = None

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias)

    def use_copies(self, copy_of: _CopyOf) -> None:
        self.copies = copy_of(self.weight), None if self.bias is None else copy_of(self.bias)

    def forward(self, x: Tensor, add_bias: bool = True) -> Tensor:
        """x [T, I] -> [T, O], or without `add_bias` the product alone.

        Args:
            x: of the dtype of weight; with copies of any float dtype, converted to that of the copies.

        Returns:
            Of the dtype of x; with copies of theirs.

        Raises:
            ValueError: x has another shape or lies on another device than the weights.
        """
        _check_input(x, self.in_features, self.weight)
        return _linear(x, self.weight, self.bias if add_bias else None, self.copies)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, copies: tuple[Tensor, Tensor | None] | None) -> Tensor:
    """x weight^T + bias, with copies of both if there are any."""
    if copies is None:
        return F.linear(x, weight.flatten(1), bias)
    weight_copy, bias_copy = copies[0], None if bias is None else copies[1]
    x = x.to(weight_copy.dtype).contiguous()
    if not torch.is_grad_enabled():
        return _linear_op(x, weight_copy, bias_copy, False)
    return _Product.apply(x, weight, bias, weight_copy, bias_copy)


class LayerScale(nn.Module):
    """out = gamma x, a factor for each channel of what `layer` returns (Touvron et al. 2021, arXiv 2103.17239).

    Parameter: gamma [C], which starts at `init`. A block with copies of its weights does not call it: since
    gamma (W h + b) = (gamma W) h + gamma b, its products read `copies` of gamma W and gamma b in place of the layer's.
    In float16 a gamma near 1e-5 leaves these few digits; bfloat16 has the range.
    """

    copies: tuple[Tensor, Tensor] | None = None
    bias: Tensor  # gamma b in float32

    def __init__(self, layer: Linear, init: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((layer.out_features,), init))
        self._layers = (layer,)  # in a tuple, or it would be a child of this module too

    def use_copies(self, copy_of: _CopyOf) -> None:
        (layer,) = self._layers
        dtype = copy_of(layer.weight).dtype
        self.bias = torch.empty_like(layer.bias, requires_grad=False)
        self.copies = torch.empty_like(layer.weight, dtype=dtype, requires_grad=False), self.bias.to(dtype)

    @torch.no_grad()
    def materialize(self) -> None:
        """Renew gamma W and gamma b, after the weights changed."""
        (layer,) = self._layers
        assert self.copies is not None
        weight, bias = self.copies
        torch.mul(layer.weight, self.gamma[:, None], out=weight)
        torch.mul(layer.bias, self.gamma, out=self.bias)
        bias.copy_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., C], any float dtype, which the result has too."""
        return x * self.gamma.to(x.dtype)

    def new_gradients(self) -> tuple[Tensor, Tensor]:
        """Zeros, for a backward pass to add the gradients of gamma W and gamma b to."""
        (layer,) = self._layers
        return torch.zeros_like(layer.weight), torch.zeros_like(layer.bias)

    def add_gradients(self, grad_weight: Tensor, grad_bias: Tensor) -> None:
        """Add the gradients of W, b and gamma, which follow from those of gamma W and gamma b, to their .grad."""
        (layer,) = self._layers
        weight, bias, gamma = layer.weight, layer.bias, self.gamma
        assert weight.grad is not None and bias.grad is not None and gamma.grad is not None
        weight.grad.addcmul_(gamma[:, None], grad_weight)
        bias.grad.addcmul_(gamma, grad_bias)
        gamma.grad.add_((weight * grad_weight).sum(1)).addcmul_(bias, grad_bias)


class Mlp(nn.Module):
    """out = fc2(gelu(fc1(x))), the exact gelu; fc1 [hidden, dim] and fc2 [dim, hidden] are `Linear`."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """x [T, dim] -> [T, dim]; dtypes and errors as of `Linear`."""
        if type(self.fc1) is not Linear or watched(self.fc1):
            return self.fc2(F.gelu(self.fc1(x)))
        x = self.fc1(x, add_bias=False)
        # The op takes at most float32; a float64 net is there to check others.
        return self.fc2((bias_gelu_reference if x.dtype == torch.float64 else bias_gelu)(x, self.fc1.bias))


class PatchEmbed(nn.Module):
    """out = proj(image), a convolution of stride p without overlap, as one product over the patches of all images.

    Parameters: those of proj, a Conv2d, weight [C, channels, p, p] and bias [C].
    """

    copies: tuple[Tensor, Tensor] | None = None

    def __init__(self, patch_size: int, embed_dim: int, channels: int = 3):
        super().__init__()
        self.proj = nn.Conv2d(channels, embed_dim, kernel_size=patch_size, stride=patch_size)

    def use_copies(self, copy_of: _CopyOf) -> None:
        assert self.proj.bias is not None
        self.copies = copy_of(self.proj.weight).flatten(1), copy_of(self.proj.bias)

    def forward(self, images: Sequence[Tensor]) -> Tensor:
        """Tokens of all patches, row by row, image by image.

        Args:
            images: at least one tensor [B, channels, h, w], of any mix of sizes; pixels past the last whole patch are
                ignored.

        Returns:
            [patches of all images, C]; of the dtype of images, with copies of theirs.

        Raises:
            ValueError: a tensor has another shape, or an image is smaller than a patch.
        """
        p, channels = self.proj.kernel_size[0], self.proj.in_channels
        if not images:
            raise ValueError("images must be at least one tensor, got none")
        for group in images:
            if group.ndim != 4 or group.shape[1] != channels or min(group.shape[2:]) < p:
                raise ValueError(
                    f"images must have shape [B, {channels}, h, w] with h, w >= {p}, got {list(group.shape)}"
                )
        grids = [(len(group), group.shape[2] // p, group.shape[3] // p) for group in images]
        counts = [math.prod(grid) for grid in grids]
        dtype = images[0].dtype if self.copies is None else self.copies[0].dtype
        cuts = []
        for group, (_, rows, columns) in zip(images, grids, strict=True):
            cut = group[..., : rows * p, : columns * p].unflatten(3, (columns, p)).unflatten(2, (rows, p))
            cuts.append(cut.permute(0, 2, 4, 1, 3, 5))
        if torch.is_grad_enabled() and any(group.requires_grad for group in images):
            patches = torch.cat([cut.reshape(-1, channels * p * p) for cut in cuts]).to(dtype)
        else:  # a pass over memory less
            patches = images[0].new_empty(sum(counts), channels * p * p, dtype=dtype)
            for cut, to in zip(cuts, patches.split(counts), strict=True):
                to.view(cut.shape).copy_(cut)
        return _linear(patches, self.proj.weight, self.proj.bias, self.copies)


class _WeightNormProduct(torch.autograd.Function):
    """x W^T with the materialized W; gradients are added to those of v and g, in place."""

    @staticmethod
    def forward(ctx, x, v, g, layer):  # type: ignore[override]
        ctx.save_for_backward(x)
        ctx.layer = layer
        return linear(x, layer.rows)

    @staticmethod
    @once_differentiable("WeightNormLinear", "torch's own modules")
    def backward(ctx, grad):  # type: ignore[override]
        (x,) = ctx.saved_tensors
        grad = grad.contiguous()
        layer, v, g = ctx.layer, ctx.layer.weight_v, ctx.layer.weight_g
        if v.requires_grad:
            grad_g = g.grad if g.requires_grad else None
            weight_norm_product_backward_(v.grad, grad_g, grad, x, v, g, overwrite=layer.overwrite_grad)
            layer.overwrite_grad = False
        return linear(grad, layer.rows, transposed=True) if ctx.needs_input_grad[0] else None, None, None, None


class WeightNormLinear(nn.Module):
    """out = x W^T with rows W_k = g_k v_k / |v_k| (Salimans and Kingma 2016).

    Parameters: weight_g [O, 1], which starts at 1, and weight_v [O, I], which starts as the weight of nn.Linear does;
    v, or v and g, may be frozen by requires_grad. I is at most 4096.
    """

    rows: Tensor | None = None  # W, kept by FlatParameters
    overwrite_grad = False  # what .grad of v holds is an earlier step's: the next backward overwrites it

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_dim, 1))
        self.weight_v = nn.Parameter(torch.empty(out_dim, in_dim))
        nn.init.kaiming_uniform_(self.weight_v, a=math.sqrt(5))  # the default of nn.Linear

    def use_copies(self, copy_of: _CopyOf) -> None:
        """In 16 bit the rows take the place of v's copy, which nobody reads."""
        v = copy_of(self.weight_v)
        self.rows = torch.empty_like(v) if v.dtype == torch.float32 else v

    def materialize(self) -> None:
        """Renew the kept W, after the weights changed."""
        assert self.rows is not None
        weight_norm_(self.rows, self.weight_v, self.weight_g)

    def forward(self, x: Tensor) -> Tensor:
        """x [T, I] -> [T, O]; dtypes and errors as of `Linear`."""
        _check_input(x, self.weight_v.shape[1], self.weight_v)
        if self.rows is None:
            return F.linear(x, torch._weight_norm(self.weight_v, self.weight_g, 0))
        x = x.to(self.rows.dtype).contiguous()
        if not torch.is_grad_enabled():
            return linear(x, self.rows)
        return _WeightNormProduct.apply(x, self.weight_v, self.weight_g, self)


def hold_copies(net: nn.Module, dtype: torch.dtype) -> None:
    """Has the layers of a net that is trained no more multiply by copies of their weights, rounded to `dtype` once."""
    for layer in net.modules():
        if isinstance(layer, Linear | PatchEmbed | WeightNormLinear | LayerScale):
            layer.use_copies(lambda parameter: parameter.detach().to(dtype))
        if isinstance(layer, WeightNormLinear | LayerScale):
            layer.materialize()
