"""Loaders of transformed images, beside `data.eval_loader`: any transform, or random crops for training."""

import signal
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dino_train.augment import crop_generator, draw_box, to_tensor
from dino_train.data import Batches, ImageFolder, UnreadableImage
from dino_train.evaluate.features import Batch

Sample = tuple[Tensor | None, int, int, list[tuple[str, str]]]


class Transformed(Dataset[Sample]):
    """`transform(image, (epoch, index))` of each image, keyed by that pair."""

    def __init__(self, images: ImageFolder, transform: Callable[[Image.Image, tuple[int, int]], Tensor]) -> None:
        self.images, self.transform = images, transform

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        index = key[1]
        try:
            image = self.images.load(index)
        except UnreadableImage as error:
            return None, -1, index, [(error.name, error.reason)]
        label = -1 if self.images.labels is None else self.images.labels[index]
        return self.transform(image, key), label, index, []


class RandomCrop:
    """Crop of random place, area (8 to 100 %) and aspect ratio, mirrored at random; a function of (seed, epoch, index).

    As eval_linear.py:93-98, but resized with a bicubic filter in place of a bilinear one.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed = size, seed

    def __call__(self, image: Image.Image, key: tuple[int, int]) -> Tensor:
        rng = crop_generator(self.seed, *key, 0)
        image = image.crop(draw_box(rng, (0.08, 1.0), image.size))
        image = image.resize((self.size, self.size), Image.Resampling.BICUBIC)
        if rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return to_tensor(image)


def collate(samples: Sequence[Sample]) -> Batch:
    """Samples to tensors over the readable images, and the merged list of unreadable ones."""
    readable = [(pixels, label, index) for pixels, label, index, _ in samples if pixels is not None]
    bad = [entry for *_, entries in samples for entry in entries]
    if not readable:
        none = torch.empty(0, dtype=torch.int64)
        return torch.empty(0), none, none, bad
    pixels, labels, indices = zip(*readable, strict=True)
    return torch.stack(pixels), torch.tensor(labels), torch.tensor(indices), bad


def image_loader(
    images: ImageFolder, transform: Callable[[Image.Image, tuple[int, int]], Tensor], batch_size: int, num_workers: int
) -> DataLoader[Any]:
    """Every image once, in order, as `data.eval_loader`; images of a batch must come out in one size."""
    keys = [(0, index) for index in range(len(images))]
    batches = [keys[i : i + batch_size] for i in range(0, len(keys), batch_size)]
    return _loader(Transformed(images, transform), batches, num_workers)


def training_loader(
    images: ImageFolder, size: int, batch_size: int, num_workers: int, *, seed: int, start_step: int, total_steps: int
) -> DataLoader[Any]:
    """Random crops of shuffled labelled images for the steps from `start_step`, len(images) // batch_size an epoch."""
    batches = Batches(len(images), batch_size, seed, start_step, total_steps)
    return _loader(Transformed(images, RandomCrop(size, seed)), batches, num_workers)


def _loader(dataset: Transformed, batches: Any, num_workers: int) -> DataLoader[Any]:
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=collate,
        worker_init_fn=_ignore_ctrl_c,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # iterating would otherwise advance the global generator
    )


def _ignore_ctrl_c(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to the workers too; the main process ends them
