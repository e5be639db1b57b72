"""Pictures of where the class token looks (visualize_attention.py of the reference)."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dino_train.loader import to_tensor
from dino_train.model import VisionTransformer

CELL = 128  # side of a sheet's cell, in pixels


@torch.no_grad()
def attention_of(backbone: VisionTransformer, image: Image.Image, working_size: int) -> np.ndarray:
    """Attention of the class token to each patch, per head: float32 [heads, rows, columns], in [0, 1].

    The image is resized so that its short side is `working_size`, then both sides to a multiple of the
    patch. Each head's map is scaled to its own range.
    """
    p = backbone.patch_size
    scale = working_size / min(image.size)
    columns, rows = (max(1, round(side * scale / p)) for side in image.size)
    pixels = to_tensor(image.resize((columns * p, rows * p), Image.Resampling.BICUBIC))
    device = backbone.pos_embed.device
    maps: Tensor = backbone.attention(pixels[None].to(device))[0, :, 1:].float().cpu()
    maps = maps.unflatten(1, (rows, columns))
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return ((maps - low) / (high - low).clamp_min(1e-12)).numpy()


def heat(values: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """A map in [0, 1] as colors (inferno), enlarged smoothly to (width, height) pixels."""
    from matplotlib import colormaps

    gray = Image.fromarray(np.uint8(np.clip(values, 0, 1) * 255)).resize(size, Image.Resampling.BICUBIC)
    return Image.fromarray(np.uint8(colormaps["inferno"](np.asarray(gray))[..., :3] * 255))


def overlay(image: Image.Image, values: np.ndarray) -> Image.Image:
    """The map over the image: dim where it is low."""
    return Image.blend(image, heat(values, image.size), 0.6)


def write_maps(backbone: VisionTransformer, image: Image.Image, stem: Path, working_size: int) -> list[Path]:
    """PNGs of each head's map, each over the image, and their mean, at the image's size; returns the paths."""
    maps = attention_of(backbone, image, working_size)
    pictures = {f"head{i}": m for i, m in enumerate(maps)} | {"mean": maps.mean(axis=0)}
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, values in pictures.items():
        for suffix, picture in (("", heat(values, image.size)), ("_overlay", overlay(image, values))):
            paths.append(stem.with_name(f"{stem.name}_{name}{suffix}.png"))
            picture.save(paths[-1])
    return paths


def sheet(backbone: VisionTransformer, images: list[Image.Image], working_size: int) -> Image.Image:
    """One picture: a row an image, with the image, its mean map over it, then each head's map."""
    rows = []
    for image in images:
        maps = attention_of(backbone, image, working_size)
        big = image.resize((CELL, CELL), Image.Resampling.BICUBIC)
        cells = [big, overlay(big, maps.mean(axis=0)), *(heat(m, big.size) for m in maps)]
        rows.append(
            np.concatenate(
                [np.pad(np.asarray(c), ((2, 2), (2, 2), (0, 0)), constant_values=255) for c in cells], axis=1
            )
        )
    return Image.fromarray(np.concatenate(rows))
