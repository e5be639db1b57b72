"""Triton kernel of multicrop_packed: the law of dino_kernels/ops/multicrop.py, the arithmetic of csrc/cpu/multicrop.

A program makes a crop, step by step with barriers between. What a step leaves is in memory that this program alone
touches: the weights of the resize, and two areas of levels in three planes, the first of which holds the rows after
the pass along them and later every other result of the blur. It is a few hundred KiB, so it stays in the caches. All
loops end where the crop's own numbers say.

Floats are rounded as on the CPU, product and sum each (enable_fp_fusion=False), and divided exactly: the last bit
counts where a level is cut off.
"""

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from dino_kernels._core.native import JITTER

__all__ = ["packed_triton"]

_BLOCK = 512  # pixels at a time, 2 a thread

# Columns of the plan, which has an int64 row a crop. _CORNER: where the box begins in pixels; _STRIDE: bytes of a row
# of the image; _WIDTH, _HEIGHT: of the box; _TAPS_*: inputs of an output at most; _WEIGHTS_*, _SPARE, _LEVELS: where
# these begin in the scratch; _BRIGHTNESS, _CONTRAST, _SATURATION: the bits of a float32; _HUE: in 256ths of a circle;
# _CONTRAST_AT: the place of contrast in _ORDER, which is four columns; _PASSES: of the blur, in both directions;
# _RADIUS, _WHOLE, _PART: as struct Box of csrc/cpu/multicrop/parts.h; _THRESHOLD: of solarize; _OUT: address.
(
    _CORNER, _STRIDE, _WIDTH, _HEIGHT, _TAPS_X, _TAPS_Y, _WEIGHTS_X, _WEIGHTS_Y, _SPARE, _LEVELS, _FLIP,
    _BRIGHTNESS, _CONTRAST, _SATURATION, _HUE, _CONTRAST_AT, _GRAYSCALE,
    _PASSES, _RADIUS, _WHOLE, _PART, _THRESHOLD, _OUT, _ORDER,
) = map(tl.constexpr, range(24))  # fmt: skip
_COLUMNS = tl.constexpr(_ORDER.value + 4)


# --- resize ------------------------------------------------------------------------------------------


@triton.jit
def _bicubic(tap, end, center, inverse):
    """The weight of an input, in float64, before it is divided by their sum; zero from `end` on."""
    x = tl.abs((tap.to(tl.float64) - center + 0.5) * inverse)
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
    return tl.where((x < 2.0) & (tap < end), tl.where(x < 1.0, near, far), 0.0)


@triton.jit
def _weigh(weights, inputs, taps, flip, SIZE: tl.constexpr, LANES: tl.constexpr):
    """Writes the first input of each output [SIZE], then the weights [taps, SIZE] of it and those after it."""
    lane = tl.arange(0, LANES)
    output = tl.minimum(lane, SIZE - 1)
    scale = inputs.to(tl.float64) / SIZE
    stretch = tl.maximum(scale, 1.0)
    inverse = 1.0 / stretch
    center = (tl.where(flip, SIZE - 1 - output, output).to(tl.float64) + 0.5) * scale
    first = tl.maximum(center - 2.0 * stretch + 0.5, 0.0).to(tl.int32)
    end = tl.minimum((center + 2.0 * stretch + 0.5).to(tl.int32), inputs)
    total = tl.zeros((LANES,), tl.float64)
    for tap in range(taps):
        total += _bicubic(first + tap, end, center, inverse)
    tl.store(weights + lane, first, lane < SIZE)
    for tap in range(taps):
        weight = _bicubic(first + tap, end, center, inverse) / total * (1 << 22)
        fixed = (weight + tl.where(weight < 0, -0.5, 0.5)).to(tl.int32)
        tl.store(weights + (tap + 1) * SIZE + lane, fixed, lane < SIZE)


@triton.jit
def _filtered(source, step, plane, inputs, weights, output, taps, SIZE: tl.constexpr):
    """Levels of three channels, `plane` apart, from inputs a step apart with the weights of `output`."""
    first = tl.load(weights + output)
    r = tl.full(output.shape, 1 << 21, tl.int32)
    g, b = r, r
    for tap in range(taps):
        weight = tl.load(weights + (tap + 1) * SIZE + output)
        at = source + tl.minimum(first + tap, inputs - 1) * step
        r += weight * tl.load(at).to(tl.int32)
        g += weight * tl.load(at + plane).to(tl.int32)
        b += weight * tl.load(at + 2 * plane).to(tl.int32)
    return _level(r >> 22), _level(g >> 22), _level(b >> 22)


# --- colors ------------------------------------------------------------------------------------------


@triton.jit
def _level(x):
    return tl.minimum(tl.maximum(x, 0), 255)


@triton.jit
def _luma(r, g, b):
    return (19595 * r + 38470 * g + 7471 * b + 32768) >> 16


@triton.jit
def _blend(degenerate, level, factor):
    x = degenerate.to(tl.float32) + factor * (level - degenerate).to(tl.float32)
    return _level(x.to(tl.int32))


@triton.jit
def _byte_below(x):
    """The whole number below 255 x, for x in [0, 1]."""
    byte = (255.0 * x).to(tl.int32)
    return byte - (256.0 * x - byte.to(tl.float32) < x).to(tl.int32)


@triton.jit
def _channel(turned, s, v):
    """v where the hue is near, v (1 - s) where it is far; `turned`: see channel() in
    csrc/cpu/multicrop/vectors_color.h."""
    turned = tl.where(turned >= 1530, turned - 1530, turned)
    fallen = _level(tl.minimum(turned, 1020 - turned)).to(tl.float32)
    return (v * (65025.0 - s * fallen) * (1 / 65025) + 0.5).to(tl.int32)


@triton.jit
def _turn_hue(r, g, b, shift):
    most, least = tl.maximum(r, tl.maximum(g, b)), tl.minimum(r, tl.minimum(g, b))
    spread = most - least
    middle = tl.div_rn((2 * most + least - r - g - b).to(tl.float32), tl.maximum(spread, 1).to(tl.float32))
    side = tl.where(r == most, 0.0, tl.where(g == most, 2.0, 4.0))
    last = tl.where(r == most, b, tl.where(g == most, r, g))
    hue = tl.where(last == least, (side + 1.0) - middle, (side - 1.0) + middle)
    hue = tl.div_rn(hue, tl.full(hue.shape, 6.0, tl.float32))
    hue = _byte_below(tl.where(hue < 0, hue + 1.0, hue))
    s = _byte_below(tl.div_rn(spread.to(tl.float32), tl.maximum(most, 1).to(tl.float32))).to(tl.float32)
    v, h = most.to(tl.float32), 6 * ((hue + shift) & 255)
    return _channel(h + 1275, s, v), _channel(h + 765, s, v), _channel(h + 255, s, v)


@triton.jit
def _factor(crop, FIELD: tl.constexpr):
    return tl.load(crop + FIELD).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _recolored(r, g, b, crop, begin, end):
    """The jitter's steps from place `begin` up to `end` of its order, but for contrast."""
    for i in range(begin, end):
        step = tl.load(crop + _ORDER + i)
        if step == 0:
            factor = _factor(crop, _BRIGHTNESS)
            r, g, b = _blend(r * 0, r, factor), _blend(g * 0, g, factor), _blend(b * 0, b, factor)
        elif step == 2:
            factor, gray = _factor(crop, _SATURATION), _luma(r, g, b)
            r, g, b = _blend(gray, r, factor), _blend(gray, g, factor), _blend(gray, b, factor)
        elif step == 3:
            r, g, b = _turn_hue(r, g, b, tl.load(crop + _HUE).to(tl.int32))
    return r, g, b


# --- the steps of a crop -----------------------------------------------------------------------------


@triton.jit
def _field(crop, FIELD: tl.constexpr):
    return tl.load(crop + FIELD).to(tl.int32)


@triton.jit
def _load(planes, plane, i, mask):
    r = tl.load(planes + i, mask, other=0).to(tl.int32)
    g = tl.load(planes + plane + i, mask, other=0).to(tl.int32)
    b = tl.load(planes + 2 * plane + i, mask, other=0).to(tl.int32)
    return r, g, b


@triton.jit
def _store(planes, plane, i, mask, r, g, b):
    tl.store(planes + i, r.to(tl.uint8), mask)
    tl.store(planes + plane + i, g.to(tl.uint8), mask)
    tl.store(planes + 2 * plane + i, b.to(tl.uint8), mask)


@triton.jit
def _filter_rows(pixels, weights, levels, crop, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of the box to planes [3, height, SIZE] in the spare area."""
    corner, stride = pixels + tl.load(crop + _CORNER), tl.load(crop + _STRIDE)
    width, height, taps = _field(crop, _WIDTH), _field(crop, _HEIGHT), _field(crop, _TAPS_X)
    weights += tl.load(crop + _WEIGHTS_X)
    rows = levels + tl.load(crop + _SPARE)
    for start in range(0, height * SIZE, BLOCK):
        i = start + tl.arange(0, BLOCK)
        mask = i < height * SIZE
        row = corner + tl.minimum(i // SIZE, height - 1).to(tl.int64) * stride
        r, g, b = _filtered(row, 3, 1, width, weights, i % SIZE, taps, SIZE)
        _store(rows, height * SIZE, i, mask, r, g, b)


@triton.jit
def _filter_columns(weights, levels, crop, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """These to levels [3, SIZE, SIZE], with the jitter up to contrast."""
    pixels: tl.constexpr = SIZE * SIZE
    height, taps = _field(crop, _HEIGHT), _field(crop, _TAPS_Y)
    weights += tl.load(crop + _WEIGHTS_Y)
    rows, levels = levels + tl.load(crop + _SPARE), levels + tl.load(crop + _LEVELS)
    for start in range(0, pixels, BLOCK):
        i = start + tl.arange(0, BLOCK)
        mask = i < pixels
        y = tl.minimum(i // SIZE, SIZE - 1)
        r, g, b = _filtered(rows + i % SIZE, SIZE, height * SIZE, height, weights, y, taps, SIZE)
        r, g, b = _recolored(r, g, b, crop, 0, _field(crop, _CONTRAST_AT))
        _store(levels, pixels, i, mask, r, g, b)


@triton.jit
def _mean_luma(levels, crop, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """int(mean + 0.5)"""
    pixels: tl.constexpr = SIZE * SIZE
    levels += tl.load(crop + _LEVELS)
    total = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, pixels, BLOCK):
        i = start + tl.arange(0, BLOCK)
        r, g, b = _load(levels, pixels, i, i < pixels)
        total += _luma(r, g, b)
    return ((2 * tl.sum(total.to(tl.int64)) + pixels) // (2 * pixels)).to(tl.int32)


@triton.jit
def _finish_colors(mean, levels, crop, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Contrast, what comes after it, and grayscale."""
    pixels: tl.constexpr = SIZE * SIZE
    levels += tl.load(crop + _LEVELS)
    for start in range(0, pixels, BLOCK):
        i = start + tl.arange(0, BLOCK)
        r, g, b = _load(levels, pixels, i, i < pixels)
        factor = _factor(crop, _CONTRAST)
        r, g, b = _blend(mean, r, factor), _blend(mean, g, factor), _blend(mean, b, factor)
        r, g, b = _recolored(r, g, b, crop, _field(crop, _CONTRAST_AT) + 1, 4)
        if _field(crop, _GRAYSCALE) != 0:
            r = _luma(r, g, b)
            g, b = r, r
        _store(levels, pixels, i, i < pixels, r, g, b)


@triton.jit
def _neighbors(planes, i, position, distance, step, mask, SIZE: tl.constexpr):
    """Sum of the two levels that far before and after position; outside the crop is its edge."""
    before = tl.load(planes + i + (tl.maximum(position - distance, 0) - position) * step, mask, other=0)
    after = tl.load(planes + i + (tl.minimum(position + distance, SIZE - 1) - position) * step, mask, other=0)
    return before.to(tl.uint32) + after.to(tl.uint32)


@triton.jit
def _blur(source, to, step, crop, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """A box filter along one direction, in which pixels are a step apart."""
    radius = _field(crop, _RADIUS)
    whole, part = tl.load(crop + _WHOLE).to(tl.uint32), tl.load(crop + _PART).to(tl.uint32)
    for start in range(0, 3 * SIZE * SIZE, BLOCK):
        i = start + tl.arange(0, BLOCK)
        mask = i < 3 * SIZE * SIZE
        position = tl.where(step == 1, i, i // SIZE) % SIZE
        inner = tl.load(source + i, mask, other=0).to(tl.uint32)
        for distance in range(1, radius + 1):
            inner += _neighbors(source, i, position, distance, step, mask, SIZE)
        outer = _neighbors(source, i, position, radius + 1, step, mask, SIZE)
        blurred = (whole * inner + part * outer + (1 << 23)) >> 24
        tl.store(to + i, blurred.to(tl.uint8), mask)


@triton.jit
def _write(levels, out, crop, FACTORS: tl.constexpr, SHIFTS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Solarized and, unless out takes levels, normalized: level * factor - shift of the channel."""
    pixels: tl.constexpr = SIZE * SIZE
    threshold = _field(crop, _THRESHOLD)
    levels, out = levels + tl.load(crop + _LEVELS), tl.load(crop + _OUT).to(out.dtype)
    for c in tl.static_range(3):
        for start in range(0, pixels, BLOCK):
            i = start + tl.arange(0, BLOCK)
            level = tl.load(levels + c * pixels + i, i < pixels, other=0).to(tl.int32)
            level = tl.where(level < threshold, level, 255 - level)
            if out.dtype.element_ty != tl.uint8:
                level = level.to(tl.float32) * FACTORS[c] - SHIFTS[c]
            tl.store(out + c * pixels + i, level.to(out.dtype.element_ty), i < pixels)


@triton.jit
def _crop_kernel(
    pixels, plan, weights, levels, out,
    FACTORS: tl.constexpr, SHIFTS: tl.constexpr, SIZE: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A crop a program; of `out` only the dtype counts."""
    crop = plan + tl.program_id(0) * _COLUMNS
    flip = tl.load(crop + _FLIP) != 0
    _weigh(weights + tl.load(crop + _WEIGHTS_X), _field(crop, _WIDTH), _field(crop, _TAPS_X), flip, SIZE, LANES)
    _weigh(weights + tl.load(crop + _WEIGHTS_Y), _field(crop, _HEIGHT), _field(crop, _TAPS_Y), False, SIZE, LANES)
    tl.debug_barrier()
    _filter_rows(pixels, weights, levels, crop, SIZE, BLOCK)
    tl.debug_barrier()
    _filter_columns(weights, levels, crop, SIZE, BLOCK)
    tl.debug_barrier()
    _finish_colors(_mean_luma(levels, crop, SIZE, BLOCK), levels, crop, SIZE, BLOCK)
    tl.debug_barrier()
    source, to = levels + tl.load(crop + _LEVELS), levels + tl.load(crop + _SPARE)
    passes = _field(crop, _PASSES)
    for k in range(passes):  # an even number, or none
        _blur(source, to, tl.where(2 * k < passes, 1, SIZE), crop, SIZE, BLOCK)
        tl.debug_barrier()
        source, to = to, source
    _write(levels, out, crop, FACTORS, SHIFTS, SIZE, BLOCK)


# --- the launches ------------------------------------------------------------------------------------


def _boxes(sigma: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Radius and weights of the blur's boxes, three passes of which are about a Gaussian; float32 where Pillow is."""
    variance = sigma * sigma / np.float32(3)
    length = np.sqrt(12 * variance.astype(np.float64) + 1).astype(np.float32)
    below = np.floor((length.astype(np.float64) - 1) / 2).astype(np.float32)
    part = (2 * below + 1) * (below * (below + 1) - 3 * variance) / (6 * (variance - (below + 1) * (below + 1)))
    radius = (below + part).astype(np.int64)
    whole = (np.float32(1 << 24) / ((below + part) * 2 + 1)).astype(np.int64)
    return radius, whole, ((1 << 24) - (2 * radius + 1) * whole) // 2


def _taps(inputs: np.ndarray, size: int) -> np.ndarray:
    """As many inputs as an output can have."""
    return np.floor(4 * np.maximum(inputs / size, 1) + 1e-6).astype(np.int64) + 1


def _starts(sizes: np.ndarray) -> tuple[np.ndarray, int]:
    """Where each crop's share of a scratch begins, aligned to 128 elements, and the size of all."""
    ends = np.cumsum((sizes + 127) // 128 * 128)
    return ends - (sizes + 127) // 128 * 128, int(ends[-1])


def _plan(places: np.ndarray, crops: np.ndarray, out: Sequence[Tensor]) -> tuple[np.ndarray, int, int]:
    """The plan of crops [N, V] of one size, an output after the other, and what it needs of both scratches."""
    size, crops = out[0].shape[-1], crops.T.reshape(-1)
    offset, _, row = np.tile(places.T, len(out))
    box: np.ndarray = crops["box"].T.astype(np.int64)
    (left, top), (width, height) = box[:2], box[2:] - box[:2]
    taps_x, taps_y = _taps(width, size), _taps(height, size)
    weights, weights_size = _starts((taps_x + taps_y + 2) * size)
    spare_size = 3 * size * np.maximum(height, size)
    if spare_size.max() >= 1 << 31:
        raise ValueError(f"a crop of {size} pixels needs a box of less than {(1 << 31) // (3 * size)} rows on a GPU")
    spare, levels_size = _starts(spare_size + 3 * size * size)
    # Without jitter all steps are contrast, by a factor of 1.
    jitter, contrast = crops["jitter"], JITTER.index("contrast")
    order = np.where(jitter[:, None], crops["order"], contrast).astype(np.int64)
    factors = [np.where(jitter, crops[name], np.float32(1)).view(np.int32) for name in JITTER[:3]]
    rows = np.arange(len(places))
    addresses = np.concatenate([view.data_ptr() + rows * view.stride(0) * view.itemsize for view in out])
    hue = (crops["hue"].astype(np.float64) * 255).astype(np.int64)
    columns = [
        offset + 3 * (top * row + left), 3 * row, width, height, taps_x, taps_y,
        weights, weights + (taps_x + 1) * size, spare, spare + spare_size, crops["flip"],
        *factors, hue, np.argmax(order == contrast, axis=1), crops["grayscale"],
        6 * (crops["blur"] > 0), *_boxes(crops["blur"]), np.where(crops["solarize"], 128, 256), addresses, *order.T,
    ]  # fmt: skip
    return np.stack(columns, axis=1).astype(np.int64), weights_size, levels_size


def packed_triton(
    pixels: Tensor,
    places: np.ndarray,
    crops: np.ndarray,
    out: Sequence[Tensor],
    mean: Sequence[float] = (0.485, 0.456, 0.406),
    std: Sequence[float] = (0.229, 0.224, 0.225),
) -> None:
    """A launch for each size of crop, one after the other in the same scratch; the plan of all is one upload."""
    sizes = [view.shape[-1] for view in out]
    groups = [[v for v, other in enumerate(sizes) if other == size] for size in dict.fromkeys(sizes)]
    plans, weights, levels = zip(*(_plan(places, crops[:, vs], [out[v] for v in vs]) for vs in groups), strict=True)
    plan = torch.from_numpy(np.concatenate(plans))
    if pixels.is_cuda:
        plan = plan.pin_memory()  # whose memory torch keeps until it is uploaded
    plan = plan.to(pixels.device, non_blocking=True)
    scratch = pixels.new_empty(max(weights), dtype=torch.int32), pixels.new_empty(max(levels))
    mean_, std_ = np.array(mean, np.float32), np.array(std, np.float32)
    colors = {"FACTORS": tuple((1 / (255 * std_)).tolist()), "SHIFTS": tuple((mean_ / std_).tolist())}
    for vs, rows in zip(groups, plan.split([len(rows) for rows in plans]), strict=True):
        tile = {"SIZE": sizes[vs[0]], "LANES": triton.next_power_of_2(sizes[vs[0]]), "BLOCK": _BLOCK}
        _crop_kernel[(len(rows),)](
            pixels, rows, *scratch, out[0], **colors, **tile, num_warps=8, num_stages=1, enable_fp_fusion=False
        )
