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
    out = (crop / 255 - mean) / std                         of ImageNet; bytes are written as they are

Every step but the last works on levels 0 .. 255 with the rounding of Pillow 12 on x86, which the reference uses: the
levels are the same bit for bit, on every processor. (Pillow 13 resizes some tall boxes columns first, which differs by
some levels there.)

Dimensions: N images, V crops of each. `draw_crops` is a function of its key alone, so the crops of an image depend on
no worker, rank, device or other image.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np
import torch
from torch import Tensor

from dino_kernels._core.backends import GpuKernel
from dino_kernels._core.native import _C, DTYPES, JITTER

__all__ = ["CROP", "CropKind", "draw_crops", "multicrop", "multicrop_packed"]

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
        *((name, np.bool_) for name in ("flip", "jitter", "grayscale", "solarize")),
    ]
)

RATIO = (3 / 4, 4 / 3)

_TRIES = 10
_DRAWS = 2 * _TRIES + 13  # random numbers a crop, used or not
_ORDERS = tuple(permutations(range(4)))


# --- drawing -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CropKind:
    """What distinguishes the global crops 1 and 2 and the local crops: output side in pixels, area as a
    fraction (low, high) of the image, probability of blur, probability of solarize, and by how much brightness,
    contrast, saturation and hue vary around 1, 1, 1 and 0."""

    size: int
    scale: tuple[float, float]
    blur: float
    solarize: float
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)


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
    draws = np.random.Generator(np.random.PCG64(seeds)).random((len(kinds), _DRAWS)).tolist()
    return np.array([_draw_crop(u, kind, *image_size) for u, kind in zip(draws, kinds, strict=True)], CROP)


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
        flip < 0.5,
        jitter < 0.8,
        grayscale < 0.2,
        solarize < kind.solarize,
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


def multicrop(
    images: Sequence[np.ndarray | Tensor], crops: np.ndarray, out: Sequence[Tensor], *, threads: int | None = None
) -> None:
    """Writes the crops of decoded images into batches; see the top of the file. On the CPU, without the GIL; for a GPU
    there is `multicrop_packed`.

    A worker that decoded image b of a batch fills its rows with
    `multicrop([image], crops[None], [view[b : b + 1] for view in batch], threads=1)`.

    Args:
        images: N of uint8 [H, W, 3], RGB, of any sizes >= 1; arrays or CPU tensors; pixels adjacent, rows of any
            stride.
        crops: [N, V] of dtype CROP, as `draw_crops` returns a row of it.
        out: V tensors [N, 3, size, size], where size is that of the crops [:, v]; all uint8 (levels) or all float32,
            float16 or bfloat16 (normalized); contiguous but for the first dimension; what they held is lost.
        threads: at most so many work on it; default torch's number.

    Raises:
        ValueError: a shape, dtype, device or stride that does not fit the above; a box that is empty or reaches out of
            its image; brightness, contrast or saturation outside [0, 100], hue outside [-0.5, 0.5], blur outside
            [0, 2.4], an order that is no permutation. Nothing is written then.
    """
    arrays = [_check_image(i, image) for i, image in enumerate(images)]
    _check_batch(crops, out, len(arrays), torch.device("cpu"))
    if not crops.size:
        return
    crops = np.ascontiguousarray(crops)
    _C.multicrop(
        pixels=[image.ctypes.data for image in arrays],
        heights=[image.shape[0] for image in arrays],
        widths=[image.shape[1] for image in arrays],
        row_strides=[image.strides[0] for image in arrays],
        crops=crops.ctypes.data,
        out=[view.data_ptr() for view in out],
        sizes=[view.shape[-1] for view in out],
        out_strides=[view.stride(0) for view in out],
        levels=out[0].dtype == torch.uint8,
        dtype=DTYPES.get(out[0].dtype, 0),
        threads=torch.get_num_threads() if threads is None else threads,
    )


def multicrop_packed(pixels: Tensor, places: np.ndarray, crops: np.ndarray, out: Sequence[Tensor]) -> None:
    """`multicrop` of images that lie in one buffer, on its device: with Triton on a GPU, else in C++.

    Both have the same arithmetic; in Triton's interpreter the levels are the same bit for bit, no GPU has run it yet.
    A loader decodes a batch into one pinned buffer, uploads that in one copy and crops there, in a launch for each size
    of crop:

        pixels = pinned.to("cuda", non_blocking=True)  # pinned may be written again once the stream is past this
        multicrop_packed(pixels, places, crops, out)

    It works in the current stream and never waits for the device. It uploads 224 bytes a crop by itself, so it does not
    belong into a captured graph. While it works it needs, for the crops of that size which needs most, about
    3 * size * (max(height, size) + size) + 16 * (height + width) bytes each, of the box.

    Args:
        pixels: uint8 [P], contiguous; image i is [H, W, 3], RGB, without gaps.
        places: int64 [N, 3], on the host: of each image the index of its first byte in pixels, H and W.
        crops: [N, V] of dtype CROP, on the host.
        out: V tensors as those of `multicrop`, on the device of pixels.

    Raises:
        ValueError: as `multicrop`; an image that reaches out of pixels; on a GPU a crop with 3 * size * max(height of
            the box, size) >= 2^31. Nothing is written then.
    """
    _check_pixels(pixels, places)
    _check_batch(crops, out, len(places), pixels.device)
    if not crops.size:
        return
    crops = np.ascontiguousarray(crops)
    _, heights, widths = places.T.tolist()
    sizes = [view.shape[-1] for view in out]
    _C.check_crops(crops=crops.ctypes.data, heights=heights, widths=widths, sizes=sizes)
    if pixels.is_cpu:
        _packed_cpu(pixels, places, crops, out)
    else:
        _packed_gpu(pixels, places, crops, out)


_packed_gpu = GpuKernel(triton="multicrop.packed_triton")


def _packed_cpu(pixels: Tensor, places: np.ndarray, crops: np.ndarray, out: Sequence[Tensor]) -> None:
    multicrop([pixels[at : at + 3 * h * w].view(h, w, 3) for at, h, w in places.tolist()], crops, out)


def _check_pixels(pixels: Tensor, places: np.ndarray) -> None:
    if pixels.ndim != 1 or pixels.dtype != torch.uint8 or not pixels.is_contiguous():
        raise ValueError(
            f"pixels must have shape [P], dtype uint8 and be contiguous, got {list(pixels.shape)}, {pixels.dtype}, "
            f"strides {list(pixels.stride())}"
        )
    if not (pixels.is_cpu or pixels.is_cuda):
        raise ValueError(f"pixels must be on the CPU or a GPU, got {pixels.device}")
    if not isinstance(places, np.ndarray) or places.dtype != np.int64 or places.shape[1:] != (3,) or places.ndim != 2:
        raise ValueError(
            "places must be an int64 array [N, 3] of first byte, height and width, "
            f"got {getattr(places, 'dtype', type(places))}, {list(np.shape(places))}"
        )
    for i, (at, height, width) in enumerate(places.tolist()):
        if at < 0 or height < 1 or width < 1 or at + 3 * height * width > len(pixels):
            raise ValueError(
                f"image {i} must have height and width >= 1 and lie inside the {len(pixels)} bytes of pixels, "
                f"got a first byte of {at}, height {height} and width {width}"
            )


def _check_batch(crops: np.ndarray, out: Sequence[Tensor], images: int, device: torch.device) -> None:
    if not isinstance(crops, np.ndarray) or crops.dtype != CROP or crops.shape != (images, len(out)):
        raise ValueError(
            f"crops must be an array of dtype CROP and shape [{images}, {len(out)}], one row an image and one "
            f"column a tensor of out, got {getattr(crops, 'dtype', type(crops))}, {list(np.shape(crops))}"
        )
    for v, view in enumerate(out):
        _check_view(v, view, images, out[0].dtype, device)


def _check_image(i: int, image: np.ndarray | Tensor) -> np.ndarray:
    if isinstance(image, Tensor) and image.device.type != "cpu":
        raise ValueError(f"images[{i}] must be on the CPU, got {image.device}")
    array = np.asarray(image)
    if array.ndim != 3 or array.shape[2] != 3 or not array.size or array.dtype != np.uint8:
        raise ValueError(
            f"images[{i}] must have shape [H, W, 3] with H, W >= 1 and dtype uint8, "
            f"got {list(array.shape)}, {array.dtype}"
        )
    if array.strides[1:] != (3, 1):
        raise ValueError(
            f"the pixels of a row of images[{i}] must be adjacent, strides [*, 3, 1], got {list(array.strides)}: "
            "use np.ascontiguousarray"
        )
    return array


def _check_view(v: int, view: Tensor, images: int, dtype: torch.dtype, device: torch.device) -> None:
    shape, size = view.shape, view.shape[-1] if view.ndim else 0
    if shape != (images, 3, size, size) or not size:
        raise ValueError(f"out[{v}] must have shape [{images}, 3, size, size] with size >= 1, got {list(shape)}")
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
