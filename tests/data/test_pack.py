"""The packed store: content, other readers, interruptions, damage, full disks."""

import io
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import webdataset
from dino_train.cli import main
from dino_train.data import pack as pack_module
from dino_train.data.decode import UnreadableImage
from dino_train.data.folder import DataError, ImageFolder, split
from dino_train.data.pack import pack
from dino_train.data.tar_index import Head, Store
from pictures import fill, save, zip_of
from PIL import Image


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8))


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "set"
    save(root / "train/cat/small.jpg", noise(30, 20), quality=80)
    save(root / "train/cat/large.JPEG", noise(100, 60))
    save(root / "train/dog/v1.2.png", noise(40, 50))
    save(root / "train/dog/v1_2.jpg", noise(8, 9))
    save(root / "val/cat/thin.png", noise(300, 1))
    exif = Image.Exif()
    exif[0x0112] = 6
    save(root / "val/dog/turned.jpg", noise(20, 10), exif=exif)
    (root / "val/dog/bad.jpg").write_bytes(b"GIF?")
    return root


def packed(root, name="set.tar", size=40, quality=90, **options):
    out = root.parent / name
    pack(ImageFolder(root), out, size=size, quality=quality, **{"num_workers": 2, **options})
    return out


RECORDS = {
    "train/cat/small.jpg": (20, 30),
    "train/cat/large.JPEG": (24, 40),
    "train/dog/v1_2.jpg": (40, 32),
    "train/dog/v1_2_.jpg": (9, 8),
    "val/cat/thin.jpg": (1, 40),
    "val/dog/turned.jpg": (20, 10),
}


def test_reads_like_the_folder(root, caplog):
    out = packed(root)
    assert caplog.messages == ["skipped unreadable image val/dog/bad.jpg: not an image that Pillow reads"]
    images = ImageFolder(out)
    assert {name: images.pixels(i).shape[:2] for i, name in enumerate(images.names)} == RECORDS
    train, held_out = split(out)
    assert train.classes == held_out.classes == ["cat", "dog"] and len(train) == 4 and len(held_out) == 2
    assert held_out.labels == [0, 1]
    small = images.names.index("train/cat/small.jpg")
    assert images.read(small) == (root / "train/cat/small.jpg").read_bytes()  # a small JPEG is copied unchanged
    shrunk = Image.open(root / "train/cat/large.JPEG").resize((40, 24), Image.Resampling.LANCZOS)
    expected = np.asarray(Image.open(save(root.parent / "expected.jpg", shrunk, quality=90)))
    assert np.array_equal(images.pixels(images.names.index("train/cat/large.JPEG")), expected)


@pytest.mark.filterwarnings("ignore:Image size")
def test_a_jpeg_above_the_limit_is_packed_if_it_is_shrunk(tmp_path, monkeypatch, caplog):
    root = tmp_path / "set"
    save(root / "large.jpg", Image.new("RGB", (200, 100), (200, 30, 40)))
    save(root / "large.png", Image.new("RGB", (200, 100)))
    save(root / "small.jpg", Image.new("RGB", (20, 10)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    images = ImageFolder(packed(root))
    assert images.names == ["large.jpg", "small.jpg"] and images.pixels(0).shape == (20, 40, 3)
    assert np.abs(images.pixels(0).astype(int) - (200, 30, 40)).max() < 4
    (message,) = caplog.messages
    assert "large.png: 0.02 megapixels, at most 0.004 are decoded" in message
    for limit, count in ((0.019, 2), (0.02, 3)):
        out = tmp_path / f"{count}.tar"
        assert (
            main(["pack", "--data", str(root), "--out", str(out), "--max-megapixels", str(limit), "--size", "40"]) == 0
        )
        assert len(ImageFolder(out)) == count


def test_other_programs_can_read_it(root):
    out = packed(root)
    with tarfile.open(out) as tar:
        assert {member.name for member in tar} == {*RECORDS, "__pack__", "__index__"}
        member = tar.extractfile("train/cat/small.jpg")
        assert member is not None and member.read() == (root / "train/cat/small.jpg").read_bytes()
    samples = list(webdataset.WebDataset([str(out)], shardshuffle=False, nodesplitter=None))
    assert {sample["__key__"] for sample in samples} == {name.rpartition(".")[0] for name in RECORDS}
    assert all("jpg" in sample or "jpeg" in sample for sample in samples)


def test_output_does_not_depend_on_threads_or_source(root):
    first = packed(root, num_workers=1).read_bytes()
    assert packed(root, "again.tar", num_workers=3).read_bytes() == first
    assert packed(Path(zip_of(root)), "zip.tar").read_bytes() == first
    assert packed(root, "other.tar", quality=50).read_bytes() != first


@pytest.mark.parametrize("records", [0, 1, 4, 6])
@pytest.mark.parametrize("more", [0, 5, 300, 600])
def test_an_interrupted_call_is_continued(root, records, more):
    out = packed(root)
    whole = out.read_bytes()
    store = Store(out)
    ends = [1024] + [int(start + (size + 511) // 512 * 512) for start, size, _ in store._table.tolist()]
    partial = out.with_name("set.tar.partial")
    partial.write_bytes(whole[: ends[records] + more])
    out.unlink()
    encoded = []
    original = pack_module._record
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack_module, "_record", lambda *a: encoded.append(1) or original(*a))
        assert packed(root).read_bytes() == whole
    assert len(encoded) == 7 - records  # the unreadable image is tried again
    assert not partial.exists()


@pytest.mark.parametrize("cut", [0, 5, 511])
def test_an_interruption_before_the_first_record(root, cut):
    whole = packed(root).read_bytes()
    (root.parent / "again.tar.partial").write_bytes(whole[:cut])
    assert packed(root, "again.tar").read_bytes() == whole


def test_a_killed_process_leaves_no_incomplete_output(root):
    code = (
        "import os, sys; from pathlib import Path; from dino_train.data import pack\n"
        "from dino_train.data.folder import ImageFolder; seen = []; original = pack._append\n"
        "pack._append = lambda *a: original(*a) if len(seen) < 3 and not seen.append(1) else os._exit(9)\n"
        "pack.pack(ImageFolder(sys.argv[1]), Path(sys.argv[2]), size=40, quality=90, num_workers=1)"
    )
    out = root.parent / "killed.tar"
    assert subprocess.run([sys.executable, "-c", code, str(root), str(out)]).returncode == 9
    assert not out.exists() and out.with_name("killed.tar.partial").exists()
    assert packed(root, "killed.tar").read_bytes() == packed(root).read_bytes()


def test_two_calls_do_not_write_the_same_file(root, monkeypatch):
    record, seen = pack_module._record, []

    def meanwhile(*arguments):
        if not seen:
            with pytest.raises(ValueError, match="set.tar is in use by process [0-9]+ on ") as error:
                seen.append(True)
                packed(root)
            seen.append(error)
        return record(*arguments)

    monkeypatch.setattr(pack_module, "_record", meanwhile)
    out = packed(root, num_workers=1)
    assert len(seen) == 2 and not list(out.parent.glob("*.lock"))


def test_other_options_start_again(root):
    out = packed(root)
    out.rename(out.with_name("set.tar.partial"))
    assert packed(root, size=20).read_bytes() == packed(root, "other.tar", size=20).read_bytes()


def test_a_damaged_record_is_reported_and_the_others_are_read(root):
    out = packed(root)
    data = bytearray(out.read_bytes())
    content = (root / "train/cat/small.jpg").read_bytes()
    data[data.index(content) + len(content) // 2] ^= 1
    out.write_bytes(data)
    images = ImageFolder(out)
    for i, name in enumerate(images.names):
        if name == "train/cat/small.jpg":
            with pytest.raises(UnreadableImage, match=r"^train/cat/small.jpg: damaged \(wrong checksum\)$"):
                images.pixels(i)
        else:
            images.pixels(i)


@pytest.mark.parametrize("keep", [0, 100, 1024, 3000, -2000, -1])
def test_a_truncated_store(root, keep):
    out = packed(root)
    out.write_bytes(out.read_bytes()[:keep])
    if keep == -1:  # only zeros after the index are missing
        assert len(ImageFolder(out)) == 6
        return
    with pytest.raises(DataError, match=r"set.tar is a damaged tar \(.*\): copy or download it again$"):
        ImageFolder(out)


def test_a_damaged_index_is_found_when_it_is_opened(root):
    out = packed(root)
    intact = out.read_bytes()
    start, size, _ = Head.read(intact[:1024]).index
    for at in (*range(start, start + size, 7), *range(512, 700, 3)):
        data = bytearray(intact)
        data[at] ^= 1
        out.write_bytes(data)
        try:
            assert ImageFolder(out).read(0) and not start <= at < start + size  # a bit of the head that says nothing
        except DataError as error:
            assert "is a damaged tar (its " in str(error)


def test_a_pack_of_an_earlier_version_has_an_index_without_checksum(root):
    out = packed(root)
    data = out.read_bytes()
    head = Head.read(data[:1024])
    out.write_bytes(replace(head, index=head.index[:2]).to_bytes() + data[1024:])
    assert len(ImageFolder(out)) == 6


@pytest.mark.parametrize("name", ["a" * 150 + ".jpg", "ü/日本.jpg", "d/" * 60 + "x.jpg"])
def test_names_of_any_length_and_alphabet(tmp_path, name):
    root = fill(tmp_path / "set", name, "b.jpg")
    images = ImageFolder(packed(root))
    assert set(images.names) == {name, "b.jpg"}
    assert images.read(images.names.index(name)) == (root / name).read_bytes()
    assert Store(root.parent / "set.tar").read(name) == (root / name).read_bytes()


def test_tars_of_other_programs(root):
    out = root.parent / "other.tar"
    with tarfile.open(out, "w") as tar:
        tar.add(root, arcname="somewhere/set")
        info = tarfile.TarInfo("somewhere/set/train/cat/.hidden.jpg")
        tar.addfile(info, io.BytesIO())
    images = ImageFolder(out)
    assert images.names == ImageFolder(root).names
    assert all(images.read(i) == ImageFolder(root).read(i) for i in range(len(images)))


def test_compressed_tars_are_rejected(root):
    out = root.parent / "set.tar"
    with tarfile.open(out, "w:gz") as tar:
        tar.add(root)
    with pytest.raises(DataError, match="set.tar is a damaged tar"):
        ImageFolder(out)


def test_user_errors(root, capsys, monkeypatch):
    def run(*arguments):
        code = main(["pack", "--data", str(root), *map(str, arguments)])
        return code, capsys.readouterr().err.strip().splitlines()[-1:]

    out = root.parent / "set.tar"
    assert run("--out", out) == (0, [])
    assert run("--out", out) == (1, [f"dino-train: error: {out} exists already: remove it, or choose another name"])
    name = root / "x.zip"
    assert run("--out", name) == (1, [f"dino-train: error: the output must end in .tar, got {name}"])
    message = "dino-train: error: size must be at least 1 and quality from 1 to 95, got 0 and 90"
    assert run("--out", root / "x.tar", "--size", 0) == (1, [message])
    with pytest.raises(ValueError, match="^none of the 1 images could be read$"):
        pack(ImageFolder(root / "val/dog").subset([0]), root / "none.tar", size=9, quality=9, num_workers=1)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pack_module, "_append", full)
    target = root.parent / "full.tar"
    reason = f"No space left on device; the same command goes on from {target}.partial"
    message = f"dino-train: error: cannot write {target}: {reason}"
    assert run("--out", target) == (1, [message])
    assert not target.exists()
