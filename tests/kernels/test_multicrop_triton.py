"""multicrop_packed on a GPU, or in Triton's interpreter: the levels of the CPU's multicrop, bit for bit."""

import numpy as np
import pytest
import torch
import triton
from checks import DTYPES, use_backend

from dino_kernels import CROP, CropKind, draw_crops, multicrop, multicrop_packed
from dino_kernels._core.native import JITTER

# Global 1 and 2 and local crops of the reference, but for their sizes
KINDS = [CropKind(40, (0.4, 1), 1.0, 0.0), CropKind(40, (0.4, 1), 0.1, 0.2), *[CropKind(18, (0.05, 0.4), 0.5, 0.0)] * 2]


def picture(height, width, seed=0):
    """Smooth areas, edges and noise, over all levels."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(x / (3 + c) + y / 7) + np.sign(np.sin(x * y / 40 + c)) for c in range(3)], -1)
    return np.clip(128 + 70 * waves + rng.normal(0, 20, waves.shape), 0, 255).astype(np.uint8)


def crop_row(box, size, **fields):
    """[1, 1] of CROP in which every step that is not given is off."""
    crops = np.zeros((1, 1), CROP)
    for name, value in {"box": box, "size": size, "order": range(4), **fields}.items():
        crops[name] = value
    return crops


def packed(images, gap=0):
    """(pixels, places) of images, last one first, with as many bytes between them."""
    parts, places, at = [], [], gap
    for image in reversed(images):
        places.insert(0, (at, *image.shape[:2]))
        parts += [np.full(gap, 7, np.uint8), image.ravel()]
        at += image.size + gap
    return torch.from_numpy(np.concatenate(parts)), np.array(places, np.int64)


def batch(crops, dtype=torch.uint8, device="cpu"):
    return [torch.full((len(crops), 3, size, size), 7).to(device, dtype) for size in crops["size"][0].tolist()]


def assert_same(images, crops, device, dtype=torch.uint8, gap=0):
    expected, out = batch(crops, dtype), batch(crops, dtype, device)
    multicrop(images, crops, expected)
    pixels, places = packed(images, gap)
    multicrop_packed(pixels.to(device), places, crops, out)
    for ours, truth in zip(out, expected, strict=True):
        assert torch.equal(ours.cpu(), truth)


@pytest.fixture
def device(monkeypatch):
    if not torch.cuda.is_available():  # the interpreter takes as long for few pixels as for many
        monkeypatch.setattr("dino_kernels.triton.multicrop._BLOCK", 2048)
    return use_backend(monkeypatch, "multicrop", "triton", ["packed"])


@pytest.fixture(scope="module")
def images():
    return [picture(*shape, seed) for seed, shape in enumerate([(45, 60), (75, 30), (33, 33), (1, 1), (4, 80)])]


@pytest.fixture(scope="module")
def crops(images):
    return np.stack([draw_crops(1, 0, i, KINDS, image.shape[:2]) for i, image in enumerate(images)])


# --- the pixels --------------------------------------------------------------------------------------


def test_drawn_crops_of_any_images(images, crops, device):
    assert_same(images, crops, device, gap=5)


@pytest.mark.parametrize("seed", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_every_step_is_drawn(images, seed, device):
    drawn = np.stack([draw_crops(seed, 0, i, KINDS[1:3], image.shape[:2]) for i, image in enumerate(images)])
    drawn["jitter"] = True
    drawn["blur"] = np.maximum(drawn["blur"], 0.3)
    drawn["solarize"][::2] = True
    assert_same(images, drawn, device)


@pytest.mark.parametrize(
    ("shape", "box", "size"),
    [
        ((1, 1), (0, 0, 1, 1), 7),
        ((1, 30), (3, 0, 30, 1), 16),
        ((30, 1), (0, 5, 1, 30), 16),
        ((9, 9), (2, 3, 5, 5), 50),  # smaller than the output
        ((40, 60), (0, 0, 48, 40), 48),  # as wide as the output
        pytest.param((50, 70), (0, 0, 70, 50), 1, marks=pytest.mark.slow),
        pytest.param((2, 300), (0, 0, 300, 2), 3, marks=pytest.mark.slow),  # 401 taps
        ((120, 151), (7, 9, 140, 110), 97),  # several blocks of pixels
        pytest.param((5, 1000), (0, 0, 1000, 5), 31, marks=pytest.mark.slow),
        pytest.param((1000, 5), (0, 0, 5, 1000), 31, marks=pytest.mark.slow),
    ],
)
def test_resize_of_any_box(shape, box, size, device):
    crops = np.concatenate([crop_row(box, size, flip=flip) for flip in (False, True)])
    assert_same([picture(*shape)] * 2, crops, device)


@pytest.mark.parametrize("operation", JITTER)
def test_factors_at_their_ends(operation, device):
    images = [picture(19, 19), np.full((19, 19, 3), 255, np.uint8), np.zeros((19, 19, 3), np.uint8)]
    ends = (-0.5, 0.5, 0.0) if operation == "hue" else (0.0, 100.0, 1.0)
    rows = []
    for end in ends:
        factors = {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, operation: end}
        rows.append(crop_row((0, 0, 19, 19), 19, jitter=True, order=(3, 2, 1, 0), **factors))
    assert_same(images, np.repeat(np.concatenate(rows, axis=1), 3, axis=0), device)


@pytest.mark.parametrize("side", [1, 2, 3, 5, 21])
def test_blur_of_any_side(side, device):
    radii = (1e-3, 0.1, 1.4, 1.42, 2.0, 2.4)
    rows = [crop_row((0, 0, side, side), side, blur=radius, solarize=radius > 1) for radius in radii]
    assert_same([picture(side, side)], np.concatenate(rows, axis=1), device)


def test_the_boxes_of_any_blur():
    """Those of the CPU for many radii: one more of a row's weight would be seen on this edge."""
    from dino_kernels.triton.multicrop import _boxes

    radii = np.float32(np.linspace(0, 2.4, 4001))
    radius, whole, part = (x.astype(np.uint64) for x in _boxes(radii))
    assert (whole * (2 * radius + 1) + 2 * part <= 1 << 24).all() and set(radius) == {0, 1}
    edge = np.zeros((1, 5, 3), np.uint8)
    edge[:, 2:] = (85, 170, 255)
    edge = np.repeat(edge, 5, axis=0)
    crops = np.concatenate([crop_row((0, 0, 5, 5), 5, blur=r) for r in radii[1:]], axis=1)
    out = batch(crops)
    multicrop([edge], crops, out)
    x = np.broadcast_to(edge.transpose(2, 0, 1), (len(radii), 3, 5, 5)).astype(np.uint64)
    radius, whole, part = (value[:, None, None, None] for value in (radius, whole, part))
    for axis in (3, 3, 3, 2, 2, 2):

        def at(distance, x=x, axis=axis):
            return x.take(np.clip(np.arange(5) + distance, 0, 4), axis)

        inner = x + np.where(radius == 1, at(-1) + at(1), 0)
        outer = np.where(radius == 1, at(-2) + at(2), at(-1) + at(1))
        x = (inner * whole + outer * part + (1 << 23)) >> np.uint64(24)
    assert np.array_equal(x[1:], np.concatenate([view.numpy() for view in out]))


def test_hue_of_many_colors(device):
    colors = np.random.default_rng(0).integers(0, 256, (70, 70, 3)).astype(np.uint8)
    colors[:20] = colors[:20] // 64 * 85  # with equal channels
    ones = dict.fromkeys(JITTER[:3], 1)
    shifts = (-0.1, -0.0039, 0.0, 0.05, 0.1)
    rows = [crop_row((0, 0, 70, 70), 70, jitter=True, hue=hue, **ones) for hue in shifts]
    assert_same([colors], np.concatenate(rows, axis=1), device)


@pytest.mark.parametrize("dtype", DTYPES)
def test_normalized_outputs(images, crops, dtype, device):
    if dtype != torch.bfloat16 or not triton.knobs.runtime.interpret:
        return assert_same(images[:3], crops[:3], device, dtype)
    floats, out = batch(crops[:3], torch.float32), batch(crops[:3], dtype)
    multicrop(images[:3], crops[:3], floats)
    multicrop_packed(*packed(images[:3]), crops[:3], out)
    for ours, exact in zip(out, floats, strict=True):  # the interpreter cuts bfloat16 off where all else rounds
        assert torch.equal(ours.float(), (exact.view(torch.int32) & -(1 << 16)).view(torch.float32))


# --- in and out --------------------------------------------------------------------------------------


def test_rows_of_a_batch_with_a_stride(images, crops, device):
    expected = batch(crops)
    multicrop(images, crops, expected)
    wide = [torch.zeros(len(images), 2, *view.shape[1:], dtype=torch.uint8, device=device) for view in expected]
    pixels, places = packed(images)
    every_other = np.repeat(crops, 2, axis=1)[:, ::2]
    multicrop_packed(pixels.to(device), places, every_other, [view[:, 1] for view in wide])
    assert all(torch.equal(view[:, 1].cpu(), truth) for view, truth in zip(wide, expected, strict=True))
    assert not any(view[:, 0].any() for view in wide)


def test_on_the_cpu_it_is_multicrop(images, crops):
    assert_same(images, crops, "cpu", gap=3)
    assert_same(images, crops, "cpu", torch.bfloat16)


def test_nothing_to_do(device):
    pixels, none = torch.zeros(3, dtype=torch.uint8, device=device), np.zeros((0, 3), np.int64)
    multicrop_packed(pixels, none, np.zeros((0, 1), CROP), [torch.empty(0, 3, 4, 4, device=device)])
    multicrop_packed(pixels, np.array([[0, 1, 1]]), np.zeros((1, 0), CROP), [])


@pytest.mark.gpu
def test_it_never_waits_and_repeats_on_any_stream():
    kinds = [CropKind(224, (0.4, 1), 1.0, 0.2)] * 2 + [CropKind(96, (0.05, 0.4), 0.5, 0.0)] * 8
    images = [picture(375, 500, i) for i in range(4)]
    crops = np.stack([draw_crops(0, 0, i, kinds, (375, 500)) for i in range(4)])
    expected, (pixels, places) = batch(crops, torch.bfloat16), packed(images)
    multicrop(images, crops, expected)
    pinned, stream = pixels.pin_memory(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            out = batch(crops, torch.bfloat16, "cuda")
            stream.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                multicrop_packed(pinned.to("cuda", non_blocking=True), places, crops, out)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            assert all(torch.equal(ours.cpu(), truth) for ours, truth in zip(out, expected, strict=True))


PIXELS, PLACES = packed([picture(10, 12)])
ROW, OUT = crop_row((0, 0, 12, 10), 8), torch.zeros(1, 3, 8, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pixels": PIXELS[None]}, r"pixels must have shape \[P\], dtype uint8.*got \[1, 360\]"),
        ({"pixels": PIXELS.double()}, r"dtype uint8, .*got \[360\], torch.float64"),
        ({"pixels": PIXELS.repeat(2)[::2]}, r"be contiguous, got .*strides \[2\]"),
        ({"pixels": PIXELS.to("meta")}, "pixels must be on the CPU or a GPU, got meta"),
        ({"places": PLACES[0]}, r"places must be an int64 array \[N, 3\] .*got int64, \[3\]"),
        ({"places": PLACES.astype(np.int32)}, r"got int32, \[1, 3\]"),
        ({"places": torch.from_numpy(PLACES)}, r"got torch.int64, \[1, 3\]"),
        (
            {"places": PLACES + [1, 0, 0]},
            r"image 0 must .* inside the 360 values of pixels, got a first value of 1, hei",
        ),
        ({"places": PLACES - [1, 0, 0]}, "first value of -1"),
        ({"places": PLACES * [1, 0, 1]}, "height and width >= 1.*height 0 and width 12"),
        ({"crops": ROW[0]}, r"crops must be an array of dtype CROP and shape \[1, 1\]"),
        ({"out": [OUT.to("meta")]}, "out must be on cpu.*on meta"),
        ({"out": [OUT.double()]}, r"all uint8 or all of one of float32.*float64 on cpu in out\[0\]"),
        ({"crops": crop_row((0, 0, 13, 10), 8)}, r"crops\[0, 0\]: box must be .*inside the image"),
        ({"crops": crop_row((0, 0, 12, 10), 9)}, r"crops\[0, 0\]: size must be that of the output"),
        ({"crops": crop_row((0, 0, 12, 10), 8, blur=2.5)}, r"blur must be in \[0, 2.4\]"),
    ],
)
def test_bad_input(change, message):
    arguments = {"pixels": PIXELS, "places": PLACES, "crops": ROW, "out": [OUT]}
    multicrop_packed(**arguments)
    with pytest.raises(ValueError, match=message):
        multicrop_packed(**{**arguments, **change})


def test_a_box_of_too_many_rows(device):
    rows = (1 << 31) // (3 * 100) + 1
    pixels = torch.zeros(3 * rows, dtype=torch.uint8, device=device)
    with pytest.raises(ValueError, match="100 pixels needs a box of less than 7158278 rows on a GPU"):
        multicrop_packed(
            pixels, np.array([[0, rows, 1]]), crop_row((0, 0, 1, rows), 100), [torch.zeros(1, 3, 100, 100).to(device)]
        )
