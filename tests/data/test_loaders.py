"""Loaders: batches, threads, unreadable and slow images, memory."""

import gc
import itertools
import logging
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from dino_train.common.masks import MaskKind
from dino_train.common.scale import IMAGENET_MEAN, IMAGENET_STD
from dino_train.common.views import eval_transform, to_tensor
from dino_train.config.pretrain import PretrainConfig
from dino_train.data import loader as loader_module
from dino_train.data.folder import DataError, ImageFolder
from dino_train.data.loader import (
    BadImages,
    CropLoader,
    eval_loader,
    require_batch,
)
from dino_train.data.threads import Threads
from pictures import fill, save, zip_of
from PIL import Image

from dino_kernels import CropKind, draw_crops, multicrop

KINDS = PretrainConfig(global_crops_size=16, patch_size=8, local_crops_size=8, local_crops_number=2).crop_kinds


@pytest.fixture
def root(tmp_path):
    """Ten images in two classes; a/1 and a/2 are unreadable."""
    root = fill(tmp_path / "set", *(f"{'ab'[i // 5]}/{i}.png" for i in range(10)))
    (root / "a/1.png").write_bytes(b"")
    (root / "a/2.png").write_bytes(b"GIF?")
    return root


def loader(images, num_workers=2, start_step=0, total_steps=7, seed=3, **options):
    settings = {"batch_size": 4, "seed": seed, "start_step": start_step, "total_steps": total_steps}
    return CropLoader(images, KINDS, num_workers=num_workers, **settings | options)


def run(path, *arguments, **options):
    """All batches, copied, since their memory is reused."""
    batches = loader(ImageFolder(path), *arguments, **options)
    return [([crop.clone() for crop in crops], bad) for crops, bad in batches]


def assert_same(first, second):
    assert len(first) == len(second)
    for (crops, _), (other, _) in zip(first, second, strict=True):
        assert all(map(torch.equal, crops, other))


def crops_of(images, image, epoch, index):
    """Crops of one image with the random numbers of an index."""
    pixels = images.pixels(image)
    out = [torch.empty(1, 3, kind.size, kind.size) for kind in KINDS]
    multicrop([pixels], draw_crops(3, epoch, index, KINDS, pixels.shape[:2])[None], out)
    return [crop[0] for crop in out]


def test_crops_do_not_depend_on_threads_resume_or_zip(root):
    whole = run(root, 1)
    assert [[tuple(c.shape) for c in crops] for crops, _ in whole] == [[(4, 3, 16, 16)] * 2 + [(4, 3, 8, 8)] * 2] * 7
    assert {c.dtype for crops, _ in whole for c in crops} == {torch.float32}
    assert_same(whole, run(zip_of(root), 3))
    assert_same(whole[3:], run(root, 2, start_step=3))
    assert_same(whole[:5], run(root, 1, total_steps=5))
    assert run(root, 1, start_step=7) == []
    assert not torch.equal(whole[0][0][0], run(root, 1, total_steps=1, seed=4)[0][0][0])
    for batches in (whole, run(root, 3)):
        bad = Counter(name for _, bad in batches for name, _ in bad)
        assert bad == {"a/1.png": 1, "a/2.png": 1}  # each reported once


def test_ranks_share_every_batch(root):
    whole = run(root)
    parts = [run(root, rank=rank, ranks=2) for rank in range(2)]
    for step, (crops, _) in enumerate(whole):
        shares = (parts[rank][step][0] for rank in range(2))
        assert all(map(torch.equal, crops, map(torch.cat, zip(*shares, strict=True))))


def test_masks_follow_the_crops(root):
    kind = MaskKind(4, 0.5, (0.2, 0.5), 2)  # of micro-batches of half a batch
    whole = run(root, masks=kind)
    samples = list(ImageFolder(root).steps(4, 3, 0, 7))
    for (crops, _), step, (others, _) in zip(whole, samples, run(root), strict=True):
        expected = [kind.draw(3, sample.epoch, sample.index, row) for row, sample in enumerate(step)]
        assert torch.equal(crops[-1], torch.from_numpy(np.stack(expected)))
        assert all(map(torch.equal, crops[:-1], others))
    assert_same(whole[3:], run(root, 1, start_step=3, masks=kind))
    parts = [run(root, rank=rank, ranks=2, masks=kind) for rank in range(2)]
    assert torch.equal(whole[0][0][-1], torch.cat([part[0][0][-1] for part in parts]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_crops(root, dtype):
    for (crops, _), (exact, _) in zip(run(root, dtype=dtype), run(root), strict=True):
        assert all(torch.equal(crop, other.to(dtype)) for crop, other in zip(crops, exact, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_crops_of_a_gpu(root, dtype):
    batches = [
        ([crop.cpu() for crop in crops], bad) for crops, bad in loader(ImageFolder(root), dtype=dtype, device="cuda")
    ]
    assert_same(batches, run(root, dtype=dtype))


def test_samples_and_replacements(root):
    images = ImageFolder(root)
    samples = [sample for step in images.steps(4, 3, 0, 7) for sample in step]
    rows = [tuple(crop[i] for crop in crops) for crops, _ in run(root) for i in range(4)]
    taken = {1: 3, 2: 3}  # the next readable image, with the random numbers of the original index
    for sample, row in zip(samples, rows, strict=True):
        image = taken.get(sample.index, sample.index)
        assert all(map(torch.equal, row, crops_of(images, image, sample.epoch, sample.index)))
    assert {sample.index for sample in samples} == set(range(10))
    names = [name for name, _ in itertools.islice(images.sample(0, 8).candidates(), 4)]
    assert names == ["b/8.png", "b/9.png", "a/0.png", "a/1.png"]


def test_bad_images_are_decoded_once(root, monkeypatch):
    read: Counter[str] = Counter()
    images = ImageFolder(root)
    original = images._read

    def counting(name):
        read[name] += 1
        return original(name)

    monkeypatch.setattr(images, "_read", counting)
    for _ in loader(images, 1, total_steps=20):
        pass
    assert read["a/1.png"] == read["a/2.png"] == 1 and read["a/3.png"] > 10


@pytest.mark.parametrize("num_workers", [1, 2])
def test_no_image_can_be_read(root, num_workers):
    for file in root.rglob("*.png"):
        file.write_bytes(b"")
    message = r"^none of the 10 images could be read, the first: [ab]/\d.png: empty file$"
    with pytest.raises(DataError, match=message):
        list(loader(ImageFolder(root), num_workers))


def test_steps():
    class Numbers(ImageFolder):
        def __init__(self):
            self._prefix, self.names = "", [str(i) for i in range(10)]

        def _read(self, name):
            raise AssertionError

    def steps(size=3, seed=5, start=0, total=7):
        return [[(s.epoch, s.index) for s in step] for step in Numbers().steps(size, seed, start, total)]

    whole = steps()
    assert [{epoch for epoch, _ in step} for step in whole] == [{0}] * 3 + [{1}] * 3 + [{2}]
    for epoch in range(2):
        indices = [i for step in whole[3 * epoch : 3 * epoch + 3] for _, i in step]
        assert len(indices) == len(set(indices)) == 9 and set(indices) <= set(range(10))
    assert [i for _, i in whole[0]] != [i for _, i in whole[3]] and whole[0] != steps(seed=6)[0]
    assert steps(start=4) == whole[4:] and steps(start=4, total=5) == whole[4:5]
    assert all(type(i) is int for step in whole for _, i in step)
    assert {i for epoch in range(60) for _, i in steps(start=3 * epoch, total=3 * epoch + 1)[0]} == set(range(10))


def test_fewer_images_than_one_batch(root):
    message = "^10 images are fewer than one batch of 11: add images or set the batch size to 10 or less$"
    with pytest.raises(DataError, match=message):
        require_batch(10, 11)
    require_batch(10, 10)
    with pytest.raises(DataError, match=message):
        loader(ImageFolder(root), batch_size=11)


def test_prefetching_is_bounded(root, monkeypatch):
    images = ImageFolder(root)
    read: list[str] = []
    original = images._read
    monkeypatch.setattr(images, "_read", lambda name: read.append(name) or original(name))
    with closing(iter(loader(images, 2, total_steps=1000))) as batches:
        for _ in range(3):
            next(batches)
        time.sleep(0.3)
        assert len(read) <= 4 * (3 + 2) + 8  # three batches, two prefetched, and replacements


def test_a_slow_image_is_replaced_and_does_not_block_others(root, monkeypatch, caplog):
    images = ImageFolder(root)
    original, awake = images._read, threading.Event()

    def read(name):
        if name == "b/7.png":
            awake.wait()
        return original(name)

    monkeypatch.setattr(images, "_read", read)
    monkeypatch.setattr(loader_module, "STALL_SECONDS", 1.5)
    samples = [sample for step in images.steps(4, 3, 0, 7) for sample in step]
    rows, bad = [], []
    for crops, found in loader(images, 2):
        rows += [tuple(crop[i].clone() for crop in crops) for i in range(4)]
        bad += found
    assert bad.count(("b/7.png", "not read within 2 s")) == sum(sample.index == 7 for sample in samples) > 0
    for sample, row in zip(samples, rows, strict=True):
        if sample.index in (7, 8):
            assert all(map(torch.equal, row, crops_of(ImageFolder(root), 8, sample.epoch, sample.index)))
    awake.set()  # late reads must not write
    time.sleep(0.2)
    assert torch.equal(crops[0], torch.stack([row[0] for row in rows[-4:]]))


def test_threads_end_with_the_loader(root):
    def threads():
        return [thread for thread in threading.enumerate() if thread.name == "dino-train worker"]

    before = len(threads())
    batches = iter(loader(ImageFolder(root), 3, total_steps=1000))
    next(batches)
    assert len(threads()) == before + 3
    batches.close()
    assert len(threads()) == before
    views = eval_loader(ImageFolder(root), 16, 2, 2)
    next(views)
    views.close()
    assert len(threads()) == before


def test_a_loader_in_use_does_not_block_the_exit_of_the_process(root):
    code = (
        "import sys, time; from dino_train.config.pretrain import PretrainConfig\n"
        "from dino_train.data.folder import ImageFolder\n"
        "from dino_train.data.loader import CropLoader\n"
        "images, seen = ImageFolder(sys.argv[1]), []; read = images._read\n"
        "images._read = lambda name: read(name) if len(seen) < 9 and not seen.append(name) else time.sleep(99)\n"
        "loader = CropLoader(images, PretrainConfig().crop_kinds, batch_size=4, seed=0,\n"
        "    start_step=0, total_steps=99, num_workers=int(sys.argv[2]))\n"
        "loader.steps = iter(loader); next(loader.steps)"
    )
    for workers in (1, 4):  # they are in a hanging read, or cropping, when the process ends
        subprocess.run([sys.executable, "-c", code, str(root), str(workers)], check=True, timeout=60)


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
def test_memory_does_not_grow(root):
    sizes = {}
    for step, _ in enumerate(loader(ImageFolder(root), 2, total_steps=4001)):
        if step in (1000, 4000):
            gc.collect()
            sizes[step] = resident()
    assert sizes[4000] - sizes[1000] < 4 << 20  # 12,000 samples in between


# ---- decoding at reduced size


def photo(width, height, seed=0):
    """A smooth image, so that two good downscaling methods agree."""
    y, x = np.mgrid[:height, :width] / 90
    waves = [127 + 100 * np.sin(x * (1 + c) + seed) * np.cos(y * (2 - c / 2)) for c in range(3)]
    return Image.fromarray(np.stack(waves, -1).astype(np.uint8))


def test_scaled_decode_is_used_if_all_crops_allow_it_and_changes_little(tmp_path, monkeypatch):
    for i in range(4):
        save(tmp_path / f"{i}.jpg", photo(640, 480, i), quality=95)
    scales = []
    original = loader_module.decode_smaller

    def decode_smaller(data, shrink):
        image = original(data, shrink)
        scales.append(480 / image.shape[0])
        return image

    monkeypatch.setattr(loader_module, "decode_smaller", decode_smaller)
    kinds = [CropKind(size, (0.2, 1.0), 0.0, 0.0) for size in (64, 32)]
    options = {"batch_size": 4, "seed": 0, "start_step": 0, "total_steps": 8, "num_workers": 1}
    images = ImageFolder(tmp_path)
    exact = [[c.clone() for c in crops] for crops, _ in CropLoader(images, kinds, **options)]
    assert not scales
    near = [[c.clone() for c in crops] for crops, _ in CropLoader(images, kinds, **options, scaled_decode=True)]
    assert len(scales) == 32 and min(scales) >= 2 and len(set(scales)) > 1
    pairs = zip(itertools.chain(*exact), itertools.chain(*near), strict=True)
    difference = torch.cat([(a - b).abs().flatten() for a, b in pairs])
    assert 0 < difference.mean() < 0.05 and difference.max() < 0.8  # of a range of about 4.7
    with monkeypatch.context() as patch:  # neither does Pillow's limit hold for what is shrunk
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
        next(iter(CropLoader(images, kinds, **options, scaled_decode=True)))
        scales = scales[:32]
    tight = [CropKind(400, (0.2, 1.0), 0.0, 0.0)]
    next(iter(CropLoader(images, tight, **options, scaled_decode=True)))
    assert len(scales) == 32  # upscaled crops need the full image


# ---- evaluation


def noise(width, height):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3))
    return Image.fromarray(pixels.astype(np.uint8))


def levels(tensor):
    """Undo the normalization: int [H, W, 3]."""
    value = (tensor.permute(1, 2, 0).double().numpy() * IMAGENET_STD + IMAGENET_MEAN) * 255
    assert np.abs(value - np.round(value)).max() < 1e-3
    return np.round(value).astype(int)


def test_to_tensor():
    image = noise(31, 17)
    expected = (np.asarray(image).astype(np.float64) / 255 - IMAGENET_MEAN) / IMAGENET_STD
    tensor = to_tensor(image)
    assert tensor.dtype == torch.float32 and tensor.shape == (3, 17, 31) and tensor.is_contiguous()
    np.testing.assert_allclose(tensor.permute(1, 2, 0).numpy(), expected, rtol=0, atol=1e-6)


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


def test_no_workers(root):
    with pytest.raises(ValueError, match="num_workers must be at least 1, got 0"):
        list(eval_loader(ImageFolder(root), size=16, batch_size=2, num_workers=0))


@pytest.mark.parametrize("num_workers", [1, 2])
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
    batches = list(eval_loader(images, size=16, batch_size=1, num_workers=1))
    assert [labels.tolist() for _, labels, _, _ in batches] == [[-1], []]
    assert not len(batches[1][0]) and batches[1][3] == [("1.png", "empty file")]
    assert list(eval_loader(images.subset([]), size=16, batch_size=1, num_workers=1)) == []


def test_loaders_do_not_use_the_global_generator(root):
    state = torch.get_rng_state()
    run(root, 2, total_steps=1)
    list(eval_loader(ImageFolder(root), size=16, batch_size=5, num_workers=1))
    assert torch.equal(torch.get_rng_state(), state)


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


@pytest.mark.parametrize("share, n_images, most", [(0.05, 400, 20), (0.05, 60, 10), (0.0, 400, 0), (1.0, 40, 40)])
def test_the_share_of_unreadable_images_is_limited(share, n_images, most):
    bad_images = BadImages(n_images, batch_size=0, share=share)
    bad_images.add([(f"{i}.png", "truncated") for i in range(most)])
    bad_images.add([("0.png", "truncated")] if most else [])
    if share < 1:
        first = "z" if not most else "0"
        message = rf"^more than {share:.3g} of the {n_images} images .* --max-unreadable. {most + 1}: {first}.png \("
        with pytest.raises(DataError, match=message):
            bad_images.add([("z.png", "empty file")])


def test_too_few_readable_images():
    bad_images = BadImages(n_images=40, batch_size=16)
    bad_images.add([(f"{i}.png", "truncated") for i in range(24)])
    message = "^only 15 of 40 images could be read, fewer than one batch of 16: z.png: empty file$"
    with pytest.raises(DataError, match=message):
        bad_images.add([("z.png", "empty file")])
    evaluation = BadImages(n_images=2, batch_size=0)
    evaluation.add([("a.png", "truncated"), ("b.png", "truncated")])
    assert evaluation.count == 2


def test_a_pool_closes_though_a_signal_came_before_the_start_of_a_thread():
    pool = Threads(1)
    pool._threads.append(threading.Thread(target=pool._run))
    pool.close()
    assert not pool._threads[0].is_alive()
