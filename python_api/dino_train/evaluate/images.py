"""Random crops of labelled images for training classifiers."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from dino_kernels import CropKind, PixelScale, draw_crops, multicrop
from dino_train.common.scale import pixel_scale
from dino_train.common.views import View, size_of
from dino_train.data.folder import ImageFolder
from dino_train.data.loader import Batch, exactly, image_loader, require_batch


class RandomCrop:
    """Random resized crop (area 8 to 100 %) and random horizontal flip, determined by (seed, epoch, index).

    As eval_linear.py:93-98, but with bicubic instead of bilinear interpolation.
    """

    def __init__(self, size: int, seed: int, scale: PixelScale) -> None:
        self.kind, self.seed = CropKind(size, (0.08, 1.0), blur=0.0, solarize=0.0), seed
        self.scale = pixel_scale(scale.channels, (0, 255), scale.mean, scale.std)  # a view's values are levels

    def __call__(self, view: View, key: tuple[int, int]) -> Tensor:
        crops = draw_crops(self.seed, *key, [self.kind], size_of(view)[::-1])
        crops["jitter"] = crops["grayscale"] = False
        out = torch.empty(1, self.scale.channels, self.kind.size, self.kind.size)
        multicrop([np.asarray(view)], crops[None], [out], scale=self.scale, threads=1)
        return out[0]


def training_loader(
    images: ImageFolder, size: int, batch_size: int, num_workers: int, *, seed: int, start_step: int, total_steps: int
) -> Iterator[Batch]:
    """Random crops of shuffled labelled images for the steps start_step .. total_steps - 1; an epoch has
    len(images) // batch_size steps.

    Raises:
        DataError: the images do not fill one batch.
        RuntimeError: while iterating: there are fewer batches than steps.
    """
    require_batch(len(images), batch_size)
    steps = images.steps(batch_size, seed, start_step, total_steps)
    keys = ((sample.epoch, sample.index) for step in steps for sample in step)
    batches = image_loader(images, RandomCrop(size, seed, images.scale), batch_size, num_workers, keys)
    return exactly(batches, max(0, total_steps - start_step), "batches")
