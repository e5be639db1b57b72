"""Images from a folder, a .zip or a .tar, and the split into training and held-out images.

train, held_out = split("photos.zip")
pixels = train.pixels(0)        # uint8 [H, W, 3]
"""

import copy
import hashlib
import logging
import os
import re
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from dino_kernels import PixelScale
from dino_train.common.views import View, as_picture
from dino_train.data.archive import Zip
from dino_train.data.decode import decode, decoded, load_view
from dino_train.data.names import CAMERA_SUFFIXES, DEEP_SUFFIXES, SUFFIXES, is_hidden, is_image, junk_of, listed, suffix
from dino_train.data.tar_index import Store

# Names of the parts of a split, the usual one first. `pool`: images to train on that have no labels.
_PARTS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "eval", "dev"),
    "test": ("test", "testing"),
    "pool": ("unlabeled", "unlabelled", "unsup", "unsupervised", "extra"),
}
_PART_OF = {word: part for part, words in _PARTS.items() for word in words}

logger = logging.getLogger(__name__)

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

    Includes files with one of `SUFFIXES` (any case) at any depth, follows links, and ignores hidden files, thumbnails,
    recycle bins and the like. If a folder contains only one folder, the root moves down into it.

    names: sorted POSIX paths below the (innermost) root. prefix: that root below `path`, empty or ending in a slash.
    classes: sorted names of the first folder level if every image is in a folder and there are at least two
    folders, else []. labels: index into `classes` of each image, or None without classes.
    scale: what the values of the images mean; 8-bit RGB unless `scaled` says otherwise.
    notes: what of the data is not used, and how much, a line each.
    Reading is thread-safe.
    Raises DataError if `path` is missing, none of the three kinds, damaged, or contains no image.
    """

    def __init__(self, path: str | Path) -> None:
        self.path, self.notes, self.scale = Path(path), list[str](), PixelScale()
        found, self._read = self._open()
        files = [file for file in found if not any(map(is_hidden, file.split("/")))]
        places = list(map(junk_of, files))
        junk = Counter(place for file, place in zip(files, places, strict=True) if place and is_image(file))
        files = [file for file, place in zip(files, places, strict=True) if not place]
        names = sorted(filter(is_image, files)) or sorted(file for file in files if suffix(file) in DEEP_SUFFIXES)
        taken = set(names)
        others = Counter(suffix(file) or "no suffix" for file in files if file not in taken)
        if foreign := Counter({end: others[end] for end in CAMERA_SUFFIXES if end in others}):
            self.notes.append(f"pictures of these kinds are not read, convert them to JPEG or PNG: {_counted(foreign)}")
        if not names:
            raise DataError(
                f"no images in {self.path}: looked for {' '.join(SUFFIXES + DEEP_SUFFIXES)} in it and its subfolders, "
                "found "
                + (f"{others.total()} files: {_counted(others)}" if others else "no files")
                + (" (a folder of shards is for pretrain only)" if ".tar" in others else "")
                + "".join(f"; {note}" for note in self.notes)
            )
        if rest := others - foreign:
            self.notes.append(f"files whose suffix is not that of an image are not read: {_counted(rest)}")
        if junk:
            self.notes.append(f"images in folders of other programs are not used: {_counted(junk)}")
        prefix = ""
        while (wrapper := names[0].partition("/")[0] + "/") and all(n.startswith(wrapper) for n in names):
            prefix += wrapper
            names = [name.removeprefix(wrapper) for name in names]
        self._set(prefix, names, _classes(names))

    def __len__(self) -> int:
        return len(self.names)

    def log_notes(self) -> None:
        """Log what of the data is not used."""
        for note in self.notes:
            logger.warning("%s: %s", self.path, note)

    def pixels(self, i: int) -> np.ndarray:
        """Image i: uint8 [H, W, 3], RGB; see `decode`. Raises UnreadableImage, whose name is the path below `path`."""
        return decoded(*self._candidate(i), decode)

    def view(self, i: int) -> View:
        """Image i as evaluations see it; raises UnreadableImage."""
        return decoded(*self._candidate(i), partial(load_view, scale=self.scale))

    def load(self, i: int) -> Image.Image:
        """Image i as a `PIL.Image`, RGB, to be looked at."""
        return as_picture(self.view(i))

    def scaled(self, scale: PixelScale) -> "ImageFolder":
        """The same images of another scale."""
        view = copy.copy(self)
        view.scale = scale
        return view

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
            skipped = dict[str, str]()
            try:
                files = list(_walk(str(path), skipped))
            except OSError as error:
                raise DataError(f"cannot list {error.filename or path}: {error.strerror}") from error
            if skipped:
                self.notes.append(f"folders that cannot be listed are skipped: {listed(skipped)}")
            return files, lambda name: (path / name).read_bytes()
        kind = path.suffix.lower()
        if kind != ".tar" and zipfile.is_zipfile(path):
            kind = ".zip"
        try:
            if kind in (".zip", ".tar"):
                archive = Zip(path) if kind == ".zip" else Store(path)
                if archive.left_out:
                    self.notes.append(f"members of the archive that are not used: {listed(archive.left_out)}")
                return archive.names(), archive.read
        except (zipfile.BadZipFile, tarfile.TarError, ValueError) as error:
            raise DataError(f"{path} is a damaged {kind[1:]} ({error}): copy or download it again") from error
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from error
        raise DataError(
            f"{path} is neither a folder nor a zip nor a tar: expected a folder of images, or a .zip or .tar of one"
        )


def _walk(
    folder: str, skipped: dict[str, str], prefix: str = "", parents: frozenset[str] = frozenset()
) -> Iterator[str]:
    """Files below a folder, without hidden folders; a link to a parent folder is not followed. Subfolders that cannot
    be listed are added to `skipped`, with the reason."""
    real = os.path.realpath(folder)
    if real in parents:
        return
    try:
        entries = list(os.scandir(folder))
    except OSError as error:
        if not prefix:
            raise
        skipped[prefix] = error.strerror or str(error)
        return
    for entry in entries:
        if not _is_folder(entry):
            yield prefix + entry.name
        elif not is_hidden(entry.name):
            yield from _walk(entry.path, skipped, f"{prefix}{entry.name}/", parents | {real})


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that may not be followed; if it has the name of an image, reading it reports it
        return False


def _counted(counts: Counter[str]) -> str:
    """The most common of them: .txt 7, .csv 2, others 3"""
    common = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:5]
    rest = counts.total() - sum(n for _, n in common)
    return ", ".join(f"{what} {n}" for what, n in (*common, *([("others", rest)] if rest else [])))


def _classes(names: list[str]) -> list[str]:
    classes = sorted({name.partition("/")[0] for name in names})
    return classes if len(classes) > 1 and all("/" in name for name in names) else []


def part_of(folder: str) -> str | None:
    """The part of a split that a folder has the name of: train, val, test or pool (without labels), in any case and
    with an ending as in train2017 or test_images; or None."""
    return _PART_OF.get(_stem(folder))


def _stem(folder: str) -> str:
    return re.sub(r"([-_ ]?(set|images|data))?[-_ ]?\d*$", "", folder.lower())


def parts(images: ImageFolder) -> dict[str, list[str]]:
    """The folders of each part of a split. Empty unless every folder of the first level is one, since a class may have
    such a name too, and there are two parts or just one folder, of training images."""
    found: dict[str | None, list[str]] = {}
    tops = {name.partition("/")[0] for name in images.names if "/" in name}
    for top in sorted(tops, key=_preference):
        found.setdefault(part_of(top), []).append(top)
    others = found.pop(None, [])
    if others and {"train", "val"} <= found.keys():
        images.notes.append(
            f"{found['train'][0]}/ and {found['val'][0]}/ are taken as classes, since {others[0]}/ beside them is no "
            "part of a split"
        )
    complete = len(found) > 1 or (len(tops) == 1 and "train" in found)
    return {str(part): folders for part, folders in found.items()} if complete and not others else {}


def _preference(folder: str) -> tuple[int, str]:
    return (list(_PART_OF).index(_stem(folder)) if part_of(folder) else 0), folder


def split(path: str | Path) -> tuple[ImageFolder, ImageFolder]:
    """Open `path` as (train, held_out), two ImageFolders with the same `classes`; see `pretraining_split`."""
    return pretraining_split(path)[1:]


def pretraining_split(path: str | Path) -> tuple[ImageFolder, ImageFolder, ImageFolder]:
    """Open `path` as (images to pretrain on, train, held_out), the last two with the same `classes`.

    If the folders of its root are those of a split (see `parts`), the images of the folder `val`, or else `test`, are
    held out, and a `test` beside `val` is left alone. Those to pretrain on are `train` with further training folders
    and those without labels. Otherwise the min(512, n // 20) images with the smallest SHA-256 of their name are held
    out: the same on every machine, and for a folder and a zip of it. Raises DataError as ImageFolder does.
    """
    images = ImageFolder(path)
    found = parts(images)
    trained = [*found.get("train", ()), *found.get("pool", ())]
    if not trained:
        train, held_out = _by_hash(images)
        return train, train, held_out
    held = [*found.get("val", ()), *found.get("test", ())][:1]
    tops = [name.partition("/")[0] + "/" if "/" in name else "beside the folders" for name in images.names]
    if unused := Counter(top for top in tops if top[:-1] not in trained + held):
        images.notes.append(f"images that are neither trained on nor held out: {_counted(unused)}")
    train = images.below(trained[0])
    if held:
        held_out = images.below(held[0])
        classes = _classes(train.names + held_out.names)
        train, held_out = train._view("", train.names, classes), held_out._view("", held_out.names, classes)
    else:
        train, held_out = _by_hash(train)
    if len(trained) == 1:
        return train, train, held_out
    own = [f"{trained[0]}/{name}" for name in train.names]
    more = [name for name in images.names if name.partition("/")[0] in trained[1:]]
    return images._view("", sorted(own + more), []), train, held_out


def _by_hash(images: ImageFolder) -> tuple[ImageFolder, ImageFolder]:
    # Not CRC-32: it is linear, so it would favor some classes among numbered names.
    digests = [hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest() for name in images.names]
    order = sorted(range(len(images)), key=digests.__getitem__)
    n_held_out = min(512, len(images) // 20)
    return images.subset(sorted(order[n_held_out:])), images.subset(sorted(order[:n_held_out]))
