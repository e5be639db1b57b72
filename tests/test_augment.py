"""The multi-crop law: the distribution of the drawn parameters, and each step against its own formula."""

import colorsys
import math
import random
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from dino_train.augment import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Crop,
    MultiCrop,
    apply_crop,
    crop_generator,
    draw_crop,
    eval_transform,
    to_tensor,
)
from PIL import Image

N_DRAWS = 3000
GLOBAL_1, GLOBAL_2, LOCAL = MultiCrop().kinds[:3]


def noise(width, height, low=0, high=256, seed=0):
    pixels = np.random.default_rng(seed).integers(low, high, (height, width, 3))
    return Image.fromarray(pixels.astype(np.uint8))


def levels(tensor):
    """Undo the normalization: int [H, W, 3]."""
    value = (tensor.permute(1, 2, 0).double().numpy() * IMAGENET_STD + IMAGENET_MEAN) * 255
    assert np.abs(value - np.round(value)).max() < 1e-3
    return np.round(value).astype(int)


def plain(image, **changes):
    """apply_crop with every step off but those named, without resizing; int [H, W, 3]."""
    side = image.width
    off = Crop((0, 0, side, side), side, flip=False, jitter=(), grayscale=False, blur=0.0, solarize=False)
    return levels(apply_crop(image, replace(off, **changes)))


def luma(pixels):
    return (pixels.astype(int) @ [19595, 38470, 7471] + 32768) >> 16


def assert_levels(got, expected, share=0.01, most=1):
    difference = np.abs(got - expected)
    assert difference.max() <= most
    assert (difference > 0).mean() <= share


# ---- the applying half


def test_to_tensor():
    image = noise(31, 17)
    expected = (np.asarray(image).astype(np.float64) / 255 - IMAGENET_MEAN) / IMAGENET_STD
    tensor = to_tensor(image)
    assert tensor.dtype == torch.float32 and tensor.shape == (3, 17, 31) and tensor.is_contiguous()
    np.testing.assert_allclose(tensor.permute(1, 2, 0).numpy(), expected, rtol=0, atol=1e-6)


def test_no_step_changes_nothing():
    image = noise(24, 24)
    assert np.array_equal(plain(image), np.asarray(image))


def bicubic(pixels, size):
    """Antialiased bicubic resize of [H, W, 3] to [size, size, 3] in float64 (a = -0.5, support 2 x scale)."""

    def weights(side):
        scale = max(side / size, 1.0)
        x = np.abs((np.arange(side) + 0.5) - (np.arange(size)[:, None] + 0.5) * side / size) / scale
        w = np.where(x < 1, (1.5 * x - 2.5) * x * x + 1, np.where(x < 2, ((-0.5 * x + 2.5) * x - 4) * x + 2, 0))
        return w / w.sum(1, keepdims=True)

    rows, columns = weights(pixels.shape[0]), weights(pixels.shape[1])
    return np.einsum("yh,hwc,xw->yxc", rows, pixels.astype(np.float64), columns)


@pytest.mark.parametrize("box", [(5, 7, 65, 52), (10, 0, 22, 90), (40, 40, 49, 47)])
def test_crop_then_bicubic_resize(box):
    image = noise(100, 90, 70, 180)
    left, top, right, bottom = box
    expected = bicubic(np.asarray(image)[top:bottom, left:right], 32)
    got = plain(image, box=box, size=32)
    assert np.abs(got - expected).max() < 1.6  # 8-bit rounding after each of the two passes


def test_pixels_outside_the_crop_do_not_contribute():
    image, box = noise(64, 64), (13, 9, 50, 41)
    masked = Image.new("RGB", image.size, (255, 0, 255))
    masked.paste(image.crop(box), box[:2])
    assert np.array_equal(plain(image, box=box, size=16), plain(masked, box=box, size=16))


def test_flip():
    image = noise(16, 16)
    assert np.array_equal(plain(image, flip=True), np.asarray(image)[:, ::-1])


def blend(degenerate, pixels, factor):
    return np.trunc(np.clip(degenerate + factor * (pixels - degenerate), 0, 255))


@pytest.mark.parametrize("factor", [0.613, 0.83, 1.0, 1.21, 1.387])
def test_brightness_contrast_saturation(factor):
    image = noise(40, 40, 10, 256)
    pixels = np.asarray(image).astype(np.float64)
    gray = luma(np.asarray(image))
    assert_levels(plain(image, jitter=(("brightness", factor),)), blend(0, pixels, factor))
    assert_levels(plain(image, jitter=(("contrast", factor),)), blend(int(gray.mean() + 0.5), pixels, factor))
    assert_levels(plain(image, jitter=(("saturation", factor),)), blend(gray[..., None], pixels, factor))


@pytest.mark.parametrize("factor", [-0.1, -0.05, 0.0, 0.003, 0.07, 0.1])
def test_hue_wraps_around_in_8_bit_hsv(factor):
    image = noise(24, 24)
    expected = []
    for rgb in np.asarray(image).reshape(-1, 3) / 255:
        h, s, v = (int(channel * 255 + 1e-9) for channel in colorsys.rgb_to_hsv(*rgb))
        h = (h + int(factor * 255)) % 256
        expected.append([round(255 * c) for c in colorsys.hsv_to_rgb(h / 255, s / 255, v / 255)])
    got = plain(image, jitter=(("hue", factor),))
    assert_levels(got, np.reshape(expected, got.shape), share=0.02, most=3)


def test_hue_direction():
    red = Image.new("RGB", (2, 2), (255, 0, 0))
    assert plain(red, jitter=(("hue", 0.1),))[0, 0] == pytest.approx([255, 150, 0], abs=3)  # toward yellow
    assert plain(red, jitter=(("hue", -0.1),))[0, 0] == pytest.approx([255, 0, 150], abs=8)  # toward magenta


def test_grayscale():
    image = noise(20, 20)
    assert np.array_equal(plain(image, grayscale=True), np.repeat(luma(np.asarray(image))[..., None], 3, 2))


def box_blur(pixels, radius):
    """Gaussian blur of [H, W, 3] as three extended box passes per axis with replicated edges."""
    sigma2 = radius**2 / 3
    whole = math.floor((math.sqrt(12 * sigma2 + 1) - 1) / 2)
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * sigma2) / (6 * (sigma2 - (whole + 1) ** 2))
    kernel = np.array([part] + [1.0] * (2 * whole + 1) + [part])
    kernel /= kernel.sum()
    for axis in (1, 1, 1, 0, 0, 0):
        pad = [(whole + 1, whole + 1) if a == axis else (0, 0) for a in range(3)]
        padded = np.pad(pixels.astype(np.float64), pad, mode="edge")
        windows = np.lib.stride_tricks.sliding_window_view(padded, len(kernel), axis=axis)
        pixels = np.floor(windows @ kernel + 0.5)
    return pixels


@pytest.mark.parametrize("radius", [0.1, 0.47, 0.93, 1.3, 1.93])
def test_blur(radius):
    image = noise(32, 32)
    assert_levels(plain(image, blur=radius), box_blur(np.asarray(image), radius), share=0.05)


def test_solarize():
    image = noise(20, 20)
    pixels = np.asarray(image).astype(int)
    assert np.array_equal(plain(image, solarize=True), np.where(pixels < 128, pixels, 255 - pixels))


def test_steps_are_applied_in_order():
    image = noise(32, 32)
    jitter = (("contrast", 0.7), ("hue", 0.08), ("brightness", 1.3), ("saturation", 0.8))
    steps: list[dict[str, Any]] = [{"flip": True}, *({"jitter": (step,)} for step in jitter)]
    steps += [{"grayscale": True}, {"blur": 1.3}, {"solarize": True}]
    expected = image
    for step in steps:
        expected = Image.fromarray(plain(expected, **step).astype(np.uint8))
    everything = plain(image, flip=True, jitter=jitter, grayscale=True, blur=1.3, solarize=True)
    assert np.array_equal(everything, np.asarray(expected))
    assert not np.array_equal(plain(image, jitter=jitter), plain(image, jitter=jitter[::-1]))


# ---- the drawing half


@pytest.fixture(scope="module")
def draws():
    """N_DRAWS crops of a 2000 x 2000 image per kind."""
    kinds = {"global 1": GLOBAL_1, "global 2": GLOBAL_2, "local": LOCAL}
    return {
        name: [draw_crop(crop_generator(7, 0, i, crop), kind, (2000, 2000)) for i in range(N_DRAWS)]
        for crop, (name, kind) in enumerate(kinds.items())
    }


def assert_frequency(flags, p):
    n = len(flags)
    assert abs(sum(flags) - n * p) <= 4.5 * math.sqrt(n * p * (1 - p))


def assert_uniform(values, low, high, slack=0.0):
    """All in range, and the Kolmogorov-Smirnov statistic below its 1e-5 point."""
    values = np.sort(values)
    assert low - slack <= values[0] and values[-1] <= high + slack
    n = len(values)
    distance = np.abs((values - low) / (high - low) - (np.arange(n) + 0.5) / n).max()
    assert distance < 2.5 / math.sqrt(n) + slack / (high - low)


@pytest.mark.parametrize(
    ("name", "blur", "solarize"), [("global 1", 1.0, 0.0), ("global 2", 0.1, 0.2), ("local", 0.5, 0.0)]
)
def test_frequencies(draws, name, blur, solarize):
    crops = draws[name]
    assert_frequency([c.flip for c in crops], 0.5)
    assert_frequency([bool(c.jitter) for c in crops], 0.8)
    assert_frequency([c.grayscale for c in crops], 0.2)
    assert_frequency([c.blur > 0 for c in crops], blur)
    assert_frequency([c.solarize for c in crops], solarize)
    assert_frequency([c.flip and c.grayscale for c in crops], 0.1)  # independent of each other
    assert_uniform([c.blur for c in crops if c.blur], 0.1, 2.0)


def test_crops_of_an_image_are_independent(draws):
    pairs = zip(draws["global 1"], draws["global 2"], strict=True)
    assert_frequency([a.flip == b.flip for a, b in pairs], 0.5)


@pytest.mark.parametrize("name", ["global 1", "global 2", "local"])
def test_jitter(draws, name):
    jitters = [c.jitter for c in draws[name] if c.jitter]
    for operation, low, high in (
        ("brightness", 0.6, 1.4),
        ("contrast", 0.6, 1.4),
        ("saturation", 0.8, 1.2),
        ("hue", -0.1, 0.1),
    ):
        assert_uniform([dict(jitter)[operation] for jitter in jitters], low, high)
    orders = Counter(tuple(operation for operation, _ in jitter) for jitter in jitters)
    expected = len(jitters) / 24
    assert len(orders) == 24
    assert sum((count - expected) ** 2 / expected for count in orders.values()) < 65  # chi2(23), p = 1e-5


def accepted_boxes(scale, n=60_000):
    """Relative area and log ratio of random boxes of which those that fit into a square are kept."""
    rng = np.random.default_rng(0)
    area, log_ratio = rng.uniform(scale[0], scale[1], n), rng.uniform(math.log(3 / 4), math.log(4 / 3), n)
    fits = np.sqrt(area * np.exp(np.abs(log_ratio))) <= 1
    return area[fits], log_ratio[fits]


def assert_same_distribution(values, expected):
    """Two-sample Kolmogorov-Smirnov statistic below its 1e-5 point."""
    grid = np.concatenate([values, expected])
    below = [np.searchsorted(np.sort(sample), grid, side="right") / len(sample) for sample in (values, expected)]
    assert np.abs(below[0] - below[1]).max() < 2.5 * math.sqrt(1 / len(values) + 1 / len(expected))


@pytest.mark.parametrize(
    ("name", "scale", "size"),
    [("global 1", (0.4, 1.0), 224), ("global 2", (0.4, 1.0), 224), ("local", (0.05, 0.4), 96)],
)
def test_boxes(draws, name, scale, size):
    boxes = np.array([c.box for c in draws[name]])
    w, h = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert {c.size for c in draws[name]} == {size}
    assert boxes.min() >= 0 and boxes.max() <= 2000
    area, log_ratio = accepted_boxes(scale)
    assert_same_distribution(w * h / 2000**2, area)
    assert_same_distribution(np.log(w / h), log_ratio)
    assert_uniform(boxes[:, 0] / (2001 - w), 0, 1, slack=2e-2)
    assert_uniform(boxes[:, 1] / (2001 - h), 0, 1, slack=2e-2)


@pytest.mark.parametrize("kind", [GLOBAL_1, LOCAL])
@pytest.mark.parametrize("size", [(1, 1), (1, 20), (20, 1), (2, 3), (400, 20), (20, 400), (7, 500)])
def test_boxes_of_extreme_images(kind, size):
    for i in range(200):
        left, top, right, bottom = draw_crop(crop_generator(0, 0, i, 0), kind, size).box
        assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]


@pytest.mark.parametrize(
    ("size", "box"),
    [((2000, 100), (933, 0, 1066, 100)), ((100, 2000), (0, 933, 100, 1066)), ((1, 1), (0, 0, 1, 1))],
)
def test_fallback_is_the_central_box(size, box):
    assert {draw_crop(crop_generator(0, 0, i, 0), GLOBAL_1, size).box for i in range(20)} == {box}


# ---- MultiCrop


def test_crops_in_order():
    crops = MultiCrop()(noise(60, 50), (0, 0, 0))
    assert [tuple(c.shape) for c in crops] == [(3, 224, 224)] * 2 + [(3, 96, 96)] * 8
    assert {c.dtype for c in crops} == {torch.float32}
    kinds = MultiCrop(global_crops_scale=(0.14, 1.0), local_crops_number=1, local_crops_size=32).kinds
    assert [(k.size, k.scale, k.blur, k.solarize) for k in kinds] == [
        (224, (0.14, 1.0), 1.0, 0.0),
        (224, (0.14, 1.0), 0.1, 0.2),
        (32, (0.05, 0.4), 0.5, 0.0),
    ]


def test_crops_depend_on_the_key_only():
    image = noise(60, 50)
    multicrop = MultiCrop(global_crops_size=32, local_crops_size=16, local_crops_number=2)
    first = multicrop(image, (3, 4, 5))
    states = random.getstate(), repr(np.random.get_state(legacy=False)), torch.get_rng_state()
    again = multicrop(image, (3, 4, 5))
    assert random.getstate() == states[0] and repr(np.random.get_state(legacy=False)) == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])
    assert all(map(torch.equal, first, again))
    for key in ((2, 4, 5), (3, 3, 5), (3, 4, 6), (4, 3, 5)):
        assert not any(map(torch.equal, first, multicrop(image, key)))
    assert not torch.equal(first[2], first[3])
    globals_only = replace(multicrop, local_crops_number=0)(image, (3, 4, 5))
    assert len(globals_only) == 2 and all(map(torch.equal, first, globals_only))


@pytest.mark.parametrize("size", [(1, 1), (1, 30), (200, 10)])
def test_small_and_thin_images(size):
    image = Image.new("RGB", size, (90, 140, 200))
    for crop in MultiCrop(global_crops_size=32, local_crops_size=16)(image, (0, 0, 0)):
        assert (levels(crop) == levels(crop)[0, 0]).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"global_crops_scale": (0.0, 1.0)}, r"global_crops_scale must be \(low, high\) .* got \(0.0, 1.0\)"),
        ({"local_crops_scale": (0.5, 0.4)}, r"local_crops_scale must be .* <= 1, got \(0.5, 0.4\)"),
        ({"local_crops_number": -1}, "local_crops_number must be at least 0, got -1"),
        ({"global_crops_size": 0}, "global_crops_size must be at least 1, got 0"),
        ({"local_crops_size": 0}, "local_crops_size must be at least 1, got 0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        MultiCrop(**arguments)


def test_image_must_be_rgb():
    with pytest.raises(ValueError, match=r"must have mode RGB, got L: use image.convert\('RGB'\)"):
        MultiCrop()(Image.new("L", (8, 8)), (0, 0, 0))


# ---- evaluation


@pytest.mark.parametrize("size", [224, 96, 33])
@pytest.mark.parametrize("image_size", [(300, 200), (171, 400), (110, 110)])
def test_eval_transform_is_resize_then_center_crop(image_size, size):
    image = noise(*image_size)
    short, (width, height) = round(size * 256 / 224), image_size
    resized = (short, int(short * height / width)) if width <= height else (int(short * width / height), short)
    left, top = (round((side - size) / 2) for side in resized)
    whole = np.asarray(image.resize(resized, Image.Resampling.BICUBIC)).astype(int)
    tensor = eval_transform(image, size)
    assert tensor.shape == (3, size, size)
    assert np.array_equal(levels(tensor), whole[top : top + size, left : left + size])


def test_eval_transform_of_a_long_strip():
    strip = Image.new("RGB", (2_000_000, 1), (255, 0, 0))
    strip.paste((10, 20, 30), (999_990, 0, 1_000_010, 1))
    assert (levels(eval_transform(strip, 224)) == (10, 20, 30)).all()
