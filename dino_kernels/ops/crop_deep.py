"""Crops of images that are not 8-bit RGB, in PyTorch: what runs on a GPU, and the measure of the C++ in
csrc/cpu/multicrop/deep.cpp."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dino_kernels._core.native import JITTER

if TYPE_CHECKING:
    from dino_kernels.ops.multicrop import PixelScale

_LUMA = (19595 / 65536, 38470 / 65536, 7471 / 65536)


def crop_deep(images: Sequence[Tensor], crops: np.ndarray, out: Sequence[Tensor], scale: "PixelScale") -> None:
    """`multicrop`, but for vertical flips and turns, and on any device."""
    if not images:
        return
    dtype = torch.float64 if images[0].dtype == torch.float64 else torch.float32
    table = torch.tensor([scale.low, scale.high, scale.mean, scale.std], dtype=dtype)
    if images[0].is_cuda:
        table = table.pin_memory()  # whose upload the host does not wait for
    table = table.to(images[0].device, non_blocking=True)[..., None, None]
    for i, image in enumerate(images):
        for crop, view in zip(crops[i], out, strict=True):
            view[i] = _crop(image, crop, table)


def _crop(image: Tensor, crop: np.void, table: Tensor) -> Tensor:
    """[C, size, size] of an image [H, W, C]; in float32, or float64 if the image is.

    table: [4, C, 1, 1], low, high, mean and std.
    """
    dtype = table.dtype
    low, high, mean, std = table
    left, top, right, bottom = crop["box"].tolist()
    x = image[top:bottom, left:right].to(dtype).permute(2, 0, 1)
    x = ((x - low) * (255 / (high - low))).nan_to_num(nan=0).clamp(0, 255)
    size = (int(crop["size"]),) * 2
    x = F.interpolate(x[None], size, mode="bicubic", antialias=True)[0].clamp(0, 255)
    x = x.flip(2) if crop["flip"] else x
    for step in crop["order"].tolist() if crop["jitter"] else []:
        x = _jitter(x, JITTER[step], float(crop[JITTER[step]]))
    if crop["grayscale"]:
        x = _luma(x).expand(3, -1, -1)
    if crop["blur"] > 0:
        x = _blur(x, float(crop["blur"]))
    if crop["solarize"]:
        x = torch.where(x < 128, x, 255 - x)
    return (x / 255 - mean) / std


def _luma(x: Tensor) -> Tensor:
    return _LUMA[0] * x[:1] + _LUMA[1] * x[1:2] + _LUMA[2] * x[2:]


def _jitter(x: Tensor, step: str, factor: float) -> Tensor:
    rgb = len(x) == 3
    if step == "hue":
        return _turn_hue(x, int(factor * 255) / 256) if rgb else x
    if step == "brightness":
        degenerate = torch.zeros_like(x)
    elif step == "contrast":
        degenerate = (_luma(x) if rgb else x).mean((1, 2), keepdim=True)
    elif not rgb:  # saturation
        return x
    else:
        degenerate = _luma(x)
    return (degenerate + factor * (x - degenerate)).clamp(0, 255)


def _turn_hue(x: Tensor, shift: float) -> Tensor:
    r, g, b = x
    most = x.amax(0)
    chroma = most - x.amin(0)
    sixth = torch.where(most == r, g - b, torch.where(most == g, b - r + 2 * chroma, r - g + 4 * chroma))
    hue = torch.where(chroma > 0, sixth / chroma, 0) + 6 * shift
    k = torch.stack([(hue + n).remainder(6) for n in (5, 3, 1)])
    return most - chroma * torch.minimum(k, 4 - k).clamp(0, 1)


def _blur(x: Tensor, sigma: float) -> Tensor:
    """Three box filters along rows, three along columns, of whole pixels and a part of one more on each side; what they
    read beyond the border are the values at it."""
    variance = sigma * sigma / 3
    below = math.floor((math.sqrt(12 * variance + 1) - 1) / 2)
    rest = (2 * below + 1) * (below * (below + 1) - 3 * variance) / (6 * (variance - (below + 1) ** 2))
    radius = int(below + rest)
    whole = 1 / (2 * (below + rest) + 1)
    part = (1 - (2 * radius + 1) * whole) / 2
    weights = [part, *[whole] * (2 * radius + 1), part]
    reach = radius + 1
    for axis, pad in ((2, (reach, reach, 0, 0)), (1, (0, 0, reach, reach))):
        for _ in range(3):
            padded = F.pad(x[None], pad, mode="replicate")[0]
            x = sum(weight * padded.narrow(axis, i, x.shape[axis]) for i, weight in enumerate(weights))  # type: ignore[assignment]
    return x
