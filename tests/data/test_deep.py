"""Images of other channels and depths than 8-bit RGB: as files, in a run, and in everything that follows it."""

import io
import json
import logging

import imagecodecs
import numpy as np
import onnxruntime
import pytest
import tifffile
import torch
from dino_train import load_backbone
from dino_train.cli import main
from dino_train.common.scale import IMAGENET_MEAN, IMAGENET_STD, pixel_scale
from dino_train.common.views import eval_transform, levels_of
from dino_train.config.pretrain import PretrainConfig
from dino_train.data import deep
from dino_train.data.decode import decode
from dino_train.data.deep import decode_deep
from dino_train.data.folder import DataError, ImageFolder
from dino_train.data.stats import channels_of, is_deep, measure, sampled, suited
from dino_train.engine.train import pretrain
from dino_train.evaluate.protocol import Protocol
from dino_train.models.weights import Trained, load_trained
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage

RNG = np.random.default_rng(0)
BANDS = RNG.integers(500, 9000, (20, 24, 4), np.uint16)
EIGHT = (BANDS >> 5).astype(np.uint8)
GRAY = RNG.integers(0, 4096, (20, 24), np.uint16)


def picture(height, width, seed=0):
    """Smooth colors: uint8 [height, width, 3]."""
    colors = np.random.default_rng(seed).integers(0, 256, (4, 4, 3)).astype(np.uint8)
    return np.asarray(Image.fromarray(colors).resize((width, height), Image.Resampling.BICUBIC))


def tiff(values, **options):
    file = io.BytesIO()
    tifffile.imwrite(file, values, **options)
    return file.getvalue()


def pillow(image, form):
    file = io.BytesIO()
    image.save(file, form)
    return file.getvalue()


def npy(values):
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


def dicom(values, photometric="MONOCHROME2", intercept=0):
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = SecondaryCaptureImageStorage, ExplicitVRLittleEndian
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    image = FileDataset(None, {}, file_meta=meta, preamble=bytes(128))
    image.Rows, image.Columns, image.SamplesPerPixel, image.PixelRepresentation = *values.shape, 1, 0
    image.BitsAllocated, image.BitsStored, image.HighBit = 16, 12, 11
    image.PhotometricInterpretation, image.RescaleSlope, image.RescaleIntercept = photometric, 2, intercept
    image.PixelData = values.tobytes()
    file = io.BytesIO()
    image.save_as(file, enforce_file_format=True)
    return file.getvalue()


@pytest.mark.parametrize(
    "data, expected",
    [
        (tiff(BANDS, photometric="minisblack", planarconfig="contig"), BANDS),
        (tiff(BANDS.transpose(2, 0, 1), photometric="minisblack", planarconfig="separate"), BANDS),
        (tiff(BANDS.transpose(2, 0, 1), photometric="minisblack"), BANDS),  # a page a band
        (tiff(BANDS, photometric="minisblack", planarconfig="contig", compression="lzw", predictor=True), BANDS),
        (tiff(EIGHT, photometric="rgb", extrasamples=[0]), EIGHT),  # red, green, blue, infrared
        (tiff(EIGHT.transpose(2, 0, 1), photometric="minisblack"), EIGHT),
        (tiff(EIGHT[..., 0].astype(np.int8)), EIGHT[..., :1].astype(np.int8).astype(np.float32)),
        (tiff(BANDS.astype(np.float32) / 7, photometric="minisblack", planarconfig="contig"), BANDS.astype("f4") / 7),
        (tiff(BANDS.astype(np.int16), photometric="minisblack", planarconfig="contig"), BANDS.astype(np.float32)),
        (tiff(BANDS[..., :3].transpose(2, 0, 1), photometric="rgb", planarconfig="separate"), BANDS[..., :3]),
        (tiff(GRAY), GRAY[..., None]),
        (pillow(Image.fromarray(GRAY), "PNG"), GRAY[..., None]),
        (pillow(Image.fromarray(GRAY.astype(np.float32)), "TIFF"), GRAY.astype(np.float32)[..., None]),
        (pillow(Image.fromarray((BANDS >> 8).astype(np.uint8)), "PNG"), (BANDS >> 8).astype(np.uint8)),
        (npy(BANDS), BANDS),
        (npy(BANDS.transpose(2, 0, 1)), BANDS),
        (npy(GRAY.astype(np.float64)), GRAY.astype(np.float32)[..., None]),
        (tiff(GRAY, photometric="miniswhite"), 65535 - GRAY[..., None]),
        (npy(GRAY > 9), ((GRAY > 9) * 255).astype(np.uint8)[..., None]),
        (dicom(GRAY, intercept=-1024), (2.0 * GRAY - 1024).astype(np.float32)[..., None]),
        (dicom(GRAY, "MONOCHROME1"), (-2.0 * GRAY).astype(np.float32)[..., None]),
    ],
)
def test_files_keep_their_values(data, expected):
    values = decode_deep(data, expected.shape[2])
    assert values.dtype == expected.dtype and np.array_equal(values, expected) and values.flags.c_contiguous


def test_channels_are_converted_where_that_is_plain():
    rgb = BANDS[..., :3]
    assert np.array_equal(decode_deep(npy(GRAY), 3), np.stack([GRAY] * 3, -1))
    assert np.array_equal(decode_deep(npy(BANDS), 3), rgb)
    assert np.array_equal(decode_deep(npy(rgb), 1)[..., 0], np.rint(rgb @ [0.299, 0.587, 0.114]))
    with pytest.raises(ValueError, match="the image has 4 channels, expected 5"):
        decode_deep(npy(BANDS), 5)
    with pytest.raises(ValueError, match=r"it has no pixels, shape \[0, 4\]"):
        decode_deep(npy(np.zeros((0, 4))), 1)
    with pytest.raises(ValueError, match="allow_pickle"):
        decode_deep(npy(np.array([object()])), 1)
    with pytest.raises(ValueError, match="empty file"):
        decode_deep(b"", 1)
    with pytest.raises(ValueError, match="expected real numbers, got complex64"):
        decode_deep(tiff(GRAY.astype(np.complex64)), 1)
    with pytest.raises(ValueError, match=r"expected numbers \[H, W\] or \[H, W, C\], got float64 \[2\]"):
        decode_deep(npy(np.zeros(2)), 1)


def test_a_single_image_of_more_bits_is_stretched_and_never_black():
    rgb = np.ascontiguousarray(BANDS[..., :3])
    for data in (npy(rgb), tiff(rgb, photometric="rgb"), imagecodecs.png_encode(rgb)):
        expected = np.round((rgb - float(rgb.min())) * (255 / float(rgb.max() - rgb.min())))
        assert np.array_equal(decode(data), expected.astype(np.uint8))
    assert np.array_equal(decode(npy(rgb.astype(np.uint8))), rgb.astype(np.uint8))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_of_a_tiff(orientation):
    deep = tiff(GRAY, extratags=[(274, 3, 1, orientation, True)])
    plain = tiff((GRAY >> 4).astype(np.uint8), extratags=[(274, 3, 1, orientation, True)])  # turned by Pillow
    assert np.array_equal(decode_deep(deep, 1)[..., 0] >> 4, decode(plain)[..., 0])


def test_missing_packages_are_named(monkeypatch, tmp_path):
    color = pillow(Image.fromarray(np.zeros((2, 2, 3), np.uint8)), "PNG")
    monkeypatch.setattr(deep, "_optional", lambda name: None)
    with pytest.raises(ValueError, match="a PNG of several channels of 16 bits needs .*: pip install imagecodecs"):
        decode_deep(color[:24] + b"\x10" + color[25:], 3)
    with pytest.raises(ValueError, match="DICOM needs .*: pip install pydicom"):
        decode_deep(dicom(GRAY), 1)
    assert np.array_equal(decode_deep(pillow(Image.fromarray(GRAY), "TIFF"), 1)[..., 0], GRAY)  # by Pillow
    folder_of(tmp_path, [BANDS[..., :3]] * 4)
    with pytest.raises(DataError, match="a/000.tif: a TIFF of several pages, .*: pip install tifffile"):
        is_deep(ImageFolder(tmp_path))
    (tmp_path / "a/000.tif").write_bytes(tiff(np.stack([GRAY] * 2)))
    with pytest.raises(DataError, match="a/000.tif: a TIFF of several pages, .*: pip install tifffile"):
        is_deep(ImageFolder(tmp_path))


def test_a_tiff_whose_pages_form_a_circle_is_an_error():
    data = bytearray(tiff(GRAY))
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        first, tags = file.pages[0].offset, len(file.pages[0].tags)
    following = first + 2 + 12 * tags  # the place of the next page
    data[following : following + 4] = first.to_bytes(4, "little")
    with pytest.raises(ValueError, match="its pages form a circle"):
        decode_deep(bytes(data), 1)


def folder_of(root, images, suffix=".tif"):
    """Two classes of TIFFs or .npy files."""
    for i, image in enumerate(images):
        path = root / "ab"[i % 2] / f"{i:03d}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        photometric = "rgb" if image.shape[2:] == (3,) else "minisblack"
        path.write_bytes(npy(image) if suffix == ".npy" else tiff(image, photometric=photometric))
    return root


def test_stats(tmp_path):
    images = [RNG.integers(100, 3100, (40, 50, 2)).astype(np.uint16) for _ in range(10)]
    for image in images:
        image[:20, :, 0] = 65535  # missing data
        image[0, 0, 1] = 60000  # a hot pixel
    images[3] = images[1]
    folder = ImageFolder(folder_of(tmp_path, images, ".npy"))
    (tmp_path / "a/000.npy").write_bytes(b"\x93NUMPY")
    stats = measure(folder, 2, num_workers=2)
    low, high = stats.value_range[::2], stats.value_range[1::2]
    assert max(low) < 110 and min(high) > 3090 and max(high) < 3101 and stats.nodata == (65535, None)
    assert stats.mean[1] == pytest.approx(0.5, abs=0.02) and stats.std[1] == pytest.approx(12**-0.5, abs=0.02)
    assert list(stats.unreadable) == ["a/000.npy"] and stats.duplicates == [["b/001.npy", "b/003.npy"]]
    assert (stats.smallest, stats.images, stats.dtypes) == ((40, 50), 9, {"uint16": 9})


def test_stats_see_the_whole_of_an_image_and_survive_what_is_not_finite(tmp_path):
    framed = RNG.integers(5000, 60000, (1024, 1024, 1)).astype(np.float32)
    framed[:, :40] = framed[:, -40:] = 0
    black = np.full((8, 8, 1), np.nan, np.float32)
    infinite = np.array([[1, np.inf], [-np.inf, 6000]], np.float32)
    stats = measure(ImageFolder(folder_of(tmp_path, [framed, black, infinite, framed[:9]], ".npy")), 1, 1)
    assert stats.value_range[0] == 0 and 59000 < stats.value_range[1] <= stats.maximum[0] < 60000
    two = [np.array([[0, 1], [1, 0]], np.uint16)] * 4
    assert measure(ImageFolder(folder_of(tmp_path / "two", two, ".npy")), 1, 1).value_range == (0, 1)


def test_what_makes_images_nearly_black_is_warned_of(tmp_path, caplog):
    few = ImageFolder(folder_of(tmp_path / "few", [(GRAY >> 8) << 8] * 3))  # 16 levels
    assert sampled(few, 3, 1).levels == 16
    assert "few: only 16 different values: were the images converted to fewer bits?" in caplog.text
    folder_of(tmp_path / "mixed/a", [GRAY] * 3)
    mixed = ImageFolder(folder_of(tmp_path / "mixed/b", [picture(24, 24)] * 3).parent)
    sampled(mixed, 3, 1)
    assert "mixed: the range is one of all types: those of fewer bits may be nearly black" in caplog.text
    eight = ImageFolder(folder_of(tmp_path / "eight", [picture(24, 24)] * 3))
    assert suited(eight, few_bits := pixel_scale(1, (0, 4095)), 1) is few_bits
    assert "eight: images of 8 bits, and the network knows values up to 4095" in caplog.text


def test_the_file_of_stats_is_what_pretrain_takes(tmp_path, capsys):
    data, out = folder_of(tmp_path / "data", [BANDS] * 40, ".npy"), tmp_path / "stats.json"
    assert main(["stats", "--data", str(data), "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "40 images of 24 x 20 pixels, 4 channels, uint16" in shown and "groups that look the same: a/000" in shown
    words = ["--preset", "demo", "--data", str(data), "--output-dir", str(tmp_path / "run"), "--epochs", "1"]
    words += ["--batch-size-per-gpu", "8", "--stats", str(out)]
    assert main(["pretrain", *words]) == 0
    settings, stats = (json.loads(path.read_text()) for path in (tmp_path / "run/config.json", out))
    assert all(settings[name] == stats[name] for name in ("channels", "value_range", "mean", "std"))
    assert main(["pack", "--data", str(data), "--out", str(tmp_path / "x.tar")]) == 1
    assert "pack writes JPEGs of 8 bits, and" in capsys.readouterr().err
    (tmp_path / "other.json").write_text("{}")
    assert main(["pretrain", "--stats", str(tmp_path / "other.json")]) == 1
    assert "other.json has no channels: expected a file of dino-train stats" in capsys.readouterr().err


CONFIG = {"arch": "vit_nano", "patch_size": 4, "out_dim": 32, "head_hidden_dim": 16, "head_bottleneck_dim": 8}
CONFIG |= {"global_crops_size": 16, "local_crops_size": 8, "local_crops_number": 1, "epochs": 1, "warmup_epochs": 0}
CONFIG |= {"batch_size_per_gpu": 8, "knn_freq": 1, "num_workers": 2, "drop_path_rate": 0.0}


def test_16_bit_rgb_is_trained_on_as_8_bit_rgb_of_the_same_content(tmp_path):
    """With the range and normalization of 8-bit RGB, and with augmentations whose rounding differs the least."""
    eight = [picture(24, 24, seed) for seed in range(40)]
    features = []
    for name, images in (("rgb8", eight), ("rgb16", [image.astype(np.uint16) * 257 for image in eight])):
        folder = folder_of(tmp_path / name, images)
        values = {}
        if name == "rgb16":
            values = {"value_range": (0.0, 65535.0), "mean": IMAGENET_MEAN, "std": IMAGENET_STD}
        plain = {"jitter_probability": 0.0, "blur": (0.0,) * 3}
        config = PretrainConfig(**CONFIG, **values, **plain, data=str(folder), output_dir=tmp_path / f"run-{name}")
        pretrain(config)
        backbone = load_backbone(config.output_dir)
        pixels = backbone.transform(images[0] if values else Image.fromarray(images[0]))
        features.append((pixels, backbone(pixels[None])))
    torch.testing.assert_close(*(pixels for pixels, _ in features), atol=0.02, rtol=0)
    torch.testing.assert_close(*(values for _, values in features), atol=0.05, rtol=0)


@pytest.mark.parametrize("channels, high", [(4, 9000), pytest.param(1, 4095, marks=pytest.mark.slow)])
def test_everything_after_pretraining_takes_the_same_images(tmp_path, caplog, capsys, channels, high):
    images = [
        (picture(24, 24, seed)[..., :1].repeat(channels, 2) * (high / 255)).astype(np.uint16) for seed in range(40)
    ]
    data, run = folder_of(tmp_path / "data", images, ".npy"), tmp_path / "run"
    caplog.set_level(logging.WARNING)
    pretrain(PretrainConfig(**CONFIG, channels=channels, data=str(data), output_dir=run, turn=True, vertical_flip=0.5))
    assert "values of uint16, by 38 of the images scaled from" in caplog.text
    out = tmp_path / "features.npz"
    for command in (
        ["evaluate", "knn", "--checkpoint", str(run)],
        ["evaluate", "attention", "--checkpoint", str(run)],
        ["evaluate", "report", "--run", str(run)],
        ["evaluate", "finetune", "--checkpoint", str(run), "--epochs", "1", "--batch-size", "8"],
        ["embed", "--checkpoint", str(run), "--out", str(out), "--neighbors", "2"],
        ["export", "--checkpoint", str(run), "--output", str(tmp_path / "x.safetensors")],
        ["export", "--checkpoint", str(run), "--format", "onnx", "--output", str(tmp_path / "x.onnx")],
    ):
        assert main(command) == 0, capsys.readouterr().err
    backbone, found, again_scale = load_backbone(run), np.load(out), load_trained(run).scale
    pixels = backbone.transform(images[7])[None]
    of_image = backbone(pixels)[0].detach().numpy()
    np.testing.assert_allclose(found["values"][found["paths"] == "b/007.npy"][0], of_image, atol=1e-5)
    session = onnxruntime.InferenceSession(tmp_path / "x.onnx")
    np.testing.assert_allclose(session.run(["features"], {"images": pixels.numpy()})[0][0], of_image, atol=1e-4)
    again = load_backbone(tmp_path / "x.safetensors")  # with the range and normalization
    assert torch.equal(again.transform(images[7])[None], pixels) and torch.equal(again(pixels), backbone(pixels))
    assert load_trained(run / "finetune").scale == load_trained(run).scale
    # Other images do not change what a resumed run has measured.
    folder_of(data, [image * 2 for image in images], ".npy")
    pretrain(PretrainConfig(**CONFIG | {"epochs": 2}, channels=channels, data=str(data), output_dir=run, resume=True))
    assert load_trained(run).scale == again_scale
    protocol = Protocol(checkpoint=run)  # of which some have images of their own
    with pytest.raises(ValueError, match="this protocol is of 8-bit RGB images, and .*run was trained on others"):
        protocol.require_rgb(protocol.load())


def test_a_backbone_of_8_bit_rgb_sees_12_bit_images_in_their_own_range(tmp_path, caplog):
    eight = [picture(24, 24, seed) for seed in range(40)]
    config = PretrainConfig(**CONFIG, data=str(folder_of(tmp_path / "rgb8", eight)), output_dir=tmp_path / "run")
    pretrain(config)
    twelve = folder_of(tmp_path / "gray12", [image[..., 0].astype(np.uint16) * 16 for image in eight])
    out = [tmp_path / f"{name}.npz" for name in ("a", "b")]
    same = folder_of(tmp_path / "gray8", [image[..., 0] for image in eight])
    for data, file in ((twelve, out[0]), (same, out[1])):
        assert main(["embed", "--checkpoint", str(tmp_path / "run"), "--data", str(data), "--out", str(file)]) == 0
    assert "gray12: values of uint16" in caplog.text and "gray8: values" not in caplog.text
    a, b = (np.load(file)["values"] for file in out)
    np.testing.assert_allclose(a, b, atol=0.1)


def test_the_transform_of_a_backbone_takes_what_people_have():
    gray, color = picture(24, 24)[..., 0], picture(24, 24)
    rgb, one = (Trained(torch.nn.Identity(), "teacher", "x", 4, 16, None, pixel_scale(n)) for n in (3, 1))
    expected = eval_transform(Image.fromarray(color), 16)
    for same in (color, np.dstack([color, gray]), Image.fromarray(np.dstack([color, gray])), color.astype(np.float32)):
        torch.testing.assert_close(rgb.transform(same), expected, atol=0.02, rtol=0)
    repeated = eval_transform(Image.fromarray(gray).convert("RGB"), 16)
    for same in (gray, Image.fromarray(gray), Image.fromarray(gray).convert("P"), Image.fromarray(gray).convert("LA")):
        assert torch.equal(rgb.transform(same), repeated)
        assert one.transform(same).shape == (1, 16, 16)
    luma = one.transform(Image.fromarray(color).convert("L"))
    torch.testing.assert_close(one.transform(Image.fromarray(color)), luma, atol=0.03, rtol=0)
    with pytest.raises(ValueError, match="the image has 5 channels, expected 3"):
        rgb.transform(np.zeros((4, 4, 5)))
    with pytest.raises(ValueError, match=r"an image must be numbers .*, got complex128 \[4, 4, 1\]"):
        one.transform(np.zeros((4, 4), complex))


def test_views_of_levels_are_those_of_8_bit_images():
    for shape in ((30, 41), (9, 80)):
        image = picture(*shape)
        scale = pixel_scale(3, (0, 65535))
        view = levels_of(image.astype(np.uint16) * 257, scale)
        expected = eval_transform(Image.fromarray(image), 16)
        torch.testing.assert_close(eval_transform(view, 16, scale), expected, atol=1.01 / 255 / 0.224, rtol=0)


def test_only_deep_images_are_measured(tmp_path, caplog):
    color = picture(24, 24)
    alpha = pillow(Image.fromarray(np.dstack([color, color[..., 0]])), "PNG")
    assert not is_deep(ImageFolder(folder_of(tmp_path / "a", [color] * 3)))
    (tmp_path / "a/a/x.png").write_bytes(alpha)
    assert sampled(ImageFolder(tmp_path / "a"), 3, 1) is None and not caplog.messages
    assert is_deep(ImageFolder(folder_of(tmp_path / "b", [GRAY] * 3)))


def test_pages_and_channels_that_rgb_has_no_place_for_are_counted(tmp_path, caplog):
    film = io.BytesIO()
    Image.fromarray(picture(8, 8)).save(film, "GIF", save_all=True, append_images=[Image.fromarray(picture(8, 8, 1))])
    files = {"film.gif": film.getvalue(), "pages.tif": tiff(np.stack([EIGHT[..., 0]] * 2))}
    files |= {
        "bands8.tif": tiff(EIGHT, photometric="rgb", extrasamples=[0]),
        "one.png": pillow(Image.new("L", (8, 8)), "PNG"),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    assert not is_deep(ImageFolder(tmp_path))
    assert [message.partition("looked at, ")[2] for message in caplog.messages] == [
        "2 have several pages or frames, of which the first is used",
        "1 have a fourth channel, which is left out (pretrain --channels 4 takes it)",
    ]
    caplog.clear()
    assert is_deep(ImageFolder(folder_of(tmp_path / "b", [BANDS] * 3, ".npy")))
    assert "of 3 images looked at, 3 have a fourth channel" in caplog.text
    assert is_deep(ImageFolder(folder_of(tmp_path / "c", [np.dstack([BANDS, BANDS])] * 3, ".npy")))
    assert "3 have 8 channels (pretrain --channels 8 takes them)" in caplog.text


def test_channels_are_those_of_most_images_and_of_gray_and_rgb_three(tmp_path):
    gray, color = picture(8, 8)[..., 0], picture(8, 8)
    for name, images, channels in (
        ("gray", [gray] * 3, 1),
        ("mixed", [gray] * 3 + [color], 3),
        ("one", [gray] + [color] * 3, 3),
        ("bands", [BANDS] * 3 + [BANDS[..., 0]], 4),
    ):
        for i, image in enumerate(images):
            path = tmp_path / name / f"{i}.npy"
            path.parent.mkdir(exist_ok=True)
            np.save(path, image)
        assert channels_of(ImageFolder(tmp_path / name)) == channels


@pytest.mark.parametrize("words", [["stats", "--channels", "0"], ["stats", "--channels", "17"]])
def test_other_numbers_of_channels_are_refused(tmp_path, capsys, words):
    assert main([*words, "--data", str(tmp_path), "--out", str(tmp_path / "x.json")]) == 1
    assert "channels must be from 1 to 16, got" in capsys.readouterr().err


@pytest.mark.parametrize(
    "values, message",
    [
        ({"channels": 4, "grayscale": 0.2}, "grayscale must be 0: it is for RGB, and channels is 4"),
        ({"channels": 4, "solarize": (0, 0.2, 0)}, "solarize must be 0: it is for RGB"),
        ({"channels": 4, "jitter": (0.4, 0.4, 0.2, 0)}, "jitter of saturation and hue must be 0: it is for RGB"),
        ({"channels": 17}, "channels must be from 1 to 16, got 17"),
        ({"channels": 2, "mean": (0.5, 0.5, 0.5)}, "mean must have 1 or 2 values for these channels, got 3"),
        ({"value_range": (5.0, 5.0)}, "low < high"),
        ({"blur": (0.5,)}, "blur must be 3 in"),
        ({"flip": 1.5}, "flip must be from 0 to 1"),
    ],
)
def test_settings_that_do_not_fit(values, message):
    with pytest.raises(ValueError, match=message):
        PretrainConfig(**values)


def test_switches_of_augmentations():
    first, second, local, *_ = PretrainConfig(
        jitter=(0.1, 0.2, 0.0, 0.0), blur=(0.3, 0.2, 0.1), solarize=(0, 0, 0), grayscale=0, flip=0, turn=True
    ).crop_kinds
    assert (first.blur, second.blur, local.blur) == (0.3, 0.2, 0.1) and second.solarize == 0
    assert first.jitter == (0.1, 0.2, 0.0, 0.0) and local.grayscale == 0 and local.flip == 0 and local.turn
    gray = PretrainConfig(channels=1).crop_kinds
    assert gray[1].jitter == (0.4, 0.4, 0.0, 0.0) and gray[1].solarize == gray[1].grayscale == 0
