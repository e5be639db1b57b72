"""The loaders: batches, workers, unreadable images."""

import logging
import multiprocessing
import os
import pickle
import subprocess
import sys
import traceback
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
    collate,
    crop_loader,
    eval_loader,
    require_batch,
)
from pictures import fill, save, zip_of
from PIL import Image

MULTICROP = MultiCrop(global_crops_size=16, local_crops_size=8, local_crops_number=2)


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
    subprocess.run([sys.executable, "-c", code, str(root)], check=True, timeout=120)


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
