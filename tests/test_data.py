"""Reading images from folders and zips, the split, and the loaders."""

import io
import logging
import multiprocessing
import os
import pickle
import shutil
import struct
import subprocess
import sys
import traceback
import zipfile
from collections import Counter

import numpy as np
import pytest
import torch
from dino_train.augment import MultiCrop, eval_transform
from dino_train.data import (
    BadImages,
    Batches,
    CropDataset,
    DataError,
    ImageFolder,
    UnreadableImage,
    collate,
    crop_loader,
    eval_loader,
    require_batch,
    split,
)
from PIL import Image

MULTICROP = MultiCrop(global_crops_size=16, local_crops_size=8, local_crops_number=2)
RED = (200, 30, 40)


def save(path, image=None, **options):
    """Save an image (8 x 8 noise, different for each name) as what the suffix says."""
    if image is None:
        seed = sum(ord(c) * 31**i for i, c in enumerate(path.name))
        image = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3)).astype(np.uint8))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def fill(root, *names):
    for name in names:
        save(root / name)
    return root


def zip_of(folder, *, wrapper="", junk=()):
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, wrapper + file.relative_to(folder).as_posix())
        for name in junk:
            archive.writestr(name, b"junk")
    return path


def loaded(path):
    """The one image of a folder as an int array [H, W, 3], and that it is RGB."""
    image = ImageFolder(path).load(0)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


# ---- decoding


def with_alpha(image, alpha):
    image.putalpha(alpha)
    return image


def palette(**info):
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, *RED])
    image.info.update(info)
    return image


DECODED = {
    "rgb.png": (Image.new("RGB", (8, 8), RED), RED),
    "rgb.bmp": (Image.new("RGB", (8, 8), RED), RED),
    "rgb.tif": (Image.new("RGB", (8, 8), RED), RED),
    "rgb.JPEG": (Image.new("RGB", (8, 8), RED), RED),
    "rgb.JpG": (Image.new("RGB", (8, 8), RED), RED),
    "rgb.webp": (Image.new("RGB", (8, 8), RED), RED),
    "gray.jpg": (Image.new("L", (8, 8), 77), (77,) * 3),
    "gray-alpha.png": (Image.new("LA", (8, 8), (77, 0)), (77,) * 3),
    "alpha.png": (with_alpha(Image.new("RGB", (8, 8), RED), 0), RED),  # dropped, not blended with black
    "alpha.webp": (with_alpha(Image.new("RGB", (8, 8), RED), 128), RED),
    "palette.png": (palette(), RED),
    "palette-transparent.png": (palette(transparency=1), RED),
    "palette-transparent-bytes.png": (palette(transparency=b"\x80\x40"), RED),
    "bit.png": (Image.new("1", (8, 8), 1), (255,) * 3),
    "cmyk.tif": (Image.new("CMYK", (8, 8), (0, 255, 255, 0)), (255, 0, 0)),
    "cmyk.jpg": (Image.new("CMYK", (8, 8), (0, 255, 255, 0)), (255, 0, 0)),
}


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("name", DECODED)
def test_modes_and_formats(tmp_path, name):
    image, color = DECODED[name]
    save(tmp_path / name, image, **({"exact": True} if name == "alpha.webp" else {}))
    pixels = loaded(tmp_path)
    lossy = name.lower().endswith((".jpg", ".jpeg", ".webp"))
    assert pixels.shape == (8, 8, 3)
    assert np.abs(pixels - color).max() <= (3 if lossy else 0)


@pytest.mark.parametrize(("suffix", "dtype"), [("png", "<u2"), ("tiff", "<u2"), ("tiff", ">u2"), ("tiff", "i4")])
def test_16_bit_gray_keeps_its_high_byte(tmp_path, suffix, dtype):
    gray = np.array([[0, 255, 256, 300], [511, 32768, 65279, 65535]])
    save(tmp_path / f"a.{suffix}", Image.fromarray(gray.astype(dtype)))
    assert np.array_equal(loaded(tmp_path)[..., 0], gray // 256)


def test_float_and_32_bit_gray_are_stretched(tmp_path):
    values = np.array([[-3.0, 0.0], [2.0, 7.0]], np.float32)
    save(tmp_path / "float.tif", Image.fromarray(values))
    save(tmp_path / "int.tif", Image.fromarray((values * 100_000).astype(np.int32)))
    save(tmp_path / "odd.tif", Image.fromarray(np.array([[np.nan, 1], [np.inf, 3]], np.float32)))
    save(tmp_path / "zero.tif", Image.fromarray(np.full((2, 2), 4, np.float32)))
    got = {name: np.asarray(ImageFolder(tmp_path).load(i))[..., 0].tolist() for i, name in enumerate("fioz")}
    assert got["f"] == got["i"] == [[0, 76], [128, 255]]  # 255 * (v + 3) / 10
    assert got["o"] == [[0, 0], [255, 255]]
    assert got["z"] == [[0, 0], [0, 0]]


@pytest.mark.parametrize(
    ("suffix", "mode"),
    [("jpg", "RGB"), ("png", "RGB"), ("tif", "RGB"), ("webp", "RGB"), ("png", "I;16"), ("tif", "I;16")],
)
def test_exif_orientation(tmp_path, suffix, mode):
    image = Image.new(mode, (16, 8))
    image.paste(RED if mode == "RGB" else 65535, (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned clockwise: left becomes top
    save(tmp_path / f"a.{suffix}", image, exif=exif)
    pixels = loaded(tmp_path)
    assert pixels.shape == (16, 8, 3)
    assert pixels[2, 4, 0] > 150 and pixels[13, 4, 0] < 50


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_damaged_exif_is_no_reason_to_drop_an_image(tmp_path, suffix):
    save(tmp_path / f"a.{suffix}", Image.new("RGB", (8, 8), RED), exif=b"Exif\0\0XX*\0\x08\0\0\0\xff\xff")
    assert np.abs(loaded(tmp_path) - RED).max() <= 3


def png(width=32, height=32):
    data = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(data, "PNG")
    return data.getvalue()


DAMAGED = {
    "empty.jpg": (b"", "empty file"),
    "text.jpg": (b"<html>404 not found</html>", "not an image that Pillow reads"),
    "half.png": (png()[:1500], "truncated"),
    "header.png": (png()[:20], "truncated"),
    "flipped.png": (png()[:400] + b"\xff" * 99 + png()[499:], "damaged (unrecognized data stream"),
    "zero.bmp": (
        b"BM" + bytes(12) + struct.pack("<IiiHH", 40, 0, 5, 1, 24) + bytes(24),
        "not an image that Pillow reads",
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.parametrize("zipped", [False, True])
def test_damaged_files(tmp_path, name, zipped):
    data, reason = DAMAGED[name]
    root = fill(tmp_path / "set", "a/good.png")
    (root / "b").mkdir()
    (root / "b" / name).write_bytes(data)
    images = ImageFolder(zip_of(root) if zipped else root)
    images.load(0)
    with pytest.raises(UnreadableImage) as error:
        images.load(1)
    assert error.value.name == f"b/{name}" and error.value.reason.startswith(reason)
    assert str(error.value) == f"b/{name}: {error.value.reason}" and "\n" not in str(error.value)
    assert isinstance(error.value, ValueError)
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)


def test_decompression_bomb(tmp_path, monkeypatch):
    images = ImageFolder(fill(tmp_path, "a.png"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 31)
    with pytest.raises(UnreadableImage, match=r"^a.png: too many pixels \(decompression bomb\)$"):
        images.load(0)


def test_pillow_warnings_are_silent(tmp_path):
    fill(tmp_path, "a.png")
    code = (
        "import sys; from PIL import Image; from dino_train.data import ImageFolder\n"
        "Image.MAX_IMAGE_PIXELS = 40; ImageFolder(sys.argv[1]).load(0)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_lost_and_memory_hungry_files(tmp_path, monkeypatch):
    images = ImageFolder(fill(tmp_path, "a.png"))
    monkeypatch.setattr(Image, "open", lambda file: bytearray(1 << 62))
    with pytest.raises(UnreadableImage, match="^a.png: not enough memory to decode it$"):
        images.load(0)
    (tmp_path / "a.png").unlink()
    with pytest.raises(UnreadableImage, match=r"^a.png: cannot be read \(No such file or directory\)$"):
        images.load(0)


def test_damaged_and_encrypted_zip_members(tmp_path):
    path = zip_of(fill(tmp_path / "set", "a.png", "b.png"))
    data = bytearray(path.read_bytes())
    data[data.index(b"IHDR") + 30] ^= 0xFF  # in the stored bytes of a.png
    second_entry = data.index(b"PK\x01\x02", data.index(b"PK\x01\x02") + 1)
    data[second_entry + 8] |= 1  # the flag of an encrypted member
    path.write_bytes(data)
    for i, message in enumerate([r"^a.png: damaged \(Bad CRC-32", "^b.png: .* is encrypted, password required"]):
        with pytest.raises(UnreadableImage, match=message):
            ImageFolder(path).load(i)


# ---- finding the images


def test_names_labels_and_junk(tmp_path):
    root = fill(tmp_path / "set", "dog/b.png", "dog/deep/a.PNG", "cat/c.jpeg", "cat/.hidden.png")
    fill(root, ".thumbnails/t.png", "__MACOSX/cat/x.png", "empty/.keep.png")
    (root / "notes.txt").write_text("no image")
    zipped = ImageFolder(zip_of(root, junk=("__MACOSX/cat/._c.jpeg", "cat/._c.jpeg")))
    for images in (ImageFolder(root), ImageFolder(str(root)), zipped):
        assert images.names == ["cat/c.jpeg", "dog/b.png", "dog/deep/a.PNG"]
        assert images.classes == ["cat", "dog"] and images.labels == [0, 1, 1] and len(images) == 3
    for i in range(3):
        assert ImageFolder(root).load(i).tobytes() == zipped.load(i).tobytes()


@pytest.mark.parametrize("names", [["a.png", "b.png"], ["x/a.png", "x/b.png"], ["a.png", "x/b.png", "y/c.png"]])
def test_no_labels_without_two_folders_or_with_a_stray_image(tmp_path, names):
    images = ImageFolder(fill(tmp_path, *names))
    assert images.labels is None and images.classes == [] and len(images) == len(names)


@pytest.mark.parametrize("wrapper", ["", "set/", "./set/", "download/set 2/"])
def test_wrapper_folders_are_descended_into(tmp_path, wrapper):
    root = fill(tmp_path / "set", "cat/a.png", "dog/b.png")
    images = ImageFolder(zip_of(root, wrapper=wrapper, junk=("README.md",)))
    assert images.names == ["cat/a.png", "dog/b.png"] and images.labels == [0, 1]
    assert images.load(1).tobytes() == ImageFolder(root).load(1).tobytes()
    shutil.copytree(root, tmp_path / "copy" / wrapper)
    assert ImageFolder(tmp_path / "copy").names == images.names


def test_links_are_followed_but_not_in_circles(tmp_path):
    root = fill(tmp_path / "set", "cat/a.png")
    other = fill(tmp_path / "elsewhere", "b.png")
    (root / "dog").symlink_to(other)
    (root / "cat" / "up").symlink_to(root)
    (other / "across").symlink_to(root / "cat")
    names = ImageFolder(root).names
    assert {"cat/a.png", "dog/b.png"} <= set(names) and len(names) < 6


def test_a_name_that_is_not_unicode(tmp_path):
    fill(tmp_path, *(f"{i}.png" for i in range(19)))
    (tmp_path / "0.png").rename(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png"))
    train, held_out = split(fill(tmp_path, "19.png"))
    assert len(train) == 19 and len(held_out) == 1
    assert all(images.load(i).mode == "RGB" for images in (train, held_out) for i in range(len(images)))


def test_missing_and_unsuitable_paths(tmp_path, monkeypatch):
    def message(path):
        with pytest.raises(DataError) as error:
            ImageFolder(path)
        return str(error.value)

    text, cut, bare = tmp_path / "list.txt", tmp_path / "cut.zip", tmp_path / "bare"
    text.write_text("a.png")
    cut.write_bytes(zip_of(fill(tmp_path / "set", "a.png")).read_bytes()[:-30])
    bare.mkdir()
    assert message(tmp_path / "gone") == f"no such folder or zip file: {tmp_path / 'gone'}"
    assert message(text) == f"{text} is neither a folder nor a zip: expected a folder of images or a .zip of one"
    assert message(cut) == f"{cut} is a damaged zip (File is not a zip file): copy or download it again"
    looked = "looked for .jpg .jpeg .png .webp .bmp .tif .tiff in it and its subfolders, found"
    assert message(bare) == f"no images in {bare}: {looked} no files"
    (bare / "sub").mkdir()
    for name in ("a.txt", "sub/b.TXT", "c.csv", "LICENSE", ".hidden.png"):
        (bare / name).write_bytes(b"x")
    expected = f"{looked} 4 files: .txt 2, "
    assert expected in message(bare) and ".csv 1" in message(bare) and "no suffix 1" in message(bare)
    assert expected in message(zip_of(bare))
    monkeypatch.setattr(os, "scandir", lambda folder: (_ for _ in ()).throw(PermissionError(13, "Denied", folder)))
    assert message(bare) == f"cannot list {bare}: Denied"


# ---- the split


@pytest.mark.parametrize("wrapper", ["", "cifar/"])
def test_split_of_train_and_val(tmp_path, wrapper):
    root = fill(tmp_path / "set", "train/dog/a.png", "train/cat/b.png", "val/dog/c.png", "val/emu/d.png", "x.png")
    if wrapper:
        (root / "x.png").unlink()
    for path in (root, zip_of(root, wrapper=wrapper)):
        train, held_out = split(path)
        assert train.names == ["cat/b.png", "dog/a.png"] and held_out.names == ["dog/c.png", "emu/d.png"]
        assert train.classes == held_out.classes == ["cat", "dog", "emu"]
        assert train.labels == [0, 1] and held_out.labels == [1, 2]
        expected = np.asarray(Image.open(root / "val/emu/d.png"))
        assert np.array_equal(np.asarray(held_out.load(1)), expected)
    (root / "val/dog/c.png").write_bytes(b"")
    with pytest.raises(UnreadableImage, match="^val/dog/c.png: empty file$"):  # below the path the user gave
        split(root)[1].load(0)


def test_split_without_labels(tmp_path):
    train, held_out = split(fill(tmp_path, "train/a.png", "train/b.png", "val/c.png"))
    assert len(train) == 2 and len(held_out) == 1
    assert train.labels is held_out.labels is None and train.classes == held_out.classes == []


@pytest.mark.parametrize("prefix", ["", "train/"])
def test_split_by_hash(tmp_path, prefix):
    names = [f"{'ab'[i % 2]}/{i:02}.png" for i in range(60)]
    root = fill(tmp_path / "set", *(prefix + name for name in names))
    if prefix:
        fill(root, "test/a/00.png", "top.png")  # train without val: only what is in train is used
    splits = split(root), split(zip_of(root))
    for train, held_out in splits:
        assert sorted(train.names + held_out.names) == sorted(names) and train.names == sorted(train.names)
        assert held_out.names == ["a/46.png", "b/03.png", "b/39.png"]  # must never change: smallest SHA-256
        assert train.classes == held_out.classes == ["a", "b"]
        assert held_out.labels == ["ab".index(name[0]) for name in held_out.names]
    assert splits[0][1].load(2).tobytes() == np.asarray(Image.open(root / prefix / "b/39.png")).tobytes()


def test_size_of_the_held_out_part(tmp_path):
    assert [len(part) for part in split(fill(tmp_path / "few", *(f"{i}.png" for i in range(19))))] == [19, 0]
    path = tmp_path / "many.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(11_000):
            archive.writestr(f"{i}.png", b"")
    assert [len(part) for part in split(path)] == [11_000 - 512, 512]


def test_subset(tmp_path):
    images = ImageFolder(fill(tmp_path, "a/0.png", "a/1.png", "b/2.png", "c/3.png"))
    part = images.subset([3, 1])
    assert part.names == ["c/3.png", "a/1.png"] and part.labels == [2, 0] and part.classes == images.classes
    assert part.load(0).tobytes() == images.load(3).tobytes()


# ---- loaders


@pytest.fixture
def root(tmp_path):
    """Ten images in two classes, of which a/1 and a/2 are unreadable."""
    root = fill(tmp_path / "set", *(f"{'ab'[i // 5]}/{i}.png" for i in range(10)))
    (root / "a/1.png").write_bytes(b"")
    (root / "a/2.png").write_bytes(b"GIF?")
    return root


def run(path, num_workers, start_step=0, total_steps=7, seed=3):
    options = {"batch_size": 4, "seed": seed, "start_step": start_step, "total_steps": total_steps}
    images = ImageFolder(path)
    images.load(0)  # opens the handle of a zip before the workers start
    return list(crop_loader(images, MULTICROP, num_workers=num_workers, **options))


def assert_same(first, second):
    assert len(first) == len(second)
    for (crops, _), (other, _) in zip(first, second, strict=True):
        assert all(map(torch.equal, crops, other))


def test_crops_do_not_depend_on_workers_resume_or_zip(root):
    whole = run(root, 0)
    assert [[tuple(c.shape) for c in crops] for crops, _ in whole] == [[(4, 3, 16, 16)] * 2 + [(4, 3, 8, 8)] * 2] * 7
    assert {c.dtype for crops, _ in whole for c in crops} == {torch.float32}
    assert_same(whole, run(zip_of(root), 2))
    assert_same(whole[3:], run(root, 2, start_step=3))
    assert_same(whole[:5], run(root, 0, total_steps=5))
    assert run(root, 0, start_step=7) == []
    assert not torch.equal(whole[0][0][0], run(root, 0, total_steps=1, seed=4)[0][0][0])
    bad = Counter(name for _, bad in whole for name, _ in bad)
    assert bad == {"a/1.png": 1, "a/2.png": 1}  # each reported once
    assert {name for _, bad in run(root, 2) for name, _ in bad} == set(bad)


def test_samples_and_replacements(root):
    images = ImageFolder(root)
    dataset = CropDataset(images, MULTICROP, seed=3)

    def crops_of(image, epoch, index):
        return MULTICROP(images.load(image), (3, epoch, index))

    assert all(map(torch.equal, dataset[2, 7][0], crops_of(7, 2, 7)))
    crops, bad = dataset[2, 1]
    assert bad == [("a/1.png", "empty file"), ("a/2.png", "not an image that Pillow reads")]
    assert all(map(torch.equal, crops, crops_of(3, 2, 1)))  # image 3 with the random numbers of 1
    assert not any(map(torch.equal, crops, dataset[2, 3][0]))
    assert not any(map(torch.equal, crops, dataset[3, 1][0]))
    again, bad = dataset[2, 1]
    assert bad == [] and all(map(torch.equal, crops, again))
    (root / "b/9.png").write_bytes(b"")
    assert all(map(torch.equal, dataset[0, 9][0], crops_of(0, 0, 9)))  # wraps around


def test_bad_images_are_decoded_once(root, monkeypatch):
    read: Counter[str] = Counter()
    original = ImageFolder._read

    def counting(images, name):
        read[name] += 1
        return original(images, name)

    monkeypatch.setattr(ImageFolder, "_read", counting)
    dataset = CropDataset(ImageFolder(root), MULTICROP, seed=0)
    for epoch in range(3):
        dataset[epoch, 1], dataset[epoch, 2]
    assert read == {"a/1.png": 1, "a/2.png": 1, "a/3.png": 6}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_no_image_can_be_read(root, num_workers):
    for file in root.rglob("*.png"):
        file.write_bytes(b"")
    loader = crop_loader(
        ImageFolder(root),
        MULTICROP,
        batch_size=4,
        seed=0,
        start_step=0,
        total_steps=2,
        num_workers=num_workers,
    )
    message = r"^none of the 10 images could be read, the first: [ab]/\d.png: empty file$"
    with pytest.raises(DataError, match=message) as error:
        list(loader)
    traceback.clear_frames(error.tb)  # they keep the workers alive


def test_collate(root):
    dataset = CropDataset(ImageFolder(root), MULTICROP, seed=0)
    samples = [dataset[0, i] for i in (0, 2, 1)]
    crops, bad = collate(samples)
    assert all(torch.equal(crops[v][b], samples[b][0][v]) for v in range(4) for b in range(3))
    assert [name for name, _ in bad] == ["a/2.png", "a/1.png"]


def test_batches():
    def batches(n=10, size=3, seed=5, start=0, total=7):
        return list(Batches(n, size, seed, start, total))

    steps = batches()
    assert [{epoch for epoch, _ in step} for step in steps] == [{0}] * 3 + [{1}] * 3 + [{2}]
    for epoch in range(2):
        indices = [i for step in steps[3 * epoch : 3 * epoch + 3] for _, i in step]
        assert len(indices) == len(set(indices)) == 9 and set(indices) <= set(range(10))
    assert [i for _, i in steps[0]] != [i for _, i in steps[3]] and steps[0] != batches(seed=6)[0]
    assert batches(start=4) == steps[4:] and batches(start=4, total=5) == steps[4:5]
    assert len(Batches(10, 3, 5, 4, 7)) == 3 and len(Batches(10, 3, 5, 9, 7)) == 0
    assert all(type(i) is int for step in steps for _, i in step)
    assert {i for epoch in range(60) for _, i in batches(start=3 * epoch, total=3 * epoch + 1)[0]} == set(range(10))


def test_fewer_images_than_one_batch(root):
    message = "^10 images are fewer than one batch of 11: add images or set the batch size to 10 or less$"
    with pytest.raises(DataError, match=message):
        require_batch(10, 11)
    require_batch(10, 10)
    with pytest.raises(DataError, match=message):
        crop_loader(ImageFolder(root), MULTICROP, batch_size=11, seed=0, start_step=0, total_steps=1, num_workers=0)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_eval_loader(root, num_workers):
    images = ImageFolder(root)
    batches = list(eval_loader(images, size=16, batch_size=2, num_workers=num_workers))
    assert [indices.tolist() for _, _, indices, _ in batches] == [[0], [3], [4, 5], [6, 7], [8, 9]]
    assert [labels.tolist() for _, labels, _, _ in batches] == [[0], [0], [0, 1], [1, 1], [1, 1]]
    assert [name for *_, bad in batches for name, _ in bad] == ["a/1.png", "a/2.png"]
    for pixels, labels, indices, _ in batches:
        assert labels.dtype == indices.dtype == torch.int64
        assert torch.equal(pixels, torch.stack([eval_transform(images.load(int(i)), 16) for i in indices]))


def test_eval_loader_without_labels_and_without_readable_images(tmp_path):
    fill(tmp_path, "0.png", "1.png")
    (tmp_path / "1.png").write_bytes(b"")
    images = ImageFolder(tmp_path)
    batches = list(eval_loader(images, size=16, batch_size=1, num_workers=0))
    assert [labels.tolist() for _, labels, _, _ in batches] == [[-1], []]
    assert batches[1][0].shape == (0, 3, 16, 16) and batches[1][3] == [("1.png", "empty file")]
    assert list(eval_loader(images.subset([]), size=16, batch_size=1, num_workers=0)) == []


def test_loaders_leave_the_global_generator_alone(root):
    state = torch.get_rng_state()
    run(root, 2, total_steps=1)
    list(eval_loader(ImageFolder(root), size=16, batch_size=5, num_workers=0))
    assert torch.equal(torch.get_rng_state(), state)


def test_workers_survive_signals_and_end_with_the_loader(root):
    before = set(multiprocessing.active_children())
    steps = iter(
        crop_loader(ImageFolder(root), MULTICROP, batch_size=4, seed=0, start_step=0, total_steps=30, num_workers=2)
    )
    next(steps), next(steps)  # both workers have started
    workers = set(multiprocessing.active_children()) - before
    pids = [str(worker.pid) for worker in workers]
    assert len(pids) == 2
    for name in ("-INT", "-TERM"):  # as a terminal or a scheduler does: not sent by the parent itself
        subprocess.run(["kill", name, *pids], check=True)
    assert len(list(steps)) == 28
    del steps
    for worker in workers:
        worker.join(timeout=10)
        assert worker.exitcode == 0


def test_a_loader_that_is_still_in_use_does_not_keep_the_process_from_ending(root):
    code = (
        "import sys; from dino_train.data import ImageFolder, MultiCrop, crop_loader\n"
        "loader = crop_loader(ImageFolder(sys.argv[1]), MultiCrop(), batch_size=4, seed=0,\n"
        "    start_step=0, total_steps=99, num_workers=2)\n"
        "steps = iter(loader); next(steps); steps.itself = steps"
    )
    subprocess.run([sys.executable, "-c", code, str(root)], check=True, timeout=30)


def test_a_forked_process_opens_the_zip_anew(tmp_path):
    for name in ("a.png", "b.png"):  # larger than the buffer of a file
        noise = np.random.default_rng(0).integers(0, 256, (99, 99, 3)).astype(np.uint8)
        save(tmp_path / "set" / name, Image.fromarray(noise))
    images = ImageFolder(zip_of(tmp_path / "set"))
    images.load(0)
    file = images._open_zip().fp
    assert file is not None
    position = os.lseek(file.fileno(), 0, os.SEEK_CUR)
    child = multiprocessing.get_context("fork").Process(target=images.load, args=(1,))
    child.start()
    child.join()
    assert child.exitcode == 0 and os.lseek(file.fileno(), 0, os.SEEK_CUR) == position


class Threads(ImageFolder):
    """Stands for images of which each shows the number of torch threads of the process that reads it."""

    def load(self, i):
        return Image.new("RGB", (8, 8), (torch.get_num_threads(),) * 3)


def test_workers_use_one_thread(root):
    expected = eval_transform(Image.new("RGB", (8, 8), (1, 1, 1)), 8)
    (pixels, *_) = next(iter(eval_loader(Threads(root), size=8, batch_size=1, num_workers=1)))
    assert torch.equal(pixels[0], expected)


@pytest.mark.parametrize("zipped", [False, True])
def test_pickle(root, zipped):
    images = ImageFolder(zip_of(root) if zipped else root)
    images.load(0)
    dataset = CropDataset(images, MULTICROP, seed=0)
    copy = pickle.loads(pickle.dumps(dataset))
    assert all(map(torch.equal, copy[0, 5][0], dataset[0, 5][0]))


# ---- bad images


def test_bad_images_are_logged_once(caplog):
    bad_images = BadImages(n_images=40, batch_size=16)
    with caplog.at_level(logging.WARNING):
        bad_images.add([("a.png", "truncated"), ("b.png", "empty file")])
        bad_images.add([])
        bad_images.add([("a.png", "truncated")])
    assert caplog.messages == [
        "skipped unreadable image a.png: truncated",
        "skipped unreadable image b.png: empty file",
    ]
    assert bad_images.count == 2


def test_too_few_readable_images():
    bad_images = BadImages(n_images=40, batch_size=16)
    bad_images.add([(f"{i}.png", "truncated") for i in range(24)])
    message = "^only 15 of 40 images could be read, fewer than one batch of 16: z.png: empty file$"
    with pytest.raises(DataError, match=message):
        bad_images.add([("z.png", "empty file")])
    evaluation = BadImages(n_images=2, batch_size=0)
    evaluation.add([("a.png", "truncated"), ("b.png", "truncated")])
    assert evaluation.count == 2
