"""Reading of images from folders and zips, and the split."""

import io
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from dino_train.data.decode import UnreadableImage, decode, jpeg_size
from dino_train.data.deep import decode_deep
from dino_train.data.folder import DataError, ImageFolder, pretraining_split, split
from dino_train.data.names import DEEP_SUFFIXES, SUFFIXES
from pictures import fill, save, zip_of
from PIL import Image, ImageOps

RED = (200, 30, 40)


def loaded(path):
    """The only image of a folder as an int array [H, W, 3]; checks that it is RGB."""
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
def test_gray_of_12_or_16_bits_by_itself_uses_its_own_range(tmp_path, suffix, dtype):
    for low, high in ((0, 65535), (0, 4095), (1000, 1255)):
        gray = np.linspace(low, high, 8).round().reshape(2, 4)
        save(tmp_path / f"a.{suffix}", Image.fromarray(gray.astype(dtype)))
        assert np.array_equal(loaded(tmp_path)[..., 0], np.round((gray - low) * (255 / (high - low))))


def test_float_and_32_bit_gray_are_scaled_to_8_bits(tmp_path):
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
    exif[0x0112] = 6  # rotated clockwise for display: left becomes top
    save(tmp_path / f"a.{suffix}", image, exif=exif)
    pixels = loaded(tmp_path)
    assert pixels.shape == (16, 8, 3)
    assert pixels[2, 4, 0] > 150 and pixels[13, 4, 0] < 50


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_damaged_exif_does_not_make_an_image_unreadable(tmp_path, suffix):
    save(tmp_path / f"a.{suffix}", Image.new("RGB", (8, 8), RED), exif=b"Exif\0\0XX*\0\x08\0\0\0\xff\xff")
    assert np.abs(loaded(tmp_path) - RED).max() <= 3


def jpeg(mode="RGB", **options):
    file = io.BytesIO()
    y, x = np.mgrid[:37, :53]
    pixels = np.stack([128 + 100 * np.sin(x / (3 + c) + y / 5) for c in range(3)], -1).astype(np.uint8)
    Image.fromarray(pixels).convert(mode).save(file, "JPEG", **options)
    return file.getvalue()


@pytest.mark.parametrize("options", [{}, {"quality": 30}, {"subsampling": 0}, {"progressive": True}, {"mode": "L"}])
def test_jpegs_are_decoded_to_the_same_bytes_as_pillow(options):
    data = jpeg(**options)
    assert jpeg_size(data) == (37, 53)
    assert np.array_equal(decode(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_files_that_only_pillow_decodes(monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = 6
    turned, inks = jpeg(exif=exif), jpeg("CMYK")
    assert jpeg_size(turned) is jpeg_size(inks) is jpeg_size(png()) is jpeg_size(b"\xff\xd8\xff") is None
    assert decode(turned).shape == (53, 37, 3)
    assert np.array_equal(decode(inks), np.asarray(Image.open(io.BytesIO(inks)).convert("RGB")))
    text = jpeg(comment=b"Exif\0\0")  # a comment that looks like EXIF
    assert jpeg_size(text) == (37, 53)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert jpeg_size(jpeg()) is None


@pytest.mark.parametrize(("data", "reason"), [(jpeg()[:700], "truncated"), (jpeg() + b"junk", None)])
def test_pillow_reports_damaged_jpegs(tmp_path, data, reason):
    (tmp_path / "a.jpg").write_bytes(data)
    if reason is None:
        assert ImageFolder(tmp_path).pixels(0).shape == (37, 53, 3)
        return
    with pytest.raises(UnreadableImage, match=f"^a.jpg: {reason}$"):
        ImageFolder(tmp_path).pixels(0)


@pytest.mark.parametrize("filling", [b"", b"\xff", b"\xff" * 7, b"junk", b"\xff\0"])
def test_the_orientation_of_a_jpeg_with_filled_up_markers(filling):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = jpeg(exif=exif)
    segment = data.index(b"Exif\0\0") - 4
    data = data[:segment] + filling + data[segment:]
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert expected.size == (37, 53)
    assert jpeg_size(data) is None and np.array_equal(decode(data), np.asarray(expected))


@pytest.mark.parametrize("options", [{}, {"quality": 30}, {"progressive": True}, {"mode": "L"}, {"subsampling": 0}])
def test_a_jpeg_without_its_end_marker_is_read_if_pillow_reads_it(options):
    """With LOAD_TRUNCATED_IMAGES off, as in the reference, that depends on the last bits of the image."""
    data = jpeg(**options)[:-2]
    try:
        expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    except OSError:
        with pytest.raises(OSError, match="truncated"):
            decode(data)
    else:
        assert np.array_equal(decode(data), expected)


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
    message = r"^a.png: 6.4e-05 megapixels, at most 6.2e-05 are decoded: cut it into tiles, or .*$"
    with pytest.raises(UnreadableImage, match=message):
        images.load(0)


def test_pillow_warnings_are_silent(tmp_path):
    fill(tmp_path, "a.png")
    code = (
        "import sys; from PIL import Image; from dino_train.data.folder import ImageFolder\n"
        "Image.MAX_IMAGE_PIXELS = 40; ImageFolder(sys.argv[1]).load(0)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stderr == ""


@pytest.mark.filterwarnings("ignore:Truncated File Read", "error::RuntimeWarning")
def test_libraries_print_nothing_about_a_file_without_its_name(capfd, caplog):
    file = io.BytesIO()
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(file, "TIFF", compression="tiff_adobe_deflate")
    whole = file.getvalue()
    damaged = whole.replace(whole[8:20], b"\xff" * 12)
    for data in (damaged, whole[: len(whole) // 2], b"II*\0" + bytes(200)):
        with pytest.raises(Exception):  # noqa: B017
            decode(data)
    values = io.BytesIO()
    np.save(values, np.array([[1e300, np.nan], [-np.inf, 2.0]]))
    assert np.isinf(decode_deep(values.getvalue(), 1)).sum() == 2
    assert decode(values.getvalue())[1, 1, 0] == 0
    assert capfd.readouterr().err == "" and not caplog.records


def test_missing_files_and_out_of_memory(tmp_path, monkeypatch):
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
def test_the_root_is_below_wrapper_folders(tmp_path, wrapper):
    root = fill(tmp_path / "set", "cat/a.png", "dog/b.png")
    images = ImageFolder(zip_of(root, wrapper=wrapper, junk=("README.md",)))
    assert images.names == ["cat/a.png", "dog/b.png"] and images.labels == [0, 1]
    assert images.load(1).tobytes() == ImageFolder(root).load(1).tobytes()
    shutil.copytree(root, tmp_path / "copy" / wrapper)
    assert ImageFolder(tmp_path / "copy").names == images.names


def test_links_are_followed_without_infinite_recursion(tmp_path):
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
    assert message(tmp_path / "gone") == f"no such folder, zip or tar file: {tmp_path / 'gone'}"
    kinds = "expected a folder of images, or a .zip or .tar of one"
    assert message(text) == f"{text} is neither a folder nor a zip nor a tar: {kinds}"
    assert message(cut) == f"{cut} is a damaged zip (File is not a zip file): copy or download it again"
    looked = f"looked for {' '.join(SUFFIXES + DEEP_SUFFIXES)} in it and its subfolders, found"
    assert message(bare) == f"no images in {bare}: {looked} no files"
    (bare / "sub").mkdir()
    for name in ("a.txt", "sub/b.TXT", "c.csv", "LICENSE", ".hidden.png"):
        (bare / name).write_bytes(b"x")
    expected = f"{looked} 4 files: .txt 2, "
    assert expected in message(bare) and ".csv 1" in message(bare) and "no suffix 1" in message(bare)
    assert expected in message(zip_of(bare))
    (bare / "IMG_1.HEIC").write_bytes(b"x")
    advice = "pictures of these kinds are not read, convert them to JPEG or PNG: .heic 1"
    assert "5 files: .txt 2, " in message(bare) and message(bare).endswith(f"; {advice}")
    fill(bare, "a.png")
    assert advice in ImageFolder(bare).notes and ".heic" not in ImageFolder(bare).notes[1]
    monkeypatch.setattr(os, "scandir", lambda folder: (_ for _ in ()).throw(PermissionError(13, "Denied", folder)))
    assert message(bare) == f"cannot list {bare}: Denied"


# What Pillow writes under each of these suffixes.
MODES = {".pbm": "1", ".pgm": "L", ".pfm": "F", ".gif": "P"}
READ_ONLY = {".psd"}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_suffix_is_read(tmp_path, suffix):
    Image.init()
    assert suffix in Image.registered_extensions()
    if suffix not in READ_ONLY:
        save(tmp_path / f"a{suffix.upper()}", Image.new(MODES.get(suffix, "RGB"), (16, 16)))
        assert ImageFolder(tmp_path).pixels(0).shape == (16, 16, 3)


def test_files_that_are_passed_over_are_counted(tmp_path):
    root = fill(tmp_path / "set", "a.png", ".hidden.png", "__MACOSX/x.png")
    for name in ("a.txt", "b.txt", "c.JSON", "LICENSE", "Thumbs.db"):
        (root / name).write_bytes(b"")
    fill(root, "@eaDir/a/s.jpg", "@eaDir/t.png", "sub/Thumbnails/a.png", "$RECYCLE.BIN/x.png", "#recycle/x.png")
    (root / "@eaDir/info.txt").write_bytes(b"")
    for path in (root, zip_of(root)):
        images = ImageFolder(path)
        assert images.names == ["a.png"] and len(images.notes) == 2
        assert images.notes[0].endswith("are not read: .txt 2, .json 1, no suffix 1")
        counts = ("@eaDir 2", "Thumbnails 1", "$RECYCLE.BIN 1", "#recycle 1")
        assert all(count in images.notes[1] for count in counts)
    assert not ImageFolder(fill(tmp_path / "clean", "a.png")).notes


def test_a_subfolder_that_cannot_be_listed_is_skipped_and_named(tmp_path, monkeypatch):
    root, scandir = fill(tmp_path, "a/x.png", "b/lost+found/y.png", "b/z.png"), os.scandir

    def denied(folder):
        if "lost+found" in str(folder):
            raise PermissionError(13, "Permission denied", folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", denied)
    images = ImageFolder(root)
    assert images.names == ["a/x.png", "b/z.png"]
    assert images.notes == ["folders that cannot be listed are skipped: 1: b/lost+found/ (Permission denied)"]
    (root / "a/x.png").unlink()
    (root / "b/z.png").unlink()
    with pytest.raises(
        DataError, match=r"^no images in .* found no files; .*: 1: b/lost\+found/ \(Permission denied\)$"
    ):
        ImageFolder(root)


# ---- the split


SPLITS = {
    # names: pretraining, train, held out, note
    "train/c/0 train/d/1 val/c/2 unlabelled/3": ("train/c/0 train/d/1 unlabelled/3", "c/0 d/1", "c/2", ""),
    "train/0 valid/1 test/2 test/3": ("0", "0", "1", "neither trained on nor held out: test/ 2"),
    "Train/0 VAL/1": ("0", "0", "1", ""),
    "train/0 test/1": ("0", "0", "1", ""),
    "train2017/0 val2017/1 unlabeled2017/2": ("train2017/0 unlabeled2017/2", "0", "1", ""),
    "training_set/0 test_set/1": ("0", "0", "1", ""),
    "unsup/0 validation/1": ("0", "0", "1", ""),
    "train/0 train/1 x": ("0 1", "0 1", "", "neither trained on nor held out: beside the folders 1"),
    # A class may have a split's name.
    "test/0 cat/1 dog/2": ("cat/1 dog/2 test/0",) * 2 + ("", ""),
    "train/0 bus/1": ("bus/1 train/0",) * 2 + ("", ""),
    "train/0 val/1 masks/2": ("masks/2 train/0 val/1",) * 2 + ("", "taken as classes, since masks/"),
    "train1/0 train2/1": ("train1/0 train2/1",) * 2 + ("", ""),
    "val/0 test/1": ("test/1 val/0",) * 2 + ("", ""),
}


@pytest.mark.parametrize("names", SPLITS)
def test_what_is_a_split(tmp_path, names):
    fill(tmp_path, *(f"{name}.png" for name in names.split()))
    parts, (*expected, note) = pretraining_split(tmp_path), SPLITS[names]
    assert [" ".join(part.names).replace(".png", "") for part in parts] == expected
    assert parts[1].classes == parts[2].classes
    assert note in " ".join(parts[0].notes) and bool(note) == bool(parts[0].notes)
    for part in parts:
        for i in range(len(part)):
            part.load(i)


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


@pytest.mark.parametrize("prefix", ["", "train/", "pool"])
def test_split_by_hash(tmp_path, prefix):
    pool, prefix = prefix == "pool", "train/" if prefix == "pool" else prefix
    names = [f"{'ab'[i % 2]}/{i:02}.png" for i in range(60)]
    root = fill(tmp_path / "set", *(prefix + name for name in names))
    if prefix:
        fill(root, "unlabelled/a/00.png" if pool else "top.png")  # train without val: it is of the images in train
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
