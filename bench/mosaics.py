"""A segmentation set from labelled images: mosaics of 2 x 2 of them, and masks with the class of each.

    python bench/mosaics.py --data FOLDER_OR_ZIP --output mosaics [--train 400] [--val 200]

What a patch shows is known there without anyone drawing a mask. Images are of one size, the four of a mosaic random
ones; those of val/ are held out from training. Writes train/ and val/ with images/ and masks/, as `dino-train evaluate
segmentation` reads them.
"""

import argparse
from pathlib import Path

import numpy as np
from dino_train.common.views import size_of
from dino_train.data.folder import ImageFolder, pretraining_split
from PIL import Image


def make(images: ImageFolder, folder: Path, count: int, side: int, seed: int) -> None:
    assert images.labels is not None, "the images need class folders"
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    for number in range(count):
        picture = Image.new("RGB", (2 * side, 2 * side))
        mask = np.empty((2 * side, 2 * side), np.uint8)
        for place, i in enumerate(random.choice(len(images), 4, replace=False).tolist()):
            y, x = side * (place // 2), side * (place % 2)
            tile = images.load(i)
            smaller = min(tile.size)
            left, top = (tile.width - smaller) // 2, (tile.height - smaller) // 2
            box = (left, top, left + smaller, top + smaller)
            picture.paste(tile.resize((side, side), Image.Resampling.BICUBIC, box), (x, y))
            mask[y : y + side, x : x + side] = images.labels[i]
        picture.save(folder / f"images/{number:04}.png")
        Image.fromarray(mask).save(folder / f"masks/{number:04}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--train", type=int, default=400, help="number of mosaics")
    parser.add_argument("--val", type=int, default=200, help="number of mosaics")
    options = parser.parse_args()
    _, train, val = pretraining_split(options.data)
    side = min(size_of(train.view(0)))
    make(train, options.output / "train", options.train, side, 0)
    make(val, options.output / "val", options.val, side, 1)


if __name__ == "__main__":
    main()
