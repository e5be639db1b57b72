"""Crops of images that are not 8-bit RGB: against Pillow, against the crops of 8-bit RGB, and against PyTorch's."""

import numpy as np
import pytest
import torch
from dino_train.config.pretrain import PretrainConfig
from PIL import Image
from test_multicrop_triton import crop_row, picture

from dino_kernels import CropKind, PixelScale, draw_crops, multicrop, multicrop_packed
from dino_kernels.ops.crop_deep import crop_deep

SMALL = PretrainConfig(global_crops_size=48, local_crops_size=20, local_crops_number=2).crop_kinds
PLAIN = {"mean": (0.0,), "std": (1.0,)}  # out is level / 255


def deep(height, width, channels, dtype, seed=0):
    """An image of some smooth structure over the range of its dtype, or from -3 to 5."""
    x = np.stack([picture(height, width, seed + c)[..., 0] for c in range(channels)], -1) / 255
    if dtype == np.float32:
        return (8 * x - 3).astype(np.float32)
    return (x * np.iinfo(dtype).max).astype(dtype)


def scale_of(image, **normalization):
    c = image.shape[2]
    low, high = (-3.0, 5.0) if image.dtype == np.float32 else (0.0, float(np.iinfo(image.dtype).max))
    return PixelScale((low,) * c, (high,) * c, *(normalization.get(k, PLAIN[k]) * c for k in ("mean", "std")))


def crop(image, crops, scale, dtype=torch.float32):
    out = [torch.empty(1, image.shape[2], size, size, dtype=dtype) for size in crops["size"][0]]
    multicrop([image], crops, out, scale=scale, threads=1)
    return out


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("channels", [1, 4, 16])
@pytest.mark.parametrize("box, size", [((3, 5, 90, 70), 32), ((0, 0, 4, 7), 24), ((0, 0, 1, 1), 5)])
def test_resize_is_pillows_of_floats(dtype, channels, box, size):
    image = deep(80, 97, channels, dtype)
    scale = scale_of(image)
    (ours,) = crop(image, crop_row(box, size, flip=True), scale)
    levels = (image.astype(np.float64) - scale.low) / (np.array(scale.high) - scale.low) * 255
    for c in range(channels):
        resized = Image.fromarray(levels[..., c].astype(np.float32)).crop(box).resize((size, size), 3)
        expected = np.asarray(resized)[:, ::-1].clip(0, 255) / 255
        np.testing.assert_allclose(ours[0, c], expected, atol=2e-6)


def test_crops_of_the_same_content_are_those_of_8_bit_rgb():
    """But for Pillow's rounding, which cuts off half a level on average in each of the steps."""
    for index in range(12):
        image = picture(90, 120, index)
        drawn = draw_crops(1, 0, index, SMALL, image.shape[:2])[None]
        out = [torch.empty(1, 3, s, s, dtype=torch.uint8) for s in drawn["size"][0]]
        multicrop([image], drawn, out)
        for same in (image.astype(np.uint16) * 257, image.astype(np.float32) / 255 * 8 - 3):
            for ours, levels in zip(crop(same, drawn, scale_of(same)), out, strict=True):
                apart = (ours * 255 - levels).abs()
                assert apart.mean() < 2 and apart.quantile(0.99) < 7 and apart.max() < 16


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_cpp_is_the_formula_in_float64(channels, dtype):
    kinds = SMALL
    if channels != 3:
        kinds = [CropKind(k.size, k.scale, k.blur, 0.0, (0.4, 0.4, 0.0, 0.0), grayscale=0.0) for k in SMALL]
    for index in range(12):
        image = deep(60, 75, channels, dtype, index)
        scale = scale_of(image, mean=(0.3,), std=(0.2,))
        drawn = draw_crops(1, 0, index, kinds, image.shape[:2])[None]
        found = crop(image, drawn, scale)
        expected = [torch.empty_like(view, dtype=torch.float64) for view in found]
        crop_deep([torch.from_numpy(image.astype(np.float64))], drawn, expected, scale)
        for ours, exact in zip(found, expected, strict=True):
            torch.testing.assert_close(ours.double(), exact, atol=2e-4, rtol=0)


def test_packed_and_bfloat16_are_the_same():
    images = [deep(40, 50, 4, np.uint16), deep(33, 21, 4, np.uint16, 4)]
    kinds = [CropKind(16, (0.3, 1.0), 0.5, 0.0, (0.4, 0.4, 0, 0), grayscale=0.0, vertical_flip=0.5, turn=True)] * 2
    crops = np.stack([draw_crops(0, 0, i, kinds, image.shape[:2]) for i, image in enumerate(images)])
    scale = scale_of(images[0])
    types = torch.float32, torch.float32, torch.bfloat16
    one, packed, half = ([torch.empty(2, 4, 16, 16, dtype=dtype) for _ in kinds] for dtype in types)
    multicrop(images, crops, one, scale=scale, threads=2)
    multicrop(images, crops, half, scale=scale)
    places = np.array([(0, 40, 50), (8000, 33, 21)], np.int64)
    pixels = torch.from_numpy(np.concatenate([image.reshape(-1) for image in images]))
    multicrop_packed(pixels, places, crops, packed, scale=scale)
    for a, b, c in zip(one, packed, half, strict=True):
        assert torch.equal(a, b) and torch.equal(a.bfloat16(), c)
    crops["vertical_flip"] = crops["turns"] = 0
    multicrop(images, crops, one, scale=scale)
    crop_deep([torch.from_numpy(image) for image in images], crops, packed, scale)  # as on a GPU
    for a, b in zip(one, packed, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


def test_values_beyond_the_scale_are_cut_off_and_nan_is_black():
    image = np.zeros((4, 4, 1), np.float32)
    image[0, :2] = [[1e30], [np.nan]]
    image[1, :2] = [[-np.inf], [np.inf]]
    (ours,) = crop(image, crop_row((0, 0, 4, 4), 4), PixelScale((-1.0,), (1.0,), (0.0,), (1.0,)))
    expected = torch.full((4, 4), 0.5)
    expected[0, :2], expected[1, :2] = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    torch.testing.assert_close(ours[0, 0], expected, atol=1e-6, rtol=0)


def test_flips_and_turns():
    image = picture(40, 40)
    for flip, vertical, turns in np.ndindex(2, 2, 4):
        row = crop_row((3, 4, 35, 30), 24, flip=flip)
        out, plain = torch.empty(1, 3, 24, 24, dtype=torch.uint8), torch.empty(1, 3, 24, 24, dtype=torch.uint8)
        multicrop([image], row, [plain])
        row["vertical_flip"], row["turns"] = vertical, turns
        multicrop([image], row, [out])
        expected = plain.flip(2) if vertical else plain
        assert torch.equal(out, expected.rot90(turns, (2, 3)))


def test_turns_are_drawn_without_changing_what_else_is_drawn():
    kinds = [CropKind(8, (0.2, 1.0), 0.5, 0.2, vertical_flip=0.5, turn=True)] * 3
    plain = [CropKind(8, (0.2, 1.0), 0.5, 0.2)] * 3
    drawn = np.concatenate([draw_crops(0, 0, i, kinds, (30, 40)) for i in range(200)])
    assert np.bincount(drawn["turns"], minlength=4).min() > 100 and 200 < drawn["vertical_flip"].sum() < 400
    drawn["vertical_flip"] = drawn["turns"] = 0
    assert np.array_equal(drawn, np.concatenate([draw_crops(0, 0, i, plain, (30, 40)) for i in range(200)]))


@pytest.mark.parametrize("change", [{"saturation": 1.1}, {"hue": 0.1}, {"grayscale": True}, {"solarize": True}])
def test_what_is_for_rgb_is_refused_by_name(change):
    row = crop_row((0, 0, 8, 8), 8, jitter=True, brightness=1, contrast=1, **{"saturation": 1, "hue": 0} | change)
    image = deep(8, 8, 4, np.uint16)
    with pytest.raises(ValueError, match="saturation, hue, grayscale and solarize are for RGB, images have 4 channels"):
        crop(image, row, scale_of(image))


def test_errors():
    image, row = deep(8, 8, 2, np.uint16), crop_row((0, 0, 8, 8), 8)
    with pytest.raises(ValueError, match=r"images\[0\] must have shape \[H, W, 3\] .* got \[8, 8, 2\], uint16"):
        crop(image, row, PixelScale())
    with pytest.raises(ValueError, match="uint8 levels are of 8-bit RGB"):
        crop(image, row, scale_of(image), torch.uint8)
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        multicrop([image], row, [torch.empty(1, 2, 8, 8)], scale=scale_of(image), threads=0)
    with pytest.raises(ValueError, match="images must all have one dtype, got float32, uint16"):
        out = [torch.empty(2, 2, 8, 8)]
        multicrop([image, image.astype(np.float32)], np.concatenate([row, row]), out, scale=scale_of(image))
    for low, high, std in (((0,), (0,), (1,)), ((0,), (1,), (0,)), ((0,), (float("nan"),), (1,))):
        with pytest.raises(ValueError, match="must be finite, with low < high and 0 < std"):
            PixelScale(low, high, (0,), std)
    with pytest.raises(ValueError, match="a number for each of 1 to 16 channels"):
        PixelScale((0,) * 17, (1,) * 17, (0,) * 17, (1,) * 17)
