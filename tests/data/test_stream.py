"""Shards: every sample once per epoch on two ranks, resuming, replacement of failed samples, and user errors."""

import io
import json
import os
import tarfile
import threading
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
from dino_train.config.pretrain import PretrainConfig
from dino_train.data import stream as stream_module
from dino_train.data.decode import decode
from dino_train.data.folder import DataError, ImageFolder
from dino_train.data.loader import CropLoader
from dino_train.data.stream import COUNTS, ShardStream, count_samples, is_shards, shard_files, shard_urls
from dino_train.engine.train import Interrupted, Run, pretrain
from PIL import Image
from tiny_run import RANKS, assert_same, final_weights, torchrun

SIZES = (5, 1, 12, 3, 0, 7, 4)  # 32 samples
PICTURE = PretrainConfig(**RANKS).crop_kinds


def picture(number):
    file = io.BytesIO()
    Image.new("RGB", (12, 10), (number, 100, 200)).save(file, "PNG")
    return file.getvalue()


def add(tar, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


@pytest.fixture
def pattern(tmp_path):
    """Shards of SIZES samples, each a label, a mask and an image with its number as red value."""
    number = 0
    for shard, size in enumerate(SIZES):
        with tarfile.open(tmp_path / f"s{shard}.tar", "w") as tar:
            for _ in range(size):
                add(tar, f"{number:03}.cls", b"1")
                add(tar, f"{number:03}.seg.png", b"")
                add(tar, f"{number:03}.png", picture(number))
                number += 1
    return f"{tmp_path}/s{{0..6}}.tar"


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    monkeypatch.setattr(stream_module, "WINDOW", 6)


def opened(pattern):
    return ShardStream(shard_urls(pattern), SIZES)


def shown(sample):
    """The number encoded in the sample's image."""
    _, read = next(sample.candidates())
    return int(decode(read())[0, 0, 0])


def steps(pattern, start=0, total=16, rank=0, ranks=1, batch=4, seed=3):
    return [
        [(s.epoch, s.index, shown(s)) for s in step]
        for step in opened(pattern).steps(batch, seed, start, total, rank, ranks)
    ]


def test_every_sample_once_an_epoch_in_a_shuffled_order(pattern):
    whole = steps(pattern)
    assert len(whole) == 16 and all(len(step) == 4 for step in whole)
    for epoch in range(2):
        samples = [sample for step in whole[8 * epoch : 8 * epoch + 8] for sample in step]
        assert all(sample[0] == epoch and sample[1] == sample[2] for sample in samples)
        assert sorted(number for _, number, _ in samples) == list(range(32))
    order = [number for step in whole for _, number, _ in step]
    assert order[:32] != order[32:] and order[:32] != sorted(order[:32])
    assert steps(pattern) == whole != steps(pattern, seed=4)


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_get_equal_parts_for_any_shard_sizes(pattern, ranks):
    parts = [steps(pattern, rank=rank, ranks=ranks, total=8) for rank in range(ranks)]
    assert all(len(step) == 4 // ranks for part in parts for step in part)
    assert sorted(s[2] for part in parts for step in part for s in step) == list(range(32))


def test_an_incomplete_batch_is_dropped(pattern):
    for rank in range(2):
        part = steps(pattern, rank=rank, ranks=2, batch=10, total=6)
        assert [{epoch for epoch, *_ in step} for step in part] == [{0}] * 3 + [{1}] * 3
        assert len({s[2] for step in part[:3] for s in step}) == 15


@pytest.mark.parametrize("start", [1, 3, 7, 8, 13, 15, 16])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_resume_starts_at_its_window(pattern, start, rank, monkeypatch):
    whole = steps(pattern, rank=rank, ranks=2)
    opened_shards = []
    original = stream_module.shard_files
    monkeypatch.setattr(stream_module, "shard_files", lambda url: opened_shards.append(url) or original(url))
    assert steps(pattern, start=start, rank=rank, ranks=2) == whole[start:]
    if start == 7:
        later = len(opened_shards)
        steps(pattern, rank=rank, ranks=2)
        assert 0 < later < len(opened_shards) - later


_RANK = """
import json, os, sys
from pathlib import Path
import torch
from dino_train.common import parallel
from dino_train.data import stream
from dino_train.data.loader import CropLoader
from dino_train.config.pretrain import PretrainConfig
stream.WINDOW = 6
pattern, folder = sys.argv[1:]
parallel.join(torch.device("cpu"))
urls = stream.shard_urls(pattern)
images = stream.ShardStream(urls, stream.count_samples(urls, Path(folder)))
kinds = PretrainConfig(global_crops_size=16, patch_size=8, local_crops_number=0).crop_kinds
kinds = [kind.__class__(16, (1.0, 1.0), 0.0, 0.0) for kind in kinds]
split = {"rank": parallel.rank(), "ranks": parallel.size()}
seen = [s.index for step in images.steps(4, 0, 0, 8, **split) for s in step]
steps = CropLoader(images, kinds, batch_size=4, seed=0, start_step=0, total_steps=8, num_workers=2, **split)
count = sum(len(crops[0]) for crops, bad in steps)
Path(folder, f"{parallel.rank()}.json").write_text(json.dumps([seen, count, images.counts.tolist()]))
parallel.leave()
"""


def test_two_gloo_ranks_see_every_sample_once(pattern, tmp_path):
    (tmp_path / "rank.py").write_text(_RANK)
    (tmp_path / "out").mkdir()
    assert torchrun([str(tmp_path / "rank.py"), pattern, str(tmp_path / "out")]).wait(timeout=300) == 0
    results = [json.loads((tmp_path / f"out/{rank}.json").read_text()) for rank in range(2)]
    assert sorted(results[0][0] + results[1][0]) == list(range(32))
    assert [part[1] for part in results] == [16, 16] and [tuple(part[2]) for part in results] == [SIZES] * 2
    assert json.loads((tmp_path / "out" / COUNTS).read_text()) == dict(zip(shard_urls(pattern), SIZES, strict=True))


def test_a_run_is_resumed_bitwise(pattern, tmp_path, monkeypatch):
    settings = RANKS | {"data": pattern, "batch_size_per_gpu": 4, "epochs": 2}
    whole = PretrainConfig(**settings, output_dir=tmp_path / "whole")
    pretrain(whole)
    part = replace(whole, output_dir=tmp_path / "part")

    original = Run._requests
    monkeypatch.setattr(Run, "_requests", lambda self: (15, 0) if self.step == 5 else original(self))
    with pytest.raises(Interrupted):
        pretrain(part)
    monkeypatch.setattr(Run, "_requests", original)
    counted = []
    monkeypatch.setattr(stream_module, "_count", lambda url: counted.append(url))
    pretrain(replace(part, resume=True))
    assert not counted  # the counts come from shards.json
    assert_same(final_weights(whole), final_weights(part))


def test_a_failing_shard_is_reported_and_its_samples_are_replaced(pattern, tmp_path, caplog):
    shard = tmp_path / "s2.tar"
    shard.write_bytes(shard.read_bytes()[:9000])
    readable = len(list(islice(_until_error(shard_files(str(shard))), 12)))
    assert 0 < readable < 12
    batches = CropLoader(opened(pattern), PICTURE, batch_size=4, seed=0, start_step=0, total_steps=8, num_workers=2)
    bad = [entry for _, found in batches for entry in found]
    assert len(bad) == 12 - readable and {why for _, why in bad} == {"its shard cannot be read"}
    assert [message.partition(" samples")[0] for message in caplog.messages] == [
        f"shard {shard}: only {readable} of 12"
    ]


def _until_error(files):
    try:
        yield from files
    except Exception:
        return


def test_one_bad_image_is_replaced_by_another_of_its_window(pattern, tmp_path):
    with tarfile.open(tmp_path / "s0.tar", "w") as tar:
        for number in range(5):
            add(tar, f"{number:03}.png", b"GIF?" if number == 2 else picture(number))
    kinds = [replace(PICTURE[0], blur=0.0, scale=(1.0, 1.0))]
    batches = CropLoader(opened(pattern), kinds, batch_size=4, seed=0, start_step=0, total_steps=8, num_workers=2)
    assert [name for _, found in batches for name, _ in found] == [f"{tmp_path}/s0.tar: 002.png"]


def test_at_most_one_window_is_prefetched(pattern, monkeypatch):
    read = []
    original = stream_module.shard_files

    def counting(url):
        for file in original(url):
            read.append(file)
            yield file

    monkeypatch.setattr(stream_module, "shard_files", counting)
    iterator = opened(pattern).steps(2, 0, 0, 10_000)
    next(iterator)
    time.sleep(0.5)
    assert len(read) <= 3 * 6 + 1  # one window in use, one in the queue, one waiting for the queue
    iterator.close()
    time.sleep(1)
    assert not [thread for thread in threading.enumerate() if thread.name == "dino-train shards"]


def test_streams_and_compressed_shards(pattern, tmp_path):
    with tarfile.open(tmp_path / "z.tar.gz", "w:gz") as tar:
        add(tar, "a.jpg", b"1")
        add(tar, "b.v2.JPG", b"2")
    urls = [f"pipe:cat {tmp_path}/s2.tar", str(tmp_path / "z.tar.gz")]
    assert count_samples(urls, tmp_path / "out") == [12, 2]
    assert [data for _, data in shard_files(urls[1])] == [b"1", b"2"]
    assert [data for _, data in shard_files(urls[0])] == [picture(n) for n in range(6, 18)]


def test_packed_files_are_shards(tmp_path):
    from dino_train.data.pack import pack
    from pictures import fill

    images = ImageFolder(fill(tmp_path / "set", "a/1.png", "a/2.png", "b/3.png"))
    pack(images, tmp_path / "p0.tar", size=8, quality=90, num_workers=1)
    assert (
        count_samples([str(tmp_path / "p0.tar")], tmp_path) == [3] and len(list(shard_files(f"{tmp_path}/p0.tar"))) == 3
    )


SAMPLES = {
    # members: images, and those that are left out
    "001.jpg 001.cls 001.seg.png 002.mask.png 002.png": ("001.jpg 002.png", "001.seg.png 002.mask.png"),
    "a/2023.01.02.jpg a/2023.01.03.jpg a/2023.01.04.JPG": ("a/2023.01.02.jpg a/2023.01.03.jpg a/2023.01.04.JPG", ""),
    "v1.2.png v1.2.json v1.3.png": ("v1.2.png v1.3.png", ""),
    "x.jpg x.png y.txt y.jpeg": ("x.jpg y.jpeg", "x.png"),
    "x.jpg x.jpg y.jpg x.jpg": ("x.jpg y.jpg", "x.jpg x.jpg"),
    "__a__/x.jpg b/y.jpg": ("__a__/x.jpg b/y.jpg", ""),
    "x.jpg y.jpg x.seg.png y.seg.png": ("x.jpg y.jpg x.seg.png y.seg.png", ""),  # not in a row: samples of their own
    "./x.jpg ../y.jpg .z.jpg __MACOSX/x.jpg @eaDir/x.jpg": ("x.jpg", ""),
}


@pytest.mark.parametrize("names", SAMPLES)
def test_a_shard_has_the_same_images_streamed_and_in_place(tmp_path, names, caplog):
    path, (used, left_out) = tmp_path / "s.tar", SAMPLES[names]
    with tarfile.open(path, "w") as tar:
        for number, name in enumerate(names.split()):
            add(tar, name, picture(number))
    streamed = {name.removeprefix(f"{path}: "): data for name, data in shard_files(str(path))}
    assert list(streamed) == used.split()
    images = ImageFolder(path)
    assert {images.prefix + name: images.read(i) for i, name in enumerate(images.names)} == streamed
    assert count_samples([str(path)], tmp_path) == [len(streamed)]
    assert count_samples([f"pipe:cat {path}"], tmp_path) == [len(streamed)]
    for name in left_out.split():
        assert caplog.text.count("images that are not used") == 2 and name in caplog.text
        assert any("not used" in note and name in note for note in images.notes)
    assert bool(left_out) == bool(caplog.messages)


@pytest.mark.parametrize("url", ["{}", "pipe:cat {}"])
def test_links_in_a_shard_are_named(tmp_path, url, caplog):
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w") as tar:
        add(tar, "x.png", picture(1))
        for name, kind in (("hard.png", tarfile.LNKTYPE), ("soft.png", tarfile.SYMTYPE), ("folder", tarfile.SYMTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "x.png"
            tar.addfile(info)
    assert count_samples([url.format(path)], tmp_path) == [1] and len(list(shard_files(url.format(path)))) == 1
    reason = "a link, which is not followed in a shard"
    assert caplog.messages[0].endswith(f"not used: 3: hard.png ({reason}), soft.png ({reason}), folder ({reason})")


def test_a_folder_of_shards(pattern, tmp_path):
    assert is_shards(tmp_path) and shard_urls(str(tmp_path)) == shard_urls(pattern)
    (tmp_path / "s0.json").touch()
    assert is_shards(tmp_path)
    with pytest.raises(DataError, match=r"found 8 files: .tar 7, .json 1 \(.*shards"):
        ImageFolder(tmp_path)
    (tmp_path / "a.jpg").touch()
    assert not is_shards(tmp_path)


def test_a_damaged_shard_is_not_counted(pattern, tmp_path):
    shard = tmp_path / "s2.tar"
    with tarfile.open(shard) as tar:
        cut = tar.getmembers()[9].offset
    shard.write_bytes(shard.read_bytes()[:cut])
    with pytest.raises(DataError, match="^cannot read shard .*/s2.tar: it is cut off"):
        count_samples([str(shard)], tmp_path)


def test_names_of_shards(tmp_path):
    folder = tmp_path / "odd{1..2}"
    folder.mkdir()
    assert not is_shards(folder) and not is_shards(tmp_path / "gone") and not is_shards("set.tar")
    for data in ("x{0..3}.tar", "https://host/x.tar", "pipe:cat x.tar"):
        assert is_shards(data)
    assert shard_urls("a{0..1}.tar::b.tar") == ["a0.tar", "a1.tar", "b.tar"]


def test_a_missing_shard(pattern, tmp_path):
    (tmp_path / "s3.tar").unlink()
    with pytest.raises(DataError, match=r"^cannot read shard .*/s3.tar: .*No such file"):
        count_samples(shard_urls(pattern), tmp_path)
    assert not (tmp_path / COUNTS).exists()


def test_shards_without_images(tmp_path):
    with tarfile.open(tmp_path / "s0.tar", "w") as tar:
        add(tar, "a.txt", b"1")
    os.symlink(tmp_path / "s0.tar", tmp_path / "s1.tar")
    config = PretrainConfig(**RANKS | {"data": f"{tmp_path}/s{{0..1}}.tar"}, output_dir=Path(tmp_path / "run"))
    with pytest.raises(DataError, match="^there is no image to train on$"):
        pretrain(config)
