"""Images from a folder, a .zip or a .tar, and the split into training and held-out images.

train, held_out = split("photos.zip")
pixels = train.pixels(0)        # uint8 [H, W, 3]
"""

import copy
import hashlib
import os
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from dino_train.data.decode import decoded
from dino_train.data.tar_index import Store

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")

Candidate = tuple[str, Callable[[], bytes]]  # the name of an image, and a function that reads its file


class DataError(ValueError):
    """The data set as a whole cannot be used; the message says what was expected and what was found."""


@dataclass(frozen=True)
class Sample:
    """One image of a step. epoch, index: with the seed they determine its random crops; candidates: the image, followed
    by the images that replace it, in this order, if it cannot be read."""

    epoch: int
    index: int
    candidates: Callable[[], Iterator[Candidate]]


def generator(seed: int, *key: int) -> np.random.Generator:
    """The random generator of one part of a run."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=key)))


class ImageFolder:
    """The images of a folder, or of a .zip or .tar of a folder, which is read in place without extraction.

    Includes .jpg .jpeg .png .webp .bmp .tif .tiff (any case) at any depth, follows links, and ignores hidden files and
    `__MACOSX`. If a folder contains only one folder, the root moves down into it.

    names: sorted POSIX paths below the (innermost) root. prefix: that root below `path`, empty or ending in a slash.
    classes: sorted names of the first folder level if every image is in a folder and there are at least two
    folders, else []. labels: index into `classes` of each image, or None without classes.
    Reading is thread-safe.
    Raises DataError if `path` is missing, none of the three kinds, damaged, or contains no image.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        listed, self._read = self._open()
        files = [file for file in listed if not any(map(_is_hidden, file.split("/")))]
        names = sorted({file for file in files if _suffix(file) in SUFFIXES})
        if not names:
            found = Counter(_suffix(file) or "no suffix" for file in files).most_common(5)
            raise DataError(
                f"no images in {self.path}: looked for {' '.join(SUFFIXES)} in it and its subfolders, found "
                + (f"{len(files)} files: {', '.join(f'{s} {n}' for s, n in found)}" if files else "no files")
            )
        prefix = ""
        while (wrapper := names[0].partition("/")[0] + "/") and all(n.startswith(wrapper) for n in names):
            prefix += wrapper
            names = [name.removeprefix(wrapper) for name in names]
        self._set(prefix, names, _classes(names))

    def __len__(self) -> int:
        return len(self.names)

    def pixels(self, i: int) -> np.ndarray:
        """Image i: uint8 [H, W, 3], RGB; see `decode`. Raises UnreadableImage, whose name is the path below `path`."""
        return decoded(*self._candidate(i))

    def load(self, i: int) -> Image.Image:
        """Image i as a `PIL.Image`."""
        return Image.fromarray(self.pixels(i))

    def read(self, i: int) -> bytes:
        """The bytes of the file of image i; almost any exception may be raised."""
        return self._candidate(i)[1]()

    def sample(self, epoch: int, index: int) -> Sample:
        """Image `index`; the next images (index + 1, ... modulo n) replace it if it cannot be read. A replacement uses
        the random numbers of `index`, so its crops differ from those it has as a sample of the same epoch."""
        n = len(self)
        return Sample(epoch, index, lambda: (self._candidate((index + k) % n) for k in range(n)))

    def steps(
        self, batch_size: int, seed: int, start_step: int, total_steps: int, rank: int = 0, ranks: int = 1
    ) -> Generator[list[Sample], None, None]:
        """A rank's samples of each of the global steps start_step .. total_steps - 1.

        An epoch is len(self) // batch_size steps through a permutation that depends only on (seed, epoch); the
        remaining images are dropped. A rank gets 1 / ranks of each batch.
        """
        order, shuffled_epoch, per_rank = np.empty(0, int), -1, batch_size // ranks
        for step in range(start_step, total_steps):
            epoch, position = divmod(step, len(self) // batch_size)
            if epoch != shuffled_epoch:
                order, shuffled_epoch = generator(seed, epoch).permutation(len(self)), epoch
            start = position * batch_size + rank * per_rank
            yield [self.sample(epoch, int(index)) for index in order[start : start + per_rank]]

    def _candidate(self, i: int) -> Candidate:
        name = self.prefix + self.names[i]
        return name, partial(self._read, name)

    def subset(self, indices: Sequence[int]) -> "ImageFolder":
        """The images at `indices` only, with the same `classes`."""
        return self._view("", [self.names[i] for i in indices], self.classes)

    def below(self, folder: str) -> "ImageFolder":
        """The images below one first-level folder; names and classes are relative to it."""
        start = folder + "/"
        names = [name.removeprefix(start) for name in self.names if name.startswith(start)]
        return self._view(start, names, _classes(names))

    def _view(self, prefix: str, names: list[str], classes: list[str]) -> "ImageFolder":
        view = copy.copy(self)
        view._set(self.prefix + prefix, names, classes)
        return view

    def _set(self, prefix: str, names: list[str], classes: list[str]) -> None:
        self.prefix, self.names, self.classes = prefix, names, classes
        number = {name: i for i, name in enumerate(classes)}
        self.labels = [number[name.partition("/")[0]] for name in names] if classes else None

    def _open(self) -> tuple[list[str], Callable[[str], bytes]]:
        """All files as POSIX paths below `path`, and a function that reads one of them."""
        path = self.path
        if not path.exists():
            raise DataError(f"no such folder, zip or tar file: {path}")
        if path.is_dir():
            try:
                return list(_walk(str(path))), lambda name: (path / name).read_bytes()
            except OSError as error:
                raise DataError(f"cannot list {error.filename or path}: {error.strerror}") from error
        kind = path.suffix.lower()
        if kind != ".tar" and zipfile.is_zipfile(path):
            kind = ".zip"
        try:
            if kind == ".zip":
                archive = zipfile.ZipFile(path)
                return [name for name in archive.namelist() if not name.endswith("/")], archive.read
            if kind == ".tar":
                store = Store(path)
                return store.names(), store.read
        except (zipfile.BadZipFile, tarfile.TarError, ValueError) as error:
            raise DataError(f"{path} is a damaged {kind[1:]} ({error}): copy or download it again") from error
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from error
        raise DataError(
            f"{path} is neither a folder nor a zip nor a tar: expected a folder of images, or a .zip or .tar of one"
        )


def _walk(folder: str, prefix: str = "", parents: frozenset[str] = frozenset()) -> Iterator[str]:
    """Files below a folder, without hidden folders; a link to a parent folder is not followed."""
    real = os.path.realpath(folder)
    if real in parents:
        return
    for entry in os.scandir(folder):
        if not entry.is_dir():
            yield prefix + entry.name
        elif not _is_hidden(entry.name):
            yield from _walk(entry.path, f"{prefix}{entry.name}/", parents | {real})


def _is_hidden(part: str) -> bool:
    return (part.startswith(".") and part != ".") or part == "__MACOSX"


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _classes(names: list[str]) -> list[str]:
    classes = sorted({name.partition("/")[0] for name in names})
    return classes if len(classes) > 1 and all("/" in name for name in names) else []


def split(path: str | Path) -> tuple[ImageFolder, ImageFolder]:
    """Open `path` as (train, held_out), two ImageFolders with the same `classes`.

    If its root has the folders `train` and `val`, these are used. Otherwise the min(512, n // 20) images with the
    smallest SHA-256 of their name are held out: the same on every machine, and for a folder and a zip of it. If there
    is `train` without `val`, only the images of `train` are used. Raises DataError as ImageFolder does.
    """
    images = ImageFolder(path)
    tops = {name.partition("/")[0] for name in images.names if "/" in name}
    if "train" in tops and "val" in tops:
        train, held_out = images.below("train"), images.below("val")
        classes = _classes(train.names + held_out.names)
        return train._view("", train.names, classes), held_out._view("", held_out.names, classes)
    if "train" in tops:
        images = images.below("train")
    # Not CRC-32: it is linear, so it would favor some classes among numbered names.
    digests = [hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest() for name in images.names]
    order = sorted(range(len(images)), key=digests.__getitem__)
    n_held_out = min(512, len(images) // 20)
    return images.subset(sorted(order[n_held_out:])), images.subset(sorted(order[:n_held_out]))
