"""Pixels against Pillow, step by step and whole; the draws against the law; what a caller can get wrong."""

import math
import threading
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from bench_multicrop import STEPS, only
from dino_train.common.views import to_tensor
from dino_train.config.pretrain import PretrainConfig
from PIL import Image
from pillow_crops import pillow_levels
from test_multicrop_triton import crop_row, picture

from dino_kernels import CROP, CropKind, draw_crops, multicrop
from dino_kernels._core.native import JITTER

KINDS = PretrainConfig().crop_kinds
SMALL = PretrainConfig(global_crops_size=48, local_crops_size=20, local_crops_number=2).crop_kinds


def ours(image, crops, threads=1):
    """Levels [size, size, 3] of a [1, 1] table."""
    size = int(crops["size"][0, 0])
    out = torch.empty(1, 3, size, size, dtype=torch.uint8)
    multicrop([image], crops, [out], threads=threads)
    return out[0].permute(1, 2, 0).numpy()


def assert_pillows(image, crops):
    assert np.array_equal(ours(image, crops), pillow_levels(Image.fromarray(image), crops[0, 0]))


# --- the pixels --------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", STEPS)
def test_a_step_alone_is_pillows(step):
    for seed in range(6):
        image = picture(90, 120, seed)
        drawn = draw_crops(seed, 0, 0, SMALL, image.shape[:2])
        for crop in only(step, drawn):
            assert_pillows(image, crop.reshape(1, 1))


BOXES = [
    ((1, 1), (0, 0, 1, 1), 7),
    ((1, 30), (3, 0, 30, 1), 16),
    ((30, 1), (0, 5, 1, 30), 16),
    ((20, 400), (0, 0, 400, 20), 32),
    ((400, 20), (0, 0, 20, 400), 32),
    ((9, 9), (2, 3, 5, 5), 50),  # smaller than the output
    ((40, 60), (0, 0, 48, 40), 48),  # as wide as the output
    ((60, 40), (1, 2, 39, 50), 48),  # as high
    ((50, 70), (0, 0, 70, 50), 1),
    ((2, 30_000), (0, 0, 30_000, 2), 3),  # 40,000 taps
    ((300, 411), (7, 9, 400, 290), 224),  # several parts of a row
    ((300, 411), (7, 9, 400, 290), 97),
    ((70, 61), (0, 0, 61, 70), 67),
    ((25, 5000), (0, 0, 5000, 25), 31),
]


@pytest.mark.parametrize(("shape", "box", "size"), BOXES)
@pytest.mark.parametrize("flip", [False, True])
def test_resize_of_any_box(shape, box, size, flip):
    assert_pillows(picture(*shape), crop_row(box, size, flip=flip))


@pytest.mark.parametrize("operation", JITTER)
@pytest.mark.parametrize("end", [0, 1, 2])
@pytest.mark.parametrize("image", [picture(33, 33), np.full((1, 1, 3), 255, np.uint8), np.zeros((5, 5, 3), np.uint8)])
def test_factors_at_their_ends(operation, end, image):
    factor = ((-0.5, 0.5, 0.0) if operation == "hue" else (0.0, 100.0, 1.0))[end]
    factors = {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, operation: factor}
    crops = crop_row((0, 0, *image.shape[1::-1]), len(image), jitter=True, **factors)
    assert_pillows(image, crops)


@pytest.mark.parametrize("radius", [1e-3, 0.1, 1.4, 1.42, 2.0, 2.4])
@pytest.mark.parametrize("side", [1, 2, 3, 4, 5, 40])
def test_blur_of_any_side(radius, side):
    assert_pillows(picture(side, side), crop_row((0, 0, side, side), side, blur=radius))


def test_hue_of_every_color_with_a_zero_or_equal_channels():
    """To hue and saturation this is all that there is: both depend on differences and on the largest alone."""
    a, b = np.mgrid[:256, :256].astype(np.uint8)
    colors = [(a, b, 0 * a), (a, 0 * a, b), (0 * a, a, b), (a, b, b)]
    image = np.stack([np.stack(c, -1) for c in colors]).reshape(512, 512, 3)
    for hue in (-0.1, -0.0039, 0.0, 0.05, 0.1):
        assert_pillows(image, crop_row((0, 0, 512, 512), 512, jitter=True, hue=hue, **dict.fromkeys(JITTER[:3], 1)))


@pytest.mark.parametrize("shape", [(90, 120), (150, 60), (33, 33), (1, 1), (8, 160)])
def test_whole_crops_are_pillows(shape):
    for index in range(10):
        image = picture(*shape, index)
        for crop in draw_crops(1, 0, index, SMALL, shape):
            assert_pillows(image, crop.reshape(1, 1))


def test_pixels_outside_the_box_do_not_contribute():
    image, crops = picture(64, 64), crop_row((13, 9, 50, 41), 16, blur=2.0)
    masked = np.full_like(image, 255)
    masked[9:41, 13:50] = image[9:41, 13:50]
    assert np.array_equal(ours(image, crops), ours(masked, crops))


# --- in and out --------------------------------------------------------------------------------------


def batch(kinds, images, dtype):
    return [torch.full((images, 3, kind.size, kind.size), 7).to(dtype) for kind in kinds]


def crop_batch(images, crops, kinds, dtype=torch.uint8, threads=1):
    out = batch(kinds, len(images), dtype)
    multicrop(images, crops, out, threads=threads)
    return out


@pytest.fixture(scope="module")
def images():
    return [picture(50 + 9 * i, 80 - 7 * i, i) for i in range(5)]


@pytest.fixture(scope="module")
def crops(images):
    return np.stack([draw_crops(0, 0, i, SMALL, image.shape[:2]) for i, image in enumerate(images)])


def test_a_batch_holds_every_image_crop_by_crop(images, crops):
    out = crop_batch(images, crops, SMALL)
    for i, image in enumerate(images):
        for v in range(len(SMALL)):
            assert np.array_equal(out[v][i].permute(1, 2, 0), ours(image, crops[i : i + 1, v : v + 1]))


@pytest.mark.parametrize("threads", [2, 5, None])
def test_threads_change_nothing(images, crops, threads):
    expected = crop_batch(images, crops, SMALL)
    assert all(map(torch.equal, expected, crop_batch(images, crops, SMALL, threads=threads)))


def test_workers_fill_their_rows_at_the_same_time(images, crops):
    out = batch(SMALL, len(images), torch.uint8)

    def work(i):
        for _ in range(20):
            multicrop([images[i]], crops[i : i + 1], [view[i : i + 1] for view in out], threads=1)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(images))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(map(torch.equal, crop_batch(images, crops, SMALL), out))


def test_normalized_outputs(images, crops):
    levels = crop_batch(images, crops, SMALL)
    floats = crop_batch(images, crops, SMALL, torch.float32)
    for view, exact in zip(floats, levels, strict=True):
        for image, pixels in zip(view, exact, strict=True):
            expected = to_tensor(Image.fromarray(pixels.permute(1, 2, 0).numpy()))
            torch.testing.assert_close(image, expected, rtol=0, atol=1e-6)
    for dtype in (torch.bfloat16, torch.float16):
        for view, exact in zip(crop_batch(images, crops, SMALL, dtype), floats, strict=True):
            assert torch.equal(view, exact.to(dtype))


def test_rows_of_any_stride_and_tensors(images, crops):
    wide = [np.pad(image, ((2, 1), (3, 4), (0, 0)))[2:-1, 3:-4] for image in images]
    expected = crop_batch(images, crops, SMALL)
    assert all(map(torch.equal, expected, crop_batch(wide, crops, SMALL)))
    assert all(map(torch.equal, expected, crop_batch([torch.from_numpy(x) for x in images], crops, SMALL)))
    every_other = np.repeat(crops, 2, axis=1)[:, ::2]
    assert all(map(torch.equal, expected, crop_batch(images, every_other, SMALL)))


def test_rows_of_a_batch_with_a_stride(images, crops):
    out = [torch.zeros(len(images), 2, *view.shape[1:], dtype=torch.uint8) for view in batch(SMALL, 1, torch.uint8)]
    multicrop(images, crops, [view[:, 1] for view in out])
    assert all(map(torch.equal, crop_batch(images, crops, SMALL), [view[:, 1].contiguous() for view in out]))
    assert not any(view[:, 0].any() for view in out)


def test_nothing_to_do():
    multicrop([], np.zeros((0, 1), CROP), [torch.empty(0, 3, 4, 4)])
    multicrop([picture(3, 3)], np.zeros((1, 0), CROP), [])


IMAGE, ROW, OUT = picture(10, 12), crop_row((0, 0, 12, 10), 8), torch.zeros(1, 3, 8, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": [IMAGE[0]]}, r"images\[0\] must have shape \[H, W, 3\] .*got \[12, 3\], uint8"),
        ({"images": [IMAGE[:0]]}, r"H, W >= 1 .*got \[0, 12, 3\]"),
        ({"images": [IMAGE.astype(np.float64)]}, r"uint16 or float32, got \[10, 12, 3\], float64"),
        ({"images": [IMAGE[:, ::2]]}, r"pixels of a row of images\[0\] must be adjacent.*got \[36, 6, 1\]"),
        ({"images": [torch.zeros(4, 4, 3, device="meta")]}, r"images\[0\] must be on the CPU, got meta"),
        ({"images": [IMAGE, IMAGE]}, r"crops must be an array of dtype CROP and shape \[2, 1\].*\[1, 1\]"),
        ({"crops": ROW[0]}, r"shape \[1, 1\].*got .*, \[1\]"),
        ({"crops": np.zeros((1, 1))}, r"dtype CROP .*got float64, \[1, 1\]"),
        ({"out": [OUT[0]]}, r"out\[0\] must have shape \[1, 3, size, size\] with size >= 1, got \[3, 8, 8\]"),
        ({"out": [OUT[..., :7]]}, r"got \[1, 3, 8, 7\]"),
        ({"out": [OUT.double()]}, r"all uint8 or all of one of float32.*float64 on cpu in out\[0\]"),
        ({"out": [OUT.to("meta")]}, "must be on cpu.*on meta"),
        ({"out": [OUT.transpose(2, 3)]}, r"out\[0\] must be contiguous but for its first.*strides \[192, 64, 1, 8\]"),
        ({"out": [OUT.clone().requires_grad_()]}, "need no gradient.*requires_grad=True"),
        ({"out": [OUT[:, :, :7, :7].contiguous()]}, r"crops\[0, 0\]: size must be that of the output"),
        ({"crops": crop_row((0, 0, 13, 10), 8)}, r"crops\[0, 0\]: box must be .*inside the image"),
        ({"crops": crop_row((-1, 0, 12, 10), 8)}, "box must be"),
        ({"crops": crop_row((3, 0, 3, 10), 8)}, "box must be"),
        ({"crops": crop_row((0, 4, 12, 3), 8)}, "box must be"),
        ({"crops": crop_row((0, 0, 12, 11), 8)}, "box must be"),
        ({"crops": crop_row((0, 0, 12, 10), 8, contrast=-1)}, r"contrast and saturation must be in \[0, 100\]"),
        ({"crops": crop_row((0, 0, 12, 10), 8, brightness=math.nan)}, r"brightness.* must be in \[0, 100\]"),
        ({"crops": crop_row((0, 0, 12, 10), 8, saturation=math.inf)}, r"saturation must be in \[0, 100\]"),
        ({"crops": crop_row((0, 0, 12, 10), 8, hue=0.6)}, r"hue must be in \[-0.5, 0.5\]"),
        ({"crops": crop_row((0, 0, 12, 10), 8, blur=2.5)}, r"blur must be in \[0, 2.4\]"),
        ({"crops": crop_row((0, 0, 12, 10), 8, order=(0, 1, 1, 3))}, "order must be a permutation of 0, 1, 2, 3"),
        ({"crops": crop_row((0, 0, 12, 10), 8, order=(0, 1, 2, 4))}, "order must be a permutation"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
        ({"threads": -1}, "threads must be at least 1, got -1"),
    ],
)
def test_bad_input(change, message):
    arguments = {"images": [IMAGE], "crops": ROW, "out": [OUT]}
    multicrop(**arguments)
    with pytest.raises(ValueError, match=message):
        multicrop(**{**arguments, **change})


# --- the draws ---------------------------------------------------------------------------------------


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


N_DRAWS = 3000


@pytest.fixture(scope="module")
def draws():
    """N_DRAWS images of 2000 x 2000: [N_DRAWS] of CROP for global 1, global 2 and one local crop."""
    return np.stack([draw_crops(7, 0, i, KINDS[:3], (2000, 2000)) for i in range(N_DRAWS)], axis=1)


@pytest.mark.parametrize("v", [0, 1, 2])
def test_frequencies(draws, v):
    crops, kind = draws[v], KINDS[v]
    assert set(crops["size"]) == {kind.size}
    assert_frequency(crops["flip"], 0.5)
    assert_frequency(crops["jitter"], 0.8)
    assert_frequency(crops["grayscale"], 0.2)
    assert_frequency(crops["blur"] > 0, kind.blur)
    assert_frequency(crops["solarize"], kind.solarize)
    assert_frequency(crops["flip"] & crops["grayscale"], 0.1)  # independent of each other
    assert_uniform(crops["blur"][crops["blur"] > 0], 0.1, 2.0, slack=1e-6)


@pytest.mark.parametrize("v", [0, 1, 2])
def test_jitter(draws, v):
    crops = draws[v][draws[v]["jitter"]]
    for name, low, high in (
        ("brightness", 0.6, 1.4),
        ("contrast", 0.6, 1.4),
        ("saturation", 0.8, 1.2),
        ("hue", -0.1, 0.1),
    ):
        assert_uniform(crops[name], low, high, slack=1e-6)
    orders = Counter(map(tuple, crops["order"].tolist()))
    expected = len(crops) / 24
    assert len(orders) == 24
    assert sum((count - expected) ** 2 / expected for count in orders.values()) < 65  # chi2(23), p = 1e-5


@pytest.mark.parametrize("v", [0, 1, 2])
def test_boxes(draws, v):
    left, top, right, bottom = draws[v]["box"].T
    w, h = right - left, bottom - top
    assert min(left.min(), top.min()) >= 0 and max(right.max(), bottom.max()) <= 2000
    area, log_ratio = accepted_boxes(KINDS[v].scale)
    assert_same_distribution(w * h / 2000**2, area)
    assert_same_distribution(np.log(w / h), log_ratio)
    assert_uniform(left / (2001 - w), 0, 1, slack=2e-2)
    assert_uniform(top / (2001 - h), 0, 1, slack=2e-2)


def test_crops_of_an_image_and_images_are_independent(draws):
    assert_frequency(draws[0]["flip"] == draws[1]["flip"], 0.5)
    assert_frequency(draws[0]["flip"][1:] == draws[0]["flip"][:-1], 0.5)


@pytest.mark.parametrize("shape", [(1, 1), (20, 1), (1, 20), (3, 2), (20, 400), (400, 20), (500, 7)])
def test_boxes_of_extreme_images(shape):
    for i in range(100):
        left, top, right, bottom = draw_crops(0, 0, i, KINDS[:3], shape)["box"].T
        assert (left >= 0).all() and (left < right).all() and (right <= shape[1]).all()
        assert (top >= 0).all() and (top < bottom).all() and (bottom <= shape[0]).all()


@pytest.mark.parametrize(
    ("shape", "box"),
    [((100, 2000), (933, 0, 1066, 100)), ((2000, 100), (0, 933, 100, 1066)), ((1, 1), (0, 0, 1, 1))],
)
def test_fallback_is_the_central_box(shape, box):
    assert {tuple(draw_crops(0, 0, i, KINDS[:1], shape)["box"][0].tolist()) for i in range(20)} == {box}


def test_kinds_of_the_two_recipes():
    config = PretrainConfig(global_crops_scale=(0.14, 1.0), local_crops_number=1, local_crops_size=32)
    assert [(k.size, k.scale, k.blur, k.solarize) for k in config.crop_kinds] == [
        (224, (0.14, 1.0), 1.0, 0.0),
        (224, (0.14, 1.0), 0.1, 0.2),
        (32, (0.05, 0.4), 0.5, 0.0),
    ]
    assert [kind.blur for kind in replace(config, augmentation="dinov2").crop_kinds] == [0.0, 0.9, 0.5]


def test_draws_depend_on_the_key_only():
    first = draw_crops(3, 4, 5, KINDS, (375, 500))
    assert first.shape == (10,) and first.dtype == CROP
    assert np.array_equal(first, draw_crops(3, 4, 5, KINDS, (375, 500)))
    assert np.array_equal(first[:2], draw_crops(3, 4, 5, KINDS[:2], (375, 500)))
    assert len({crop.tobytes() for crop in first}) == 10
    for key in ((2, 4, 5), (3, 3, 5), (3, 4, 6), (4, 3, 5)):
        assert not (first == draw_crops(*key, KINDS, (375, 500))).any()


def test_draws_of_one_key_stay_what_they_are():
    """A resumed run goes on with the crops it would have had, whatever version of numpy draws them."""
    crop = draw_crops(0, 1, 2, KINDS, (375, 500))[2]
    assert crop["box"].tolist() == [358, 0, 448, 106] and crop["order"].tolist() == [1, 0, 2, 3]
    assert crop["brightness"] == pytest.approx(0.6951195, abs=1e-6) and crop["flip"] and not crop["grayscale"]


def test_how_much_colors_vary():
    wide = [
        CropKind(32, (0.4, 1.0), 0.0, 0.0, jitter=jitter) for jitter in ((0.4, 0.4, 0.2, 0.1), (0.8, 0.6, 0.3, 0.2))
    ]
    drawn = np.stack([draw_crops(0, 0, i, [kind], (64, 64)) for i in range(500) for kind in wide]).reshape(500, 2)
    for i, kind in enumerate(wide):
        for name, middle, by in zip(
            ("brightness", "contrast", "saturation", "hue"), (1, 1, 1, 0), kind.jitter, strict=True
        ):
            factors = drawn[name][:, i]
            assert (
                middle - by <= factors.min() < middle - 0.95 * by and middle + 0.95 * by < factors.max() <= middle + by
            )
