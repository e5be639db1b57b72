"""Masks of patches of global crops, drawn from (seed, epoch, index) as crops are."""

import math
from dataclasses import dataclass

import numpy as np

_LEAST_AREA, _LARGEST_ASPECT, _TRIES = 4, 1 / 0.3, 10  # dinov2/data/masking.py:20-22 and :48


@dataclass(frozen=True)
class MaskKind:
    """Which patches of the two global crops of an image are hidden from the student.

    A share of the views has a mask, and the masks' sizes are spread evenly over a range, as in
    dinov2/data/collate.py:20-46; here within each micro-batch, so that it hides about as many patches as any other. An
    image's place in it decides whether it has one mask or two and how large they are, where DINOv2 shuffles the masks.

    Args:
        side: patches of a row and of a column.
        probability: share of the views that have a mask, in (0, 1].
        ratio: the least and the largest share of a view's patches that a mask hides.
        images: of a micro-batch.
    """

    side: int
    probability: float
    ratio: tuple[float, float]
    images: int

    @property
    def masks(self) -> int:
        """Views of a micro-batch that have a mask."""
        return math.floor(2 * self.images * self.probability)

    @property
    def most(self) -> int:
        """Patches of a micro-batch that are hidden at most."""
        return sum(self._count(number, 1.0) for number in range(self.masks))

    def draw(self, seed: int, epoch: int, index: int, row: int) -> np.ndarray:
        """bool [2, side * side], true where a patch of a global crop of image `index` is hidden.

        Args:
            seed, epoch, index: whole numbers >= 0.
            row: of the image in the batch, which decides on the sizes of its masks.
        """
        generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(epoch, index, 1))))
        hidden = np.zeros((2, self.side, self.side), bool)
        views = hidden[::-1] if generator.random() < 0.5 else hidden
        for view, slot in zip(views, range(2 * (row % self.images), 2 * self.images), strict=False):
            number = math.floor(slot * self.probability)
            if number < math.floor((slot + 1) * self.probability):
                _hide(view, self._count(number, generator.random()), generator)
        return hidden.reshape(2, -1)

    def _count(self, number: int, u: float) -> int:
        """Patches that a mask hides, by its number in the micro-batch and a number in [0, 1]."""
        low, high = self.ratio
        return int((low + (high - low) * (number + u) / self.masks) * self.side**2)


def _hide(mask: np.ndarray, count: int, generator: np.random.Generator) -> None:
    """Set `count` patches of a mask [side, side]: blocks of random sizes and aspects as long as one fits (BEiT, arXiv
    2106.08254, algorithm 1), then single patches."""
    side, left = len(mask), count
    while left >= _LEAST_AREA:
        for _ in range(_TRIES):
            area, (log_aspect, y, x) = generator.uniform(_LEAST_AREA, left), generator.random(3)
            stretch = math.sqrt(_LARGEST_ASPECT ** (2 * log_aspect - 1))
            height, width = round(math.sqrt(area) * stretch), round(math.sqrt(area) / stretch)
            if not 0 < height < side > width > 0:
                continue
            top, first = int(y * (side - height + 1)), int(x * (side - width + 1))
            block = mask[top : top + height, first : first + width]
            added = block.size - int(np.count_nonzero(block))
            if 0 < added <= left:
                block[:] = True
                left -= added
                break
        else:
            break
    mask.flat[generator.choice(np.flatnonzero(~mask), left, replace=False)] = True
