"""The networks of DINO: a backbone (ViT over packed multi-crop sequences, or ResNet-50) and its head.

Dimensions: V crops (views) of B images, S = V*B sequences of 1 + R + patches tokens (class token, registers,
patches), T tokens of all sequences together, C = embed_dim, H heads of D = C / H channels, K = out_dim.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dino_kernels.nn import Block, Linear, Packing, PatchEmbed, drop_path, split_sequences
from dino_train.models.head import DINOHead
from dino_train.models.init import init_linear
from dino_train.models.resnet import RESNETS, ResNet


class Size(NamedTuple):
    embed_dim: int
    depth: int
    num_heads: int


# vit_nano is ours, for demonstrations on a CPU; vit_small_12heads is MoCo v3's ViT-S (vits.py:117 of
# facebookresearch/moco-v3), vit_large DINOv2's ViT-L; the others are the paper's (`vision_transformer.py:234`).
VIT_SIZES = {
    "vit_nano": Size(96, 3, 3),
    "vit_tiny": Size(192, 12, 3),
    "vit_small": Size(384, 12, 6),
    "vit_small_12heads": Size(384, 12, 12),
    "vit_base": Size(768, 12, 12),
    "vit_large": Size(1024, 24, 16),
}
ARCHS = (*VIT_SIZES, *RESNETS)


class VisionTransformer(nn.Module):
    """Vision transformer with class token, learned positions and drop path (`vision_transformer.py:135`).

    Crops of all resolutions run through the blocks as one packed sequence of tokens. Past the attention
    of the last block only class tokens are computed: nothing else reaches the output.

    Args:
        img_size: height and width in pixels that the position grid is made for (else interpolated).
        patch_size: height and width of a patch in pixels; divides img_size.
        embed_dim: channels C of a token.
        depth: number of blocks.
        num_heads: attention heads H; divides embed_dim.
        mlp_ratio: hidden width of the MLP over embed_dim.
        drop_path_rate: probability in [0, 1) that a sample skips a branch of the last block; it rises
            linearly from 0 in the first, unless the attribute `drop_path_uniform` is set. Identity in eval mode.
        channels: of an image.
        registers: learned tokens R between class token and patches (Darcet et al. 2024, arXiv 2309.16588). They have no
            position and are no part of what any method returns.
        mask_token: whether it has the token that stands for a masked patch, see `tokens`.
        layer_scale: as of `Block`.

    Raises:
        ValueError: patch_size is below 1 or does not divide img_size; drop_path_rate is out of range.
    """

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 16,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
        channels: int = 3,
        registers: int = 0,
        mask_token: bool = False,
        layer_scale: float | None = None,
    ):
        super().__init__()
        self.checkpoint_activations = self.drop_path_uniform = False
        self.channels = channels
        if patch_size < 1 or img_size < patch_size or img_size % patch_size:
            raise ValueError(
                f"patch_size must be at least 1 and divide img_size, got patch_size={patch_size} and "
                f"img_size={img_size}"
            )
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f"drop_path_rate must be in [0, 1), got {drop_path_rate}")
        assert embed_dim % num_heads == 0
        self.patch_size = patch_size
        self.embed_dim = embed_dim
        self.drop_path_rate = drop_path_rate
        self.patch_embed = PatchEmbed(patch_size, embed_dim, channels)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + (img_size // patch_size) ** 2, embed_dim))
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio, layer_scale) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.apply(init_linear)
        # As in dinov2/models/vision_transformer.py:113 and :171. Drawn last: the other weights stay as without them.
        if registers:
            self.register_tokens = nn.Parameter(torch.empty(1, registers, embed_dim).normal_(std=1e-6))
        if mask_token:
            self.mask_token = nn.Parameter(torch.zeros(1, embed_dim))
        self.lead = 1 + registers  # tokens before the patches

    def forward(self, crops: Tensor | Sequence[Tensor]) -> Tensor:
        """Normalized class tokens.

        Args:
            crops: images [B, channels, h, w], float, or a list of them of any mix of h, w and B. Pixels beyond
                the last whole patch are ignored.

        Returns:
            [S, C], rows in the order of the list: all images of crop 0, all of crop 1, ...

        Raises:
            ValueError: an image has other channels or is smaller than a patch.
        """
        crops = [crops] if isinstance(crops, Tensor) else crops
        if torch.jit.is_tracing() or torch.compiler.is_exporting():
            if self.training and self.drop_path_rate > 0:
                raise ValueError("a trace or an export has no drop path: call .eval() before")
            return torch.cat([self._unpacked(crop) for crop in crops])
        x, packing = self._embed(crops)
        last, norm = self.blocks[-1], self.norm
        assert isinstance(last, Block)
        class_only = not last.watched(norm)
        normed = self._run(x, packing, class_only)
        return normed if class_only else normed.index_select(0, packing.cu_seqlens[:-1])

    def tokens(self, crops: Sequence[Tensor], masks: Tensor | None = None) -> tuple[Tensor, Packing]:
        """Normalized tokens of all crops, with drop path as `forward`.

        Args:
            crops: as in `forward`.
            masks: bool [N, patches], true where the mask token takes the place of a patch before its position is added
                (iBOT, arXiv 2111.07832, section 3.1): of the first N <= S sequences, which have one size. Needs
                `mask_token`.

        Returns:
            [T, C], and how the tokens of a sequence lie in it: class token, registers, patches row by row.

        Raises:
            ValueError: as in `forward`.
        """
        x, packing = self._embed(crops, masks)
        return self._run(x, packing, False), packing

    def _run(self, x: Tensor, packing: Packing, class_only: bool) -> Tensor:
        """Normalized tokens past the last block [T, C]; with class_only the first of each sequence [S, C]."""
        dropping, depth = self.training and self.drop_path_rate > 0, len(self.blocks)
        uniform = self.drop_path_uniform
        left = drop_path(packing, depth, self.drop_path_rate, uniform) if dropping else [None] * depth
        normed = self._first_norm(x)
        for i, (block, norm) in enumerate(self._with_next_norm()):
            arguments = (x, normed, norm, packing, left[i], class_only and i == depth - 1)
            if self.checkpoint_activations and torch.is_grad_enabled():
                x, normed = checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                x, normed = block(*arguments)
        return normed

    def _unpacked(self, images: Tensor) -> Tensor:
        """`forward` in torch's own operations, for a trace or an export: of as many images as there will be."""
        check_images(images, self.channels, self.patch_size)
        patches = self.patch_embed.proj(images).flatten(2).transpose(1, 2)
        table = self._table(*map(int, images.shape[2:]))
        # Not len(): a graph would keep the number.
        lead = table[: self.lead].expand(images.shape[0], -1, -1)
        x = torch.cat((lead, patches + table[self.lead :]), dim=1)
        block: Any
        for block in self.blocks:
            qkv = _apply(block.attn.qkv, block.norm1(x)).unflatten(-1, (3, block.attn.num_heads, -1))
            out = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4).unbind(0))
            x = x + block.ls1(_apply(block.attn.proj, out.transpose(1, 2).flatten(2)))
            x = x + block.ls2(_apply(block.mlp.fc2, F.gelu(_apply(block.mlp.fc1, block.norm2(x)))))
        return self.norm(x[:, 0])

    def _with_next_norm(self) -> Iterator[tuple[Block, nn.LayerNorm]]:
        """Each block, and the norm that reads its result."""
        blocks = [block for block in self.blocks if isinstance(block, Block)]
        yield from zip(blocks, [*(block.norm1 for block in blocks[1:]), self.norm], strict=True)

    def _first_norm(self, x: Tensor) -> Tensor:
        first = self.blocks[0]
        assert isinstance(first, Block)
        return first.norm1(x)

    def features(self, images: Tensor, n_blocks: int = 1) -> list[Tensor]:
        """Normalized tokens of the last n blocks, without drop path (`vision_transformer.py:225`).

        Args:
            images: [B, channels, h, w], float.
            n_blocks: how many blocks n, 1 to depth.

        Returns:
            n tensors [B, 1 + patches, C] in the order of the blocks, class token first.

        Raises:
            ValueError: n_blocks is out of range, or as in `forward`.
        """
        if not 1 <= n_blocks <= len(self.blocks):
            raise ValueError(f"n_blocks must be from 1 to the number of blocks, {len(self.blocks)}, got {n_blocks}")
        x, packing = self._embed([images])
        maps, normed = [], self._first_norm(x)
        for i, (block, norm) in enumerate(self._with_next_norm()):
            x, normed = block(x, normed, norm, packing)
            if len(self.blocks) - i <= n_blocks:
                maps.append(without_registers(self.norm(x).view(*packing.groups[0], self.embed_dim), self.lead))
        return maps

    def attention(self, images: Tensor) -> Tensor:
        """The class token's attention in the last block, without drop path (`vision_transformer.py:216`).

        Args:
            images: [B, channels, h, w], float.

        Returns:
            [B, H, 1 + patches], float32 or float64, class token first; each row sums to one, less what registers have.

        Raises:
            ValueError: as in `forward`.
        """
        x, packing = self._embed([images])
        normed = self._first_norm(x)
        *body, (last, _) = self._with_next_norm()
        for block, norm in body:
            x, normed = block(x, normed, norm, packing)
        q, k, _ = last.attn.project(normed).unflatten(0, packing.groups[0]).unbind(2)
        logits = torch.einsum("bhd,bnhd->bhn", q[:, 0], k) * q.shape[-1] ** -0.5
        attention = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        return without_registers(attention.transpose(1, 2), self.lead).transpose(1, 2)

    def _embed(self, crops: Sequence[Tensor], masks: Tensor | None = None) -> tuple[Tensor, Packing]:
        """Tokens of all crops [T, C] in list order and how they are packed; `masks` as in `tokens`."""
        for crop in crops:
            check_images(crop, self.channels, self.patch_size)
        runs = [(shape, sum(map(len, run))) for shape, run in groupby(crops, key=lambda crop: crop.shape[2:])]
        tables = {shape: self._table(*shape) for shape in dict(runs)}
        groups = [(count, len(tables[shape])) for shape, count in runs]
        masked = (None, None) if masks is None else (masks, self.mask_token)
        of_runs = (tables[shape] for shape, _ in runs)
        x = _Sequences.apply(self.patch_embed(crops), groups, self.lead, *masked, *of_runs)
        return x, Packing.of(groups, x.device)

    def _table(self, h: int, w: int) -> Tensor:
        """Class token, registers and positions of an image of h x w pixels [1 + R + patches, C], to which its patches
        are added."""
        of_class, positions = _split(self._positions(h, w))
        registers = [self.register_tokens] if self.lead > 1 else []
        return torch.cat((self.cls_token + of_class, *registers, positions), dim=1).squeeze(0)

    def _positions(self, h: int, w: int) -> Tensor:
        """Position embedding [1, 1 + patches, C] for images of h x w pixels."""
        return interpolate_positions(self.pos_embed, h, w, self.patch_size, self.lead - 1)


def without_registers(tokens: Tensor, lead: int) -> Tensor:
    """[B, 1 + R + patches, ...] -> [B, 1 + patches, ...], where lead = 1 + R."""
    return tokens if lead == 1 else torch.cat((tokens[:, :1], tokens[:, lead:]), dim=1)


def interpolate_positions(positions: Tensor, h: int, w: int, patch_size: int, registers: int) -> Tensor:
    """Learned positions [1, 1 + cells, C] of a square grid for images of h x w pixels: [1, 1 + patches, C].

    Bicubic: without registers as DINO and DINOv2 do it (`vision_transformer.py:174`), with registers antialiased and
    without an offset as DINOv2's models with registers (dinov2/hub/backbones.py).
    """
    rows, cols = h // patch_size, w // patch_size
    cells = positions.shape[1] - 1
    if rows * cols == cells and h == w:
        return positions
    side = math.isqrt(cells)
    of_class, grid = _split(positions)
    grid = grid.unflatten(1, (side, side)).permute(0, 3, 1, 2)
    if registers:
        wide = grid.to(torch.promote_types(grid.dtype, torch.float32))  # not implemented for 16 bit
        grid = F.interpolate(wide, size=(rows, cols), mode="bicubic", antialias=True).to(grid.dtype)
    else:
        # The 0.1 keeps rows and cols from being rounded down; it also shifts the sampled points a little,
        # which published weights were trained with.
        grid = F.interpolate(grid, scale_factor=((rows + 0.1) / side, (cols + 0.1) / side), mode="bicubic")
    return torch.cat((of_class, grid.flatten(2).transpose(1, 2)), dim=1)


def _split(positions: Tensor) -> tuple[Tensor, Tensor]:
    """Of the class token and of the patches; not two slices, whose gradients would each be padded with zeros."""
    of_class, rest = positions.split([1, positions.shape[1] - 1], dim=1)
    return of_class, rest


def _apply(layer: nn.Module, x: Tensor) -> Tensor:
    """A linear layer, or what took its place, of tokens [B, N, C]."""
    if type(layer) is Linear:
        return nn.Linear.forward(layer, x)
    return layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])


class _Sequences(torch.autograd.Function):
    """Tokens of patches [P, C], `lead` tokens put before those of each image, plus a table a group of images; `masks`
    [N, patches] of the first images are true where `mask_token` [1, C] takes the place of a patch."""

    @staticmethod
    def forward(ctx, patches, groups, lead, masks, mask_token, *tables):  # type: ignore[override]
        ctx.groups, ctx.lead, ctx.masks, ctx.dtype, channels = groups, lead, masks, patches.dtype, patches.shape[1]
        x = tables[0].new_empty(sum(count * length for count, length in groups), channels)
        of_groups = split_sequences(patches, [(count, length - lead) for count, length in groups])
        for out, tokens, table in zip(split_sequences(x, groups), of_groups, tables, strict=True):
            torch.add(tokens, table[lead:], out=out[:, lead:])
            out[:, :lead] = table[:lead]
        if masks is not None:
            out = _masked_part(x, groups, lead, masks)
            out.copy_(torch.where(masks.unsqueeze(2), mask_token + tables[0][lead:], out))
        return x

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        groups, lead, masks = ctx.groups, ctx.lead, ctx.masks
        grads, of_patches = split_sequences(grad, groups), [(count, length - lead) for count, length in groups]
        grad_token = None
        if masks is not None:
            part = _masked_part(grad, groups, lead, masks)
            grad_token = (part * masks.unsqueeze(2)).sum((0, 1)).view(1, -1)
        if torch.is_grad_enabled():  # create_graph=True
            patches = torch.cat([part[:, lead:].flatten(0, 1) for part in grads]).to(ctx.dtype)
            if masks is not None:
                hidden = torch.cat([masks.flatten(), masks.new_zeros(len(patches) - masks.numel())])
                patches = patches.masked_fill(hidden.unsqueeze(1), 0.0)
        else:
            patches = grad.new_empty(sum(map(math.prod, of_patches)), grad.shape[1], dtype=ctx.dtype)
            for to, part in zip(split_sequences(patches, of_patches), grads, strict=True):
                to.copy_(part[:, lead:])
            if masks is not None:
                patches[: masks.numel()].masked_fill_(masks.view(-1, 1), 0.0)
        return patches, None, None, None, grad_token, *(part.sum(0) for part in grads)


def _masked_part(x: Tensor, groups: Sequence[tuple[int, int]], lead: int, masks: Tensor) -> Tensor:
    """Tokens of the patches of the images that have masks, a view of x [T, C]."""
    (count, length), (masked, patches) = groups[0], masks.shape
    assert masked <= count and patches == length - lead, "masks are of the first images, which have one size"
    return x[: masked * length].unflatten(0, (masked, length))[:, lead:]


class Net(nn.Module):
    """A student or a teacher: a backbone, and in subclasses what is behind it."""

    def __init__(self, backbone: VisionTransformer | ResNet):
        super().__init__()
        self.backbone = backbone

    def features(self, crops: Sequence[Tensor]) -> Tensor:
        """Features of all crops: a ViT takes them in one pass, a convnet each run of one size (`utils.py:612`).

        Args:
            crops: V tensors [B, channels, h, w], float.

        Returns:
            [V*B, C], rows in the order of the list.

        Raises:
            ValueError: an image has other channels or is smaller than a patch.
        """
        if isinstance(self.backbone, VisionTransformer):
            return self.backbone(crops)
        for crop in crops:
            check_images(crop, self.backbone.channels, 1)
        runs = [torch.cat(list(run)) for _, run in groupby(crops, key=lambda crop: crop.shape[2:])]
        return torch.cat([self.backbone(run) for run in runs])


class DINOModel(Net):
    """Backbone and a head with a `bottleneck` and a `last_layer`, as DINO's (`utils.py:594`)."""

    def __init__(self, backbone: VisionTransformer | ResNet, head: Any):
        super().__init__(backbone)
        self.head = head

    def forward(self, crops: Sequence[Tensor]) -> Tensor:
        """Logits [V*B, K]; otherwise as `features`."""
        return self.head(self.features(crops))

    def bottleneck(self, crops: Sequence[Tensor]) -> Tensor:
        """What the last layer takes [V*B, bottleneck_dim]; otherwise as `features`."""
        return self.head.bottleneck(self.features(crops))


def vit(arch: str, *, patch_size: int = 16, img_size: int = 224, **options: Any) -> VisionTransformer:
    """The ViT of a name in VIT_SIZES; arguments and errors as in `VisionTransformer`.

    Raises:
        ValueError: the name is not known.
    """
    if arch not in VIT_SIZES:
        raise ValueError(f"unknown arch {arch!r}, choose one of {', '.join(VIT_SIZES)}")
    return VisionTransformer(img_size, patch_size, **VIT_SIZES[arch]._asdict(), **options)


def build_backbone(arch: str, *, channels: int = 3, **options: Any) -> VisionTransformer | ResNet:
    """The backbone of a name in ARCHS, with initial weights.

    Args:
        options: patch_size, img_size and further arguments of `VisionTransformer`; a ResNet ignores them.

    Raises:
        ValueError: the arch is not known, or as in `VisionTransformer`.
    """
    if arch not in ARCHS:
        raise ValueError(f"unknown arch {arch!r}, choose one of {', '.join(ARCHS)}")
    if arch in RESNETS:
        return RESNETS[arch](channels)
    return vit(arch, channels=channels, **options)


def build_model(
    arch: str,
    *,
    out_dim: int,
    use_bn_in_head: bool,
    norm_last_layer: bool,
    head_hidden_dim: int = 2048,
    head_bottleneck_dim: int = 256,
    **options: Any,
) -> DINOModel:
    """A student or a teacher with initial weights (`main_dino.py:162`).

    Args:
        arch, options: as in `build_backbone`.
        out_dim, use_bn_in_head, norm_last_layer, head_hidden_dim, head_bottleneck_dim: as in `DINOHead`.

    Raises:
        ValueError: the arch is not known, or as in `VisionTransformer`.
    """
    backbone = build_backbone(arch, **options)
    head = DINOHead(
        backbone.embed_dim,
        out_dim,
        use_bn=use_bn_in_head,
        norm_last_layer=norm_last_layer,
        hidden_dim=head_hidden_dim,
        bottleneck_dim=head_bottleneck_dim,
    )
    return DINOModel(backbone, head)


def check_images(images: Tensor, channels: int, min_size: int) -> None:
    if images.dim() != 4 or images.shape[1] != channels:
        raise ValueError(
            f"images must have shape [B, {channels}, height, width], got {list(images.shape)}; "
            "the data pipeline converts every image to these channels, convert yours too"
        )
    if min(images.shape[2:]) < min_size:
        h, w = images.shape[2:]
        raise ValueError(
            f"crops of {h}x{w} pixels are smaller than a patch of {min_size}x{min_size}; "
            "use larger crops or a smaller patch_size"
        )
