"""The random crops of DINO: parameters drawn per crop, then pixels from a decoded image straight into a batch.

    crop = image[top:bottom, left:right]                    nothing outside the box contributes
    crop = resize(crop, [size, size])                       bicubic (a = -0.5), antialiased, rows before columns
    crop = flip(crop)                                       left to right, if flip
    crop = blend(degenerate(crop), crop, factor)            if jitter, in its order: brightness (degenerate: black),
                                                            contrast (mean luma), saturation (luma), and hue, which
                                                            instead turns by int(hue * 255) / 256 of the circle
    crop = luma(crop) = (19595 R + 38470 G + 7471 B + 32768) >> 16              if grayscale
    crop = blur(crop, radius)                               Gaussian, as three box filters a direction, if blur > 0
    crop = where(crop < 128, crop, 255 - crop)              if solarize
    crop = rot90(crop[::-1] if vertical_flip else crop, turns)
    out = (crop / 255 - mean) / std                         levels are written as they are to bytes

Of 8-bit RGB, levels 0 .. 255, every step but the last has the rounding of Pillow 12 on x86, which the reference uses:
the levels are the same bit for bit, on every processor. (Pillow 13 resizes some tall boxes columns first, which differs
by some levels there.)

Other images have 1 to 16 channels of 8 or 16 bits or float32. `PixelScale` says which of their values are the levels 0
and 255; what is beyond is cut off, and NaN is 0. Their levels are float32 and never rounded: some higher than those
of 8-bit RGB, which Pillow cuts off after each step, by 2 on average at most. Contrast is that of each channel;
saturation, hue, grayscale and solarize are of three channels, RGB.

Dimensions: N images, V crops of each. `draw_crops` is a function of its key alone, so the crops of an image depend on
no worker, rank, device or other image.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dino_kernels._core.backends import GpuKernel
from dino_kernels._core.native import _C, DTYPES, JITTER
from dino_kernels.ops.crop_deep import crop_deep

__all__ = ["CROP", "CropKind", "PixelScale", "draw_crops", "multicrop", "multicrop_packed"]

# A drawn crop; struct Crop in csrc/cpu/multicrop/multicrop.h. box: left, top, right, bottom in pixels of the image;
# size: side of the output in pixels; hue: fraction of the circle; blur: radius in pixels, 0 for none; order: indices
# into JITTER, used as the four factors are only if jitter is set.
CROP = np.dtype(
    [
        ("box", np.int32, 4),
        ("size", np.int32),
        *((name, np.float32) for name in JITTER),
        ("blur", np.float32),
        ("order", np.uint8, 4),
        *((name, np.bool_) for name in ("flip", "jitter", "grayscale", "solarize", "vertical_flip")),
        ("turns", np.uint8),
        ("unused", np.uint8, 2),
    ]
)
DEPTHS = {np.dtype(np.uint8): 0, np.dtype(np.uint16): 1, np.dtype(np.float32): 2}  # enum class Depth
MOST_CHANNELS = 16

RATIO = (3 / 4, 4 / 3)

_TRIES = 10
_DRAWS = 2 * _TRIES + 13  # random numbers a crop, used or not
_ORDERS = tuple(permutations(range(4)))


# --- drawing -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CropKind:
    """What distinguishes the global crops 1 and 2 and the local crops: output side in pixels; area as a fraction (low,
    high) of the image; probability of blur and of solarize; by how much brightness, contrast, saturation and hue vary
    around 1, 1, 1 and 0, and with which probability; probabilities of grayscale and of flips; whether crops are turned
    by 0, 90, 180 or 270 degrees, each as often."""

    size: int
    scale: tuple[float, float]
    blur: float
    solarize: float
    jitter: tuple[float, ...] = (0.4, 0.4, 0.2, 0.1)
    jitter_probability: float = 0.8
    grayscale: float = 0.2
    flip: float = 0.5
    vertical_flip: float = 0.0
    turn: bool = False


def draw_crops(seed: int, epoch: int, index: int, kinds: Sequence[CropKind], image_size: tuple[int, int]) -> np.ndarray:
    """The parameters of one crop of each kind of image `index` in an epoch, `main_dino.py:419-456`.

    Depends on the arguments alone; the first crops stay the same whatever kinds follow. About 4 microseconds a crop.

    Args:
        seed, epoch, index: whole numbers >= 0.
        image_size: (height, width) in pixels.

    Returns:
        [V] of dtype CROP.
    """
    seeds = np.random.SeedSequence(seed, spawn_key=(epoch, index))
    generator = np.random.Generator(np.random.PCG64(seeds))
    draws = generator.random((len(kinds), _DRAWS)).tolist()
    crops = np.array([_draw_crop(u, kind, *image_size) for u, kind in zip(draws, kinds, strict=True)], CROP)
    if any(kind.vertical_flip or kind.turn for kind in kinds):
        for crop, kind, (vertical, turns) in zip(crops, kinds, generator.random((len(kinds), 2)), strict=True):
            crop["vertical_flip"], crop["turns"] = vertical < kind.vertical_flip, int(4 * turns) * kind.turn
    return crops


def _draw_crop(u: list[float], kind: CropKind, height: int, width: int) -> tuple:
    """A row of CROP from uniform numbers u [_DRAWS] in [0, 1)."""
    flip, jitter, brightness, contrast, saturation, hue, order, grayscale, blur, radius, solarize = u[-11:]
    return (
        _draw_box(u, kind.scale, height, width),
        kind.size,
        1 - kind.jitter[0] + 2 * kind.jitter[0] * brightness,
        1 - kind.jitter[1] + 2 * kind.jitter[1] * contrast,
        1 - kind.jitter[2] + 2 * kind.jitter[2] * saturation,
        -kind.jitter[3] + 2 * kind.jitter[3] * hue,
        0.1 + 1.9 * radius if blur < kind.blur else 0.0,
        _ORDERS[int(24 * order)],
        flip < kind.flip,
        jitter < kind.jitter_probability,
        grayscale < kind.grayscale,
        solarize < kind.solarize,
        False,
        0,
        (0, 0),
    )


def _draw_box(u: list[float], scale: tuple[float, float], height: int, width: int) -> tuple[int, int, int, int]:
    """Box of a RandomResizedCrop: ten tries at a random area and log-uniform ratio, then the largest central box whose
    ratio lies in RATIO. (left, top, right, bottom), inside the image and not empty."""
    low, high = scale[0] * width * height, scale[1] * width * height
    log_ratio = math.log(RATIO[1])  # RATIO is symmetric
    for i in range(0, 2 * _TRIES, 2):
        area = low + (high - low) * u[i]
        ratio = math.exp(log_ratio * (2 * u[i + 1] - 1))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(u[2 * _TRIES] * (width - w + 1)), int(u[2 * _TRIES + 1] * (height - h + 1))
            return left, top, left + w, top + h
    w, h = min(width, round(height * RATIO[1])), min(height, round(width / RATIO[0]))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


# --- cropping ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PixelScale:
    """What the values of an image's channels mean; each a number a channel, 1 to 16 of them.

    low, high: values that are black and white, the levels 0 and 255. mean, std: of (value - low) / (high - low), which
    normalized crops have 0 and 1 of. The default is that of 8-bit RGB, normalized as ImageNet.

    Raises:
        ValueError: unequal numbers of channels; values that are not finite; high <= low or std <= 0.
    """

    low: tuple[float, ...] = (0.0, 0.0, 0.0)
    high: tuple[float, ...] = (255.0, 255.0, 255.0)
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        lengths = {len(self.low), len(self.high), len(self.mean), len(self.std)}
        if len(lengths) > 1 or not 1 <= len(self.low) <= MOST_CHANNELS:
            raise ValueError(
                f"low, high, mean and std must have a number for each of 1 to {MOST_CHANNELS} channels, got {self}"
            )
        fits = all(map(math.isfinite, (*self.low, *self.high, *self.mean, *self.std)))
        low, high = np.array(self.low, np.float32), np.array(self.high, np.float32)
        if not fits or np.any(low >= high) or min(self.std) <= 0:
            raise ValueError(f"low, high, mean and std must be finite, with low < high and 0 < std, got {self}")

    @property
    def channels(self) -> int:
        return len(self.low)

    @property
    def is_8_bit_rgb(self) -> bool:
        """Whether uint8 values are levels of RGB."""
        return self.channels == 3 and set(self.low) == {0} and set(self.high) == {255}


RGB = PixelScale()


def multicrop(
    images: Sequence[np.ndarray | Tensor],
    crops: np.ndarray,
    out: Sequence[Tensor],
    *,
    scale: PixelScale | None = None,
    threads: int | None = None,
) -> None:
    """Writes the crops of decoded images into batches; see the top of the file. On the CPU, without the GIL; for a GPU
    there is `multicrop_packed`.

    A worker that decoded image b of a batch fills its rows with
    `multicrop([image], crops[None], [view[b : b + 1] for view in batch], threads=1)`.

    Args:
        images: N of [H, W, C], of any sizes >= 1, all uint8, all uint16 or all float32; arrays or CPU tensors; pixels
            adjacent, rows of any stride.
        crops: [N, V] of dtype CROP, as `draw_crops` returns a row of it.
        out: V tensors [N, C, size, size], where size is that of the crops [:, v]; all float32, float16 or bfloat16
            (normalized) or, of 8-bit RGB, all uint8 (levels); contiguous but for the first dimension; what they held is
            lost.
        scale: of C channels, C from 1 to 16; None is `PixelScale()`, that of 8-bit RGB.
        threads: at most so many work on it, at least 1; default torch's number.

    Raises:
        ValueError: a shape, dtype, device or stride that does not fit the above; a box that is empty or reaches out of
            its image; brightness, contrast or saturation outside [0, 100], hue outside [-0.5, 0.5], blur outside
            [0, 2.4], an order that is no permutation; saturation, hue, grayscale or solarize of other than three
            channels; threads below 1. Nothing is written then.
    """
    scale = scale or RGB
    arrays = [_check_image(i, image, scale.channels) for i, image in enumerate(images)]
    if len(types := {array.dtype for array in arrays}) > 1:
        raise ValueError(f"images must all have one dtype, got {', '.join(sorted(map(str, types)))}")
    _check_batch(crops, out, len(arrays), torch.device("cpu"), scale, not types or types == {np.dtype(np.uint8)})
    if crops.size:
        _crop(arrays, crops, out, scale, torch.get_num_threads() if threads is None else threads)
        _turn(crops, out)


def _crop(
    images: Sequence[np.ndarray], crops: np.ndarray, out: Sequence[Tensor], scale: PixelScale, threads: int
) -> None:
    crops = np.ascontiguousarray(crops)
    arguments: dict[str, Any] = {
        "pixels": [image.ctypes.data for image in images],
        "heights": [image.shape[0] for image in images],
        "widths": [image.shape[1] for image in images],
        "row_strides": [image.strides[0] for image in images],
        "mean": scale.mean,
        "std": scale.std,
        "crops": crops.ctypes.data,
        "out": [view.data_ptr() for view in out],
        "sizes": [view.shape[-1] for view in out],
        "out_strides": [view.stride(0) for view in out],
        "dtype": DTYPES.get(out[0].dtype, 0),
        "threads": threads,
    }
    if scale.is_8_bit_rgb and images[0].dtype == np.uint8:
        _C.multicrop(**arguments, levels=out[0].dtype == torch.uint8)
    else:
        _C.multicrop_deep(**arguments, depth=DEPTHS[images[0].dtype], low=scale.low, high=scale.high)


def _turn(crops: np.ndarray, out: Sequence[Tensor]) -> None:
    """Vertical flips and turns of finished crops, in place."""
    for v, view in enumerate(out):
        flips, turns = crops["vertical_flip"][:, v], crops["turns"][:, v]
        for flip, turn in {(bool(f), int(t)) for f, t in zip(flips, turns, strict=True)} - {(False, 0)}:
            rows = np.flatnonzero((flips == flip) & (turns == turn))
            if view.is_cpu:  # not by torch, whose threads would be started anew in each thread of a loader
                bits = view.view(_BITS[view.element_size()]).numpy()
                bits[rows] = np.rot90(bits[rows, :, ::-1] if flip else bits[rows], turn, (2, 3))
            else:
                index = torch.from_numpy(rows).to(view.device)
                view[index] = (view[index].flip(2) if flip else view[index]).rot90(turn, (2, 3))


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def multicrop_packed(
    pixels: Tensor, places: np.ndarray, crops: np.ndarray, out: Sequence[Tensor], *, scale: PixelScale | None = None
) -> None:
    """`multicrop` of images that lie in one buffer, on its device: on the CPU in C++; on a GPU with Triton,
    where they are not 8-bit RGB with PyTorch.

    All have the same arithmetic; in Triton's interpreter the levels are the same bit for bit, no GPU has run it yet.
    A loader decodes a batch into one pinned buffer, uploads that in one copy and crops there, in a launch for each size
    of crop:

        pixels = pinned.to("cuda", non_blocking=True)  # pinned may be written again once the stream is past this
        multicrop_packed(pixels, places, crops, out)

    It works in the current stream and never waits for the device. It uploads 224 bytes a crop by itself, so it does not
    belong into a captured graph. While it works it needs, for the crops of that size which needs most, about
    3 * size * (max(height, size) + size) + 16 * (height + width) bytes each, of the box.

    Args:
        pixels: uint8, uint16 or float32 [P], contiguous; image i is [H, W, C], without gaps.
        places: int64 [N, 3], on the host: of each image the index of its first value in pixels, H and W.
        crops: [N, V] of dtype CROP, on the host.
        out: V tensors as those of `multicrop`, on the device of pixels.
        scale: as of `multicrop`.

    Raises:
        ValueError: as `multicrop`; an image that reaches out of pixels; on a GPU a crop with 3 * size * max(height of
            the box, size) >= 2^31. Nothing is written then.
    """
    scale = scale or RGB
    _check_pixels(pixels, places, scale.channels)
    _check_batch(crops, out, len(places), pixels.device, scale, pixels.dtype == torch.uint8)
    if not crops.size:
        return
    crops = np.ascontiguousarray(crops)
    _, heights, widths = places.T.tolist()
    sizes = [view.shape[-1] for view in out]
    _C.check_crops(crops=crops.ctypes.data, heights=heights, widths=widths, sizes=sizes)
    if scale.is_8_bit_rgb and pixels.dtype == torch.uint8:
        pack = _packed_cpu if pixels.is_cpu else _packed_gpu
        pack(pixels, places, crops, out, scale.mean, scale.std)
    else:
        images = _images_of(pixels, places, scale.channels)
        if pixels.is_cpu:
            _crop([image.numpy() for image in images], crops, out, scale, torch.get_num_threads())
        else:
            crop_deep(images, crops, out, scale)
    _turn(crops, out)


_packed_gpu = GpuKernel(triton="multicrop.packed_triton")


def _packed_cpu(
    pixels: Tensor,
    places: np.ndarray,
    crops: np.ndarray,
    out: Sequence[Tensor],
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> None:
    images = [image.numpy() for image in _images_of(pixels, places, 3)]
    _crop(images, crops, out, PixelScale(mean=mean, std=std), torch.get_num_threads())


def _images_of(pixels: Tensor, places: np.ndarray, channels: int) -> list[Tensor]:
    """The images [H, W, C] that lie in a buffer."""
    return [pixels[at : at + channels * h * w].view(h, w, channels) for at, h, w in places.tolist()]


def _check_pixels(pixels: Tensor, places: np.ndarray, channels: int) -> None:
    types = (torch.uint8, torch.uint16, torch.float32)
    if pixels.ndim != 1 or pixels.dtype not in types or not pixels.is_contiguous():
        raise ValueError(
            "pixels must have shape [P], dtype uint8, uint16 or float32 and be contiguous, "
            f"got {list(pixels.shape)}, {pixels.dtype}, strides {list(pixels.stride())}"
        )
    if not (pixels.is_cpu or pixels.is_cuda):
        raise ValueError(f"pixels must be on the CPU or a GPU, got {pixels.device}")
    if not isinstance(places, np.ndarray) or places.dtype != np.int64 or places.shape[1:] != (3,) or places.ndim != 2:
        raise ValueError(
            "places must be an int64 array [N, 3] of first value, height and width, "
            f"got {getattr(places, 'dtype', type(places))}, {list(np.shape(places))}"
        )
    for i, (at, height, width) in enumerate(places.tolist()):
        if at < 0 or height < 1 or width < 1 or at + channels * height * width > len(pixels):
            raise ValueError(
                f"image {i} must have height and width >= 1 and lie inside the {len(pixels)} values of pixels, "
                f"got a first value of {at}, height {height} and width {width}"
            )


def _check_batch(
    crops: np.ndarray, out: Sequence[Tensor], images: int, device: torch.device, scale: PixelScale, bytes_: bool
) -> None:
    if not isinstance(crops, np.ndarray) or crops.dtype != CROP or crops.shape != (images, len(out)):
        raise ValueError(
            f"crops must be an array of dtype CROP and shape [{images}, {len(out)}], one row an image and one "
            f"column a tensor of out, got {getattr(crops, 'dtype', type(crops))}, {list(np.shape(crops))}"
        )
    for v, view in enumerate(out):
        _check_view(v, view, (images, scale.channels), out[0].dtype, device)
    if out and out[0].dtype == torch.uint8 and not (scale.is_8_bit_rgb and bytes_):
        raise ValueError("out must be float32, float16 or bfloat16: uint8 levels are of 8-bit RGB")
    if scale.channels != 3:
        colors = (crops["saturation"] != 1) | (crops["hue"] != 0)
        if np.any((colors & crops["jitter"]) | crops["grayscale"] | crops["solarize"]):
            raise ValueError(
                f"saturation, hue, grayscale and solarize are for RGB, images have {scale.channels} channels: crops "
                "must have saturation 1 and hue 0, or no jitter, and neither grayscale nor solarize"
            )


def _check_image(i: int, image: np.ndarray | Tensor, channels: int) -> np.ndarray:
    if isinstance(image, Tensor) and image.device.type != "cpu":
        raise ValueError(f"images[{i}] must be on the CPU, got {image.device}")
    array = np.asarray(image)
    if array.ndim != 3 or array.shape[2] != channels or not array.size or array.dtype not in DEPTHS:
        raise ValueError(
            f"images[{i}] must have shape [H, W, {channels}] with H, W >= 1 and dtype uint8, uint16 or float32, "
            f"got {list(array.shape)}, {array.dtype}"
        )
    wanted = (channels * array.itemsize, array.itemsize)
    if any(have != want for have, want, n in zip(array.strides[1:], wanted, array.shape[1:], strict=True) if n > 1):
        raise ValueError(
            f"the pixels of a row of images[{i}] must be adjacent, strides [*, {wanted[0]}, {wanted[1]}] bytes, got "
            f"{list(array.strides)}: use np.ascontiguousarray"
        )
    return array


def _check_view(v: int, view: Tensor, rows: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    shape, size = view.shape, view.shape[-1] if view.ndim else 0
    if shape != (*rows, size, size) or not size:
        wanted = f"[{rows[0]}, {rows[1]}, size, size]"
        raise ValueError(f"out[{v}] must have shape {wanted} with size >= 1, got {list(shape)}")
    if view.dtype != dtype or (dtype != torch.uint8 and dtype not in DTYPES) or view.device != device:
        raise ValueError(
            f"out must be on {device}, all uint8 or all of one of float32, float16 and bfloat16, "
            f"got {view.dtype} on {view.device} in out[{v}]"
        )
    if view.stride()[1:] != (size * size, size, 1) or view.requires_grad:
        raise ValueError(
            f"out[{v}] must be contiguous but for its first dimension and need no gradient, "
            f"got strides {list(view.stride())}, requires_grad={view.requires_grad}"
        )
