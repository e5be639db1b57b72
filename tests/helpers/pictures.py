"""Small images and archives for the tests of reading and loading."""

import zipfile

import numpy as np
from PIL import Image


def save(path, image=None, **options):
    """Save an image (8 x 8 noise, different for each name) in the format of the suffix."""
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
