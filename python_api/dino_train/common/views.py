"""Whole images as evaluations see them, of 8-bit RGB and of other channels and depths."""

import io
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dino_kernels import PixelScale

_LUMA = np.array([0.299, 0.587, 0.114])
# 8-bit RGB, or levels 0 .. 255 of another image: float32 [H, W, C]
View = Image.Image | np.ndarray


@lru_cache
def _normalized(scale: PixelScale) -> np.ndarray:
    """Of each channel and level [C, 256]; numpy, because torch would start its own thread pool in each thread."""
    mean, std = (np.array([values], np.float32).T for values in (scale.mean, scale.std))
    return (np.arange(256, dtype=np.float32) / 255 - mean) / std


def to_tensor(view: View, scale: PixelScale | None = None) -> Tensor:
    """float32 [C, H, W]: (level / 255 - mean) / std, of ImageNet without a scale."""
    scale = scale or PixelScale()
    levels = np.asarray(view)
    if levels.dtype == np.uint8:
        table = _normalized(scale)
        return torch.from_numpy(np.stack([of_channel[levels[..., c]] for c, of_channel in enumerate(table)]))
    mean, std = np.array(scale.mean, np.float32), np.array(scale.std, np.float32)
    return torch.from_numpy(np.ascontiguousarray(((levels / np.float32(255) - mean) / std).transpose(2, 0, 1)))


def levels_of(values: np.ndarray, scale: PixelScale) -> np.ndarray:
    """Values [H, W, C] as levels 0 .. 255, float32; NaN is 0."""
    low, high = (np.array(bound, np.float32) for bound in (scale.low, scale.high))
    levels = (values.astype(np.float32) - low) * (np.float32(255) / (high - low))
    return np.nan_to_num(levels, copy=False, nan=0).clip(0, 255)


def with_channels(values: np.ndarray, channels: int) -> np.ndarray:
    """Values [H, W, C] of so many channels: gray is repeated, RGB becomes its luma, alpha is left out.

    Raises:
        ValueError: other numbers of channels.
    """
    found = values.shape[2]
    if found == channels:
        return values
    if found in (1, 2) and channels in (1, 3):  # gray, and gray with alpha
        return values[..., :1].repeat(channels, 2)
    if found == 4 and channels == 3:
        return values[..., :3]
    if found in (3, 4) and channels == 1:
        luma = values[..., :3] @ _LUMA
        return (np.rint(luma) if values.dtype.kind in "ui" else luma).astype(values.dtype)[..., None]
    raise ValueError(f"the image has {found} channels, expected {channels}")


def view_of(image: View, scale: PixelScale) -> View:
    """What evaluations see of a PIL image or of values [H, W] or [H, W, C] as a file would have them.

    Raises:
        ValueError: another shape, dtype or number of channels.
    """
    if isinstance(image, Image.Image):
        if scale.is_8_bit_rgb and not image.mode.startswith(("I", "F")):
            return image.convert("RGB")
        if image.mode not in ("1", "L", "LA", "F", "RGB", "RGBA") and not image.mode.startswith("I"):
            image = image.convert("RGB")
    values = np.asarray(image)
    values = values[..., None] if values.ndim == 2 else values
    if values.ndim != 3 or not values.size or values.dtype.kind not in "buif":
        raise ValueError(f"an image must be numbers [H, W] or [H, W, C], got {values.dtype} {list(values.shape)}")
    values = with_channels(values * np.uint8(255) if values.dtype == bool else values, scale.channels)
    if scale.is_8_bit_rgb and values.dtype == np.uint8:
        return Image.fromarray(values)
    return levels_of(values, scale)


def as_picture(view: View) -> Image.Image:
    """To be looked at: the first three channels as RGB, or the first as gray."""
    if isinstance(view, Image.Image):
        return view
    shown = view[..., :3] if view.shape[2] >= 3 else np.repeat(view[..., :1], 3, 2)
    return Image.fromarray(np.rint(shown).astype(np.uint8))


def open_mask(path: Path) -> Image.Image:
    """A mask whose pixels are the numbers in the file; Pillow spreads those of gray PNGs of 2 or 4 bits over 0 .. 255.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            image.load()
    except (OSError, SyntaxError) as error:  # Pillow raises either for a damaged PNG
        raise ValueError(f"mask {path} cannot be read: {error}") from error
    bits, color = data[24:26] if data.startswith(b"\x89PNG") else (8, 0)
    if color == 0 and 1 < bits < 8:
        return Image.fromarray(np.asarray(image) // (255 // (2**bits - 1)))
    return image


def size_of(view: View) -> tuple[int, int]:
    """(width, height) in pixels."""
    return view.size if isinstance(view, Image.Image) else (view.shape[1], view.shape[0])


def resize(view: View, size: tuple[int, int]) -> View:
    """Bicubic with antialiasing, to (width, height)."""
    if isinstance(view, Image.Image):
        return view.resize(size, Image.Resampling.BICUBIC)
    channels = (np.ascontiguousarray(view[..., c]) for c in range(view.shape[2]))
    resized = [Image.fromarray(channel).resize(size, Image.Resampling.BICUBIC) for channel in channels]
    return np.stack([np.asarray(channel) for channel in resized], -1).clip(0, 255)


def whole_patches(view: View, short: int, patch: int, scale: PixelScale) -> Tensor:
    """The image resized (bicubic) so that its short side is about `short` pixels and both sides are multiples of
    `patch`, normalized: float32 [C, h, w]."""
    size = size_of(view)
    width, height = (patch * max(1, round(side * short / min(size) / patch)) for side in size)
    return to_tensor(resize(view, (width, height)), scale)


def eval_transform(view: View, size: int, scale: PixelScale | None = None) -> Tensor:
    """Evaluation view of an image: short side to round(size * 256 / 224) bicubic, central size x size crop, normalized:
    float32 [C, size, size] (`eval_knn.py:33-38`).

    An image with an aspect ratio above 4:1 is first center-cropped to 4:1, so that the resize of a thin strip does not
    need gigabytes.
    """
    width, height = size_of(view)
    short = min(width, height)
    view = center_crop(view, min(width, 4 * short), min(height, 4 * short))
    width, height = (round(size * 256 / 224) * side // short for side in size_of(view))
    return to_tensor(center_crop(resize(view, (width, height)), size, size), scale)


def center_crop(view: View, width: int, height: int) -> View:
    whole = size_of(view)
    left, top = round((whole[0] - width) / 2), round((whole[1] - height) / 2)
    if isinstance(view, Image.Image):
        return view.crop((left, top, left + width, top + height))
    return view[top : top + height, left : left + width]
