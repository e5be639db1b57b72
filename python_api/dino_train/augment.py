"""Multi-crop augmentation of DINO (`main_dino.py:419-465`) and the evaluation transform, on Pillow.

A crop is made in two halves. `draw_crop` draws every random parameter of one crop; `apply_crop` is a
deterministic function of the image and those parameters, so a faster kernel only has to replace that half.
Each crop has a random generator of its own, seeded by (seed, epoch, image index, crop index), so a run does
not depend on the number of worker processes or on where it was resumed.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch import Tensor

from dino_kernels import CropKind

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
RATIO = (3 / 4, 4 / 3)

_MEAN = torch.tensor(IMAGENET_MEAN).view(3, 1, 1)
_STD = torch.tensor(IMAGENET_STD).view(3, 1, 1)
_ENHANCE = {
    "brightness": ImageEnhance.Brightness,
    "contrast": ImageEnhance.Contrast,
    "saturation": ImageEnhance.Color,
}


@dataclass(frozen=True)
class Crop:
    """All drawn parameters of one crop, in the order in which `apply_crop` uses them.

    box: (left, top, right, bottom) in pixels of the image; size: output side in pixels; jitter: (operation,
    factor) pairs in their drawn order, empty for no jitter; blur: Gaussian radius in pixels, 0 for no blur.
    """

    box: tuple[int, int, int, int]
    size: int
    flip: bool
    jitter: tuple[tuple[str, float], ...]
    grayscale: bool
    blur: float
    solarize: bool


def crop_generator(seed: int, epoch: int, index: int, crop: int) -> np.random.Generator:
    """The random generator of one crop of one image in one epoch."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(epoch, index, crop))))


def draw_box(
    rng: np.random.Generator, scale: tuple[float, float], image_size: tuple[int, int]
) -> tuple[int, int, int, int]:
    """Box of a RandomResizedCrop: ten tries at a random area and log-uniform aspect ratio, then a fallback to
    the largest central box whose ratio lies in [3/4, 4/3].

    image_size: (width, height) in pixels. Returns (left, top, right, bottom), inside the image and not empty.
    """
    width, height = image_size
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    w = min(width, round(height * RATIO[1]))
    h = min(height, round(width / RATIO[0]))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def draw_crop(rng: np.random.Generator, kind: CropKind, image_size: tuple[int, int]) -> Crop:
    """Draw the parameters of one crop (`main_dino.py:421-456`); image_size is (width, height) in pixels."""
    box = draw_box(rng, kind.scale, image_size)
    flip = rng.random() < 0.5
    jitter: tuple[tuple[str, float], ...] = ()
    if rng.random() < 0.8:
        factors = (
            ("brightness", rng.uniform(0.6, 1.4)),
            ("contrast", rng.uniform(0.6, 1.4)),
            ("saturation", rng.uniform(0.8, 1.2)),
            ("hue", rng.uniform(-0.1, 0.1)),
        )
        jitter = tuple(factors[i] for i in rng.permutation(4))
    grayscale = rng.random() < 0.2
    blur = rng.uniform(0.1, 2.0) if rng.random() < kind.blur else 0.0
    solarize = rng.random() < kind.solarize
    return Crop(box, kind.size, flip, jitter, grayscale, blur, solarize)


def apply_crop(image: Image.Image, crop: Crop) -> Tensor:
    """Make one crop of an RGB image: float32 [3, size, size], normalized. Every step but the last works on
    8-bit pixels with Pillow's rounding, as the reference does."""
    # Crop before resizing: resize(box=...) would let pixels outside the box leak in through the filter.
    image = image.crop(crop.box).resize((crop.size, crop.size), Image.Resampling.BICUBIC)
    if crop.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for operation, factor in crop.jitter:
        if operation == "hue":
            image = _shift_hue(image, factor)
        else:
            image = _ENHANCE[operation](image).enhance(factor)
    if crop.grayscale:
        image = image.convert("L").convert("RGB")
    if crop.blur:
        image = image.filter(ImageFilter.GaussianBlur(crop.blur))
    if crop.solarize:
        image = ImageOps.solarize(image, 128)
    return to_tensor(image)


def _shift_hue(image: Image.Image, factor: float) -> Image.Image:
    """Turn the hue by `factor` of the circle: 8-bit addition that wraps around, truncated toward zero."""
    shift = int(factor * 255)
    hue, saturation, value = image.convert("HSV").split()
    hue = hue.point([(level + shift) % 256 for level in range(256)])
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


def to_tensor(image: Image.Image) -> Tensor:
    """8-bit RGB image to float32 [3, H, W]: (pixel / 255 - mean) / std with ImageNet's mean and std."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(255).sub_(_MEAN).div_(_STD)


@dataclass(frozen=True)
class MultiCrop:
    """Two global crops and `local_crops_number` local ones of an image.

    global_crops_scale, local_crops_scale: (low, high) area of a crop as a fraction of the image, with
    0 < low <= high <= 1. global_crops_size, local_crops_size: output side in pixels.
    Raises ValueError for a scale, number or size outside these ranges.
    """

    global_crops_scale: tuple[float, float] = (0.4, 1.0)
    local_crops_scale: tuple[float, float] = (0.05, 0.4)
    local_crops_number: int = 8
    global_crops_size: int = 224
    local_crops_size: int = 96

    def __post_init__(self) -> None:
        for name in ("global_crops_scale", "local_crops_scale"):
            low, high = getattr(self, name)
            if not 0 < low <= high <= 1:
                raise ValueError(f"{name} must be (low, high) with 0 < low <= high <= 1, got ({low}, {high})")
        for name, least in (("local_crops_number", 0), ("global_crops_size", 1), ("local_crops_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")

    @property
    def kinds(self) -> tuple[CropKind, ...]:
        """The kinds of the crops, in the order of the crops."""
        return (
            CropKind(self.global_crops_size, self.global_crops_scale, blur=1.0, solarize=0.0),
            CropKind(self.global_crops_size, self.global_crops_scale, blur=0.1, solarize=0.2),
        ) + self.local_crops_number * (CropKind(self.local_crops_size, self.local_crops_scale, blur=0.5, solarize=0.0),)

    def __call__(self, image: Image.Image, key: tuple[int, int, int]) -> list[Tensor]:
        """Crops of an RGB image: float32 [3, size, size] each; global 1, global 2, then the local ones.

        key: (seed, epoch, image index), all >= 0; the same key gives the same crops, bit for bit.
        """
        if image.mode != "RGB":
            raise ValueError(f"image must have mode RGB, got {image.mode}: use image.convert('RGB')")
        return [
            apply_crop(image, draw_crop(crop_generator(*key, crop), kind, image.size))
            for crop, kind in enumerate(self.kinds)
        ]


def eval_transform(image: Image.Image, size: int) -> Tensor:
    """Evaluation view of an RGB image: short side to round(size * 256 / 224) bicubic, central size x size
    crop, normalized: float32 [3, size, size] (`eval_knn.py:33-38`).

    An image longer than 4:1 is first cut to its central 4:1, so that a thin strip does not become gigabytes.
    """
    short = min(image.size)
    image = _center_crop(image, min(image.width, 4 * short), min(image.height, 4 * short))
    width, height = (round(size * 256 / 224) * side // short for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    return to_tensor(_center_crop(image, size, size))


def _center_crop(image: Image.Image, width: int, height: int) -> Image.Image:
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))
