"""A ViT in torch's own operations, for published weights that the fused one does not cover: DINOv2's ViT-g (SwiGLU)
and all of DINOv3 (rotary positions). It is for evaluation: crops are not packed, and there is no drop path.

Dimensions: B images of P patches, R registers, N = 1 + R + P tokens, C = embed_dim, H heads of D = C / H channels.
"""

import math
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino_kernels.nn import PatchEmbed
from dino_train.models.init import init_linear
from dino_train.models.vit import VisionTransformer, check_images, interpolate_positions, without_registers


class PlainSize(NamedTuple):
    embed_dim: int
    depth: int
    num_heads: int
    hidden_dim: int  # of the MLP
    swiglu: bool
    rope: bool


# dinov2/hub/backbones.py and dinov3/hub/backbones.py. SwiGLU's hidden width is two thirds of its ratio's (4, 6 or 3).
PLAIN_SIZES = {
    "dinov2_vitg14": PlainSize(1536, 40, 24, 4096, swiglu=True, rope=False),
    "dinov3_vits16": PlainSize(384, 12, 6, 1536, swiglu=False, rope=True),
    "dinov3_vits16plus": PlainSize(384, 12, 6, 1536, swiglu=True, rope=True),
    "dinov3_vitb16": PlainSize(768, 12, 12, 3072, swiglu=False, rope=True),
    "dinov3_vitl16": PlainSize(1024, 24, 16, 4096, swiglu=False, rope=True),
    "dinov3_vitl16plus": PlainSize(1024, 24, 16, 4096, swiglu=True, rope=True),
    "dinov3_vith16plus": PlainSize(1280, 32, 20, 5120, swiglu=True, rope=True),
    "dinov3_vit7b16": PlainSize(4096, 40, 32, 8192, swiglu=True, rope=True),
}


class PlainViT(nn.Module):
    """Vision transformer with a class token, registers, learned or rotary positions, and an MLP or SwiGLU.

    Layer scale is left to `fold_layer_scale`. Names of parameters are DINOv2's; DINOv3's w1 and w2 are the halves of
    w12.

    Args:
        size: of the network.
        patch_size: height and width of a patch in pixels.
        img_size: height and width in pixels that learned positions are made for.
        registers: number of registers R (Darcet et al. 2024, arXiv 2309.16588).
        channels: of an image.
    """

    def __init__(
        self, size: PlainSize, *, patch_size: int, img_size: int = 224, registers: int = 0, channels: int = 3
    ) -> None:
        super().__init__()
        self.patch_size, self.embed_dim, self.channels = patch_size, size.embed_dim, channels
        self.lead = 1 + registers  # tokens before the patches
        eps = 1e-5 if size.rope else 1e-6
        self.patch_embed = PatchEmbed(patch_size, size.embed_dim, channels)
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, size.embed_dim))
        if registers:
            self.register_tokens = nn.Parameter(0.02 * torch.randn(1, registers, size.embed_dim))
        if size.rope:
            self.rope_embed = Rope(size.embed_dim // size.num_heads)
        else:
            cells = (img_size // patch_size) ** 2
            self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 1 + cells, size.embed_dim))
        self.blocks = nn.ModuleList(_Block(size, eps) for _ in range(size.depth))
        self.norm = nn.LayerNorm(size.embed_dim, eps)
        self.apply(init_linear)

    def forward(self, images: Tensor) -> Tensor:
        """Normalized class tokens [B, C] of images [B, channels, h, w], float.

        Raises:
            ValueError: an image has other channels or is smaller than a patch.
        """
        *_, x = self._outputs(images)
        return self.norm(x[:, 0])

    def features(self, images: Tensor, n_blocks: int = 1) -> list[Tensor]:
        """Normalized tokens of the last n blocks: n tensors [B, 1 + P, C], class token first, without registers.

        Raises:
            ValueError: n_blocks is not from 1 to depth, or as in `forward`.
        """
        if not 1 <= n_blocks <= len(self.blocks):
            raise ValueError(f"n_blocks must be from 1 to the number of blocks, {len(self.blocks)}, got {n_blocks}")
        last = deque(self._outputs(images), maxlen=n_blocks)
        return [self.norm(without_registers(x, self.lead)) for x in last]

    def attention(self, images: Tensor) -> Tensor:
        """The class token's attention in the last block [B, H, 1 + P], float32 or float64, class token first; each row
        sums to one, less what registers have.

        Raises:
            ValueError: as in `forward`.
        """
        x, rope = self._embed(images)
        *body, last = self.blocks
        for block in body:
            x = block(x, rope)
        assert isinstance(last, _Block)
        q, k, _ = last.attn.project(last.norm1(x), rope)
        logits = (q[:, :, :1] @ k.mT).squeeze(2) * q.shape[-1] ** -0.5
        attention = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        return without_registers(attention.mT, self.lead).mT

    def _outputs(self, images: Tensor) -> Iterator[Tensor]:
        """Of each block [B, N, C]."""
        x, rope = self._embed(images)
        for block in self.blocks:
            x = block(x, rope)
            yield x

    def _embed(self, images: Tensor) -> tuple[Tensor, "Rotation | None"]:
        """All tokens [B, N, C], and the rotation of queries and keys."""
        check_images(images, self.channels, self.patch_size)
        h, w = map(int, images.shape[2:])
        patches = self.patch_embed.proj(images).flatten(2).transpose(1, 2)
        lead: Tensor = self.cls_token
        rope = None
        if hasattr(self, "rope_embed"):
            rope = self.rope_embed(h // self.patch_size, w // self.patch_size, self.lead)
        else:
            positions = interpolate_positions(self.pos_embed, h, w, self.patch_size, self.lead - 1)
            lead, patches = lead + positions[:, :1], patches + positions[:, 1:]
        if self.lead > 1:
            lead = torch.cat((lead, self.register_tokens), dim=1)
        return torch.cat((lead.expand(images.shape[0], -1, -1), patches), dim=1), rope


class Rotation(NamedTuple):
    sin: Tensor  # [N, D]
    cos: Tensor  # [N, D]

    def __call__(self, x: Tensor) -> Tensor:
        """Queries or keys [B, H, N, D]: channels d and d + D/2 are turned as a pair."""
        first, second = x.chunk(2, dim=-1)
        return x * self.cos + torch.cat((-second, first), dim=-1) * self.sin


class Rope(nn.Module):
    """Rotary positions of DINOv3 (Simeoni et al. 2025, arXiv 2508.10104, section 3.2).

    The center of a patch has coordinates (y, x), each from -1 to 1 over its side of the image. Of the D / 2 angles of a
    patch the first half are 2 pi y / period, the others 2 pi x / period, with the D / 4 periods 100^(4 i / D). The
    class token and registers are not rotated.
    """

    periods: Tensor

    def __init__(self, head_dim: int, base: float = 100.0) -> None:
        super().__init__()
        # In the state dict since published files have them rounded to bfloat16, as in training.
        self.register_buffer("periods", base ** (torch.arange(head_dim // 4) / (head_dim // 4)))

    def forward(self, rows: int, cols: int, unrotated: int) -> Rotation:
        """Of `unrotated` tokens and then rows x cols patches."""
        y, x = ((2 * torch.arange(n, device=self.periods.device) + 1) / n - 1 for n in (rows, cols))
        centers = torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).flatten(0, 1)  # [P, 2]
        angles = (2 * math.pi * centers[:, :, None] / self.periods).flatten(1).tile(2)  # [P, D]
        angles = F.pad(angles, (0, 0, unrotated, 0))
        return Rotation(angles.sin().to(self.periods.dtype), angles.cos().to(self.periods.dtype))


class _Block(nn.Module):
    def __init__(self, size: PlainSize, eps: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(size.embed_dim, eps)
        self.attn = _Attention(size.embed_dim, size.num_heads)
        self.norm2 = nn.LayerNorm(size.embed_dim, eps)
        self.mlp = (_SwiGLU if size.swiglu else _Mlp)(size.embed_dim, size.hidden_dim)

    def forward(self, x: Tensor, rope: Rotation | None) -> Tensor:
        x = x + self.attn(self.norm1(x), rope)
        return x + self.mlp(self.norm2(x))


class _Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def project(self, x: Tensor, rope: Rotation | None) -> tuple[Tensor, Tensor, Tensor]:
        """[B, N, C] -> queries, keys and values [B, H, N, D]."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return (rope(q), rope(k), v) if rope else (q, k, v)

    def forward(self, x: Tensor, rope: Rotation | None) -> Tensor:
        return self.proj(F.scaled_dot_product_attention(*self.project(x, rope)).transpose(1, 2).flatten(2))


class _Mlp(nn.Module):
    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class _SwiGLU(nn.Module):
    """w3(silu(gate) * value), gate and value the halves of w12(x) (Shazeer 2020, arXiv 2002.05202, equation 6)."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(dim, 2 * hidden_dim)
        self.w3 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


ViT = VisionTransformer | PlainViT
