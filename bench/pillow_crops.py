"""The random crops of the reference, computed by a sequence of Pillow operations (main_dino.py:419-465), and its loader
with worker processes. Expected values for the tests, and peer of the benchmarks."""

import io
from collections.abc import Sequence

import numpy as np
import torch
from dino_train.common.scale import IMAGENET_MEAN, IMAGENET_STD
from dino_train.data.folder import ImageFolder
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dino_kernels import CropKind, draw_crops
from dino_kernels._core.native import JITTER

_MEAN, _STD = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
_ENHANCE = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


def pillow_crop(image: Image.Image, crop: np.void) -> Tensor:
    """A row of CROP by Pillow: float32 [3, size, size], normalized."""
    size = int(crop["size"])
    # Crop before resizing: with resize(box=...) the filter would read pixels outside the box.
    image = image.crop(tuple(crop["box"].tolist())).resize((size, size), Image.Resampling.BICUBIC)
    return normalized(_adjust(image, crop))


def normalized(image: Image.Image) -> Tensor:
    """As torchvision's ToTensor and Normalize: float32 [3, H, W]."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(255).sub_(_MEAN).div_(_STD)


def pillow_levels(image: Image.Image, crop: np.void) -> np.ndarray:
    """Crop without normalization, int [size, size, 3]; resizes rows before columns, unlike Pillow 13 in some cases."""
    size = int(crop["size"])
    image = image.crop(tuple(crop["box"].tolist()))
    for shape in ((size, image.height), (size, size)):
        image = image.resize(shape, Image.Resampling.BICUBIC)
    return np.asarray(_adjust(image, crop)).astype(int)


def _adjust(image: Image.Image, crop: np.void) -> Image.Image:
    """All steps after the resize."""
    if crop["flip"]:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for step in crop["order"].tolist() if crop["jitter"] else []:
        factor = float(crop[JITTER[step]])
        image = _shift_hue(image, factor) if JITTER[step] == "hue" else _ENHANCE[step](image).enhance(factor)
    if crop["grayscale"]:
        image = image.convert("L").convert("RGB")
    if crop["blur"]:
        image = image.filter(ImageFilter.GaussianBlur(float(crop["blur"])))
    return ImageOps.solarize(image, 128) if crop["solarize"] else image


def _shift_hue(image: Image.Image, factor: float) -> Image.Image:
    """Shift the hue by `factor` of the circle: 8-bit addition with wrap-around, truncated toward zero."""
    shift = int(factor * 255)
    hue, saturation, value = image.convert("HSV").split()
    hue = hue.point([(level + shift) % 256 for level in range(256)])
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


def pillow_decode(data: bytes) -> Image.Image:
    """As torchvision's ImageFolder does."""
    return Image.open(io.BytesIO(data)).convert("RGB")


class Crops(Dataset):
    """All crops of an image, by its index."""

    def __init__(self, images: ImageFolder, kinds: Sequence[CropKind]) -> None:
        self.images, self.kinds = images, kinds

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> list[Tensor]:
        image = pillow_decode(self.images.read(i))
        return [pillow_crop(image, crop) for crop in draw_crops(0, 0, i, self.kinds, image.size[::-1])]


def reference_loader(
    images: ImageFolder, kinds: Sequence[CropKind], batch_size: int, steps: int, num_workers: int
) -> DataLoader:
    """Batches of images in order, loaded as in main_dino.py:145-154."""
    order = [i % len(images) for i in range(steps * batch_size)]
    return DataLoader(Crops(images, kinds), batch_size, sampler=order, num_workers=num_workers)
