"""Images from a folder or a .zip, and the loaders that turn them into crops.

    train, held_out = split("photos.zip")
    loader = crop_loader(
        train, MultiCrop(), batch_size=64, seed=0, start_step=0, total_steps=1000, num_workers=2
    )
    bad_images = BadImages(len(train), batch_size=64)
    for crops, bad in loader:       # one global step each
        bad_images.add(bad)

A sample is a function of (seed, epoch, index) alone: neither the number of workers nor a resume changes it.
"""

import copy
import hashlib
import io
import logging
import multiprocessing
import os
import signal
import threading
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from .augment import MultiCrop, eval_transform

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")

logger = logging.getLogger(__name__)

# Pillow warns about big pictures and damaged EXIF, once per worker; what matters is reported by BadImages.
warnings.filterwarnings("ignore", module=r"PIL\.")


class DataError(ValueError):
    """The data set as a whole cannot be used; the message says what was expected and what was found."""

    def __init__(self, message: str) -> None:
        # A DataLoader re-raises a worker's error with the traceback as its message: keep the last line.
        super().__init__(message.rpartition("DataError: ")[2].strip())


class UnreadableImage(ValueError):
    """One image cannot be read: its name and a reason in one line."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


Bad = list[tuple[str, str]]  # (name, reason) of unreadable images


class ImageFolder:
    """The images of a folder or of a .zip of one, which is read in place, never extracted.

    Takes .jpg .jpeg .png .webp .bmp .tif .tiff (any case) at any depth, follows links, and passes over hidden
    files and `__MACOSX`. Single folders that wrap everything are descended into.

    names: sorted POSIX paths below the (innermost) root. classes: sorted names of the first folder level if
    every image lies in a folder and there are at least two folders, else []. labels: index into `classes` of
    each image, or None without classes.
    Raises DataError if `path` is missing, neither a folder nor a zip, a damaged zip, or has no image.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._zip: zipfile.ZipFile | None = None
        self._zip_pid = 0
        self._is_zip = not self.path.is_dir()
        files = [file for file in self._list() if not any(map(_is_hidden, file.split("/")))]
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

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_zip": None, "_zip_pid": 0}

    def load(self, i: int) -> Image.Image:
        """Decode image i: an RGB `PIL.Image`, turned upright by its EXIF orientation (which the reference
        ignores). Alpha is dropped, as `convert("RGB")` does. 16-bit gray keeps its high byte; float gray, and
        integer gray beyond 16 bits, is stretched from its finite minimum..maximum to 0..255.

        Raises UnreadableImage, whose name is the path below `path`.
        """
        name = self._prefix + self.names[i]
        try:
            return _decode(self._read(name))
        except Exception as error:  # damaged files raise nearly anything: struct.error, zlib.error, ...
            raise UnreadableImage(name, _reason(error)) from error

    def subset(self, indices: Sequence[int]) -> "ImageFolder":
        """The images at `indices` only, with the same `classes`."""
        return self._view("", [self.names[i] for i in indices], self.classes)

    def below(self, folder: str) -> "ImageFolder":
        """The images below one first-level folder, named and classed relative to it."""
        start = folder + "/"
        names = [name.removeprefix(start) for name in self.names if name.startswith(start)]
        return self._view(start, names, _classes(names))

    def _view(self, prefix: str, names: list[str], classes: list[str]) -> "ImageFolder":
        view = copy.copy(self)
        view._set(self._prefix + prefix, names, classes)
        return view

    def _set(self, prefix: str, names: list[str], classes: list[str]) -> None:
        self._prefix, self.names, self.classes = prefix, names, classes
        number = {name: i for i, name in enumerate(classes)}
        self.labels = [number[name.partition("/")[0]] for name in names] if classes else None

    def _list(self) -> list[str]:
        """All files as POSIX paths below `path`."""
        if not self.path.exists():
            raise DataError(f"no such folder or zip file: {self.path}")
        if self._is_zip and self.path.suffix.lower() != ".zip" and not zipfile.is_zipfile(self.path):
            raise DataError(f"{self.path} is neither a folder nor a zip: expected a folder of images or a .zip of one")
        try:
            if self._is_zip:
                return [name for name in self._open_zip().namelist() if not name.endswith("/")]
            return list(_walk(str(self.path)))
        except zipfile.BadZipFile as error:
            raise DataError(f"{self.path} is a damaged zip ({error}): copy or download it again") from error
        except OSError as error:
            raise DataError(f"cannot list {error.filename or self.path}: {error.strerror}") from error

    def _read(self, name: str) -> bytes:
        return self._open_zip().read(name) if self._is_zip else (self.path / name).read_bytes()

    def _open_zip(self) -> zipfile.ZipFile:
        # A forked worker must not share its parent's handle: they would move one file position between them.
        if self._zip is None or self._zip_pid != os.getpid():
            self._zip, self._zip_pid = zipfile.ZipFile(self.path), os.getpid()
        return self._zip


def _walk(folder: str, prefix: str = "", parents: frozenset[str] = frozenset()) -> Iterator[str]:
    """Files below a folder, hidden folders left out; a link back to a parent is not followed."""
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


def _decode(data: bytes) -> Image.Image:
    if not data:
        raise ValueError("empty file")
    image: Image.Image = Image.open(io.BytesIO(data))
    image.load()
    with suppress(Exception):  # damaged EXIF does not make the picture unreadable
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "F" or image.mode.startswith("I"):  # convert() would clip these at 255
        image = Image.fromarray(_to_8_bit(np.asarray(image)))
    return image if image.mode == "RGB" else image.convert("RGB")


def load_file(path: Path) -> Image.Image:
    """One image file, decoded as `ImageFolder.load` does; raises UnreadableImage."""
    try:
        return _decode(path.read_bytes())
    except Exception as error:
        raise UnreadableImage(str(path), _reason(error)) from error


def _to_8_bit(gray: np.ndarray) -> np.ndarray:
    """Gray of more than 8 bits [H, W] to uint8; see `ImageFolder.load`."""
    if gray.dtype.kind != "f" and gray.min() >= 0 and gray.max() <= 65535:
        return (gray >> 8).astype(np.uint8)
    gray = gray.astype(np.float64)
    finite = gray[np.isfinite(gray)]
    if not finite.size:
        raise ValueError("no finite pixel")
    low, high = finite.min(), finite.max()
    gray = np.nan_to_num(gray, nan=low, posinf=high, neginf=low)
    return np.round((gray - low) * (255 / ((high - low) or 1))).astype(np.uint8)


def _reason(error: Exception) -> str:
    text = (str(error).splitlines() or [""])[0] or type(error).__name__
    if isinstance(error, UnidentifiedImageError):
        return "not an image that Pillow reads"
    if isinstance(error, Image.DecompressionBombError):
        return "too many pixels (decompression bomb)"
    if isinstance(error, MemoryError):
        return "not enough memory to decode it"
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read ({error.strerror})"
    if "truncated" in text.lower():
        return "truncated"
    return text if isinstance(error, ValueError | RuntimeError) else f"damaged ({text})"


def split(path: str | Path) -> tuple[ImageFolder, ImageFolder]:
    """Open `path` as (train, held_out), two ImageFolders with the same `classes`.

    Folders `train` and `val` in its root are these two. Otherwise the min(512, n // 20) images with the
    smallest SHA-256 of their name are held out, the same on any machine, from a folder and from a zip; where
    there is `train` without `val`, from the images of `train`. Raises DataError as ImageFolder does.
    """
    images = ImageFolder(path)
    tops = {name.partition("/")[0] for name in images.names if "/" in name}
    if "train" in tops and "val" in tops:
        train, held_out = images.below("train"), images.below("val")
        classes = _classes(train.names + held_out.names)
        return train._view("", train.names, classes), held_out._view("", held_out.names, classes)
    if "train" in tops:
        images = images.below("train")
    # Not a cyclic redundancy check: being linear, it would favor some classes among numbered names.
    digests = [hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest() for name in images.names]
    order = sorted(range(len(images)), key=digests.__getitem__)
    n_held_out = min(512, len(images) // 20)
    return images.subset(sorted(order[n_held_out:])), images.subset(sorted(order[:n_held_out]))


def require_batch(n_images: int, batch_size: int) -> None:
    """Raise DataError if the images do not fill one batch."""
    if n_images < batch_size:
        raise DataError(
            f"{n_images} images are fewer than one batch of {batch_size}: "
            f"add images or set the batch size to {n_images} or less"
        )


class CropDataset(Dataset[tuple[list[Tensor], Bad]]):
    """Crops of `images`, keyed by (epoch, index).

    An unreadable image is replaced by the next readable one (index + 1, ... modulo n), cropped by the random
    numbers of the index asked for: so it is not a duplicate of that image's own crops in the same epoch. Each
    process decodes a bad image once and reports it once.
    """

    def __init__(self, images: ImageFolder, multicrop: MultiCrop, seed: int) -> None:
        self.images, self.multicrop, self.seed = images, multicrop, seed
        self._bad: dict[int, str] = {}  # not the exceptions, whose tracebacks hold the files' bytes

    def __getitem__(self, key: tuple[int, int]) -> tuple[list[Tensor], Bad]:
        """(crops, newly found unreadable images). Raises DataError if no image at all can be read."""
        epoch, index = key
        n = len(self.images)
        found: Bad = []
        for candidate in ((index + k) % n for k in range(n)):
            if candidate in self._bad:
                continue
            try:
                image = self.images.load(candidate)
            except UnreadableImage as error:
                self._bad[candidate] = str(error)
                found.append((error.name, error.reason))
                continue
            return self.multicrop(image, (self.seed, epoch, index)), found
        raise DataError(f"none of the {n} images could be read, the first: {self._bad[index]}")


def collate(samples: Sequence[tuple[list[Tensor], Bad]]) -> tuple[list[Tensor], Bad]:
    """Samples of CropDataset to (one [B, 3, size, size] tensor per crop, unreadable images)."""
    crops = [torch.stack(views) for views in zip(*(crops for crops, _ in samples), strict=True)]
    return crops, [entry for _, bad in samples for entry in bad]


class Batches(Sampler[list[tuple[int, int]]]):
    """(epoch, index) pairs of the global steps start_step .. total_steps - 1, one list per step.

    An epoch is n_images // batch_size steps through a permutation that depends only on (seed, epoch); what is
    left over is dropped. `share` is the part of each batch that is yielded. Raises DataError if the images do not
    fill one batch.
    """

    def __init__(
        self, n_images: int, batch_size: int, seed: int, start_step: int, total_steps: int, share: slice = slice(None)
    ) -> None:
        require_batch(n_images, batch_size)
        self.n_images, self.batch_size, self.seed, self.share = n_images, batch_size, seed, share
        self.start_step, self.total_steps = start_step, total_steps

    def __len__(self) -> int:
        return max(0, self.total_steps - self.start_step)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        shuffled_epoch = -1
        for step in range(self.start_step, self.total_steps):
            epoch, position = divmod(step, self.n_images // self.batch_size)
            if epoch != shuffled_epoch:
                seeds = np.random.SeedSequence(self.seed, spawn_key=(epoch,))
                order = np.random.Generator(np.random.PCG64(seeds)).permutation(self.n_images)
                shuffled_epoch = epoch
            start = position * self.batch_size
            yield [(epoch, int(index)) for index in order[start : start + self.batch_size][self.share]]


def _start_worker(worker_id: int) -> None:
    """Leave Ctrl-C and a scheduler's SIGTERM, which reach every process of a job, to the main process: a
    worker that dies makes the DataLoader raise there, maybe in the middle of a checkpoint."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_when_terminated_by_parent, daemon=True).start()


def _exit_when_terminated_by_parent() -> None:
    """Obey the SIGTERM by which multiprocessing ends its children, without which the parent cannot exit."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent.pid:
        pass
    os._exit(0)


def crop_loader(
    images: ImageFolder,
    multicrop: MultiCrop,
    *,
    batch_size: int,
    seed: int,
    start_step: int,
    total_steps: int,
    num_workers: int,
    share: slice = slice(None),
) -> DataLoader[Any]:
    """One loader for a whole run: yields `collate`'s (crops, bad) for each step of `Batches`.

    Raises DataError if the images do not fill one batch, and while iterating if none can be read.
    """
    return _loader(
        CropDataset(images, multicrop, seed),
        num_workers,
        batch_sampler=Batches(len(images), batch_size, seed, start_step, total_steps, share),
        collate_fn=collate,
    )


class EvalDataset(Dataset[tuple[Tensor, Tensor, Tensor, Bad]]):
    """`eval_transform` of each image with its label (-1 without labels) and index, as tensors with a leading
    dimension of 1, or of 0 where the image cannot be read, and the list of what could not be read."""

    def __init__(self, images: ImageFolder, size: int) -> None:
        self.images, self.size = images, size

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor, Bad]:
        try:
            image = self.images.load(index)
        except UnreadableImage as error:
            none = torch.empty(0, dtype=torch.int64)
            return torch.empty(0, 3, self.size, self.size), none, none, [(error.name, error.reason)]
        label = -1 if self.images.labels is None else self.images.labels[index]
        return eval_transform(image, self.size)[None], torch.tensor([label]), torch.tensor([index]), []


def eval_collate(samples: Sequence[tuple[Tensor, Tensor, Tensor, Bad]]) -> tuple[Tensor, Tensor, Tensor, Bad]:
    """Samples of EvalDataset to tensors over the readable images, and the merged list of unreadable ones."""
    pixels, labels, indices, bad = zip(*samples, strict=True)
    return torch.cat(pixels), torch.cat(labels), torch.cat(indices), [entry for one in bad for entry in one]


def eval_loader(images: ImageFolder, size: int, batch_size: int, num_workers: int) -> DataLoader[Any]:
    """Every image once, in order: yields (pixels float32 [B, 3, size, size], labels int64 [B], indices int64
    [B], bad).

    Unreadable images are left out of the tensors (so B may be below batch_size, even 0) and listed in bad.
    """
    return _loader(EvalDataset(images, size), num_workers, batch_size=batch_size, collate_fn=eval_collate)


def _loader(dataset: Dataset[Any], num_workers: int, **options: Any) -> DataLoader[Any]:
    return DataLoader(
        dataset,
        num_workers=num_workers,
        worker_init_fn=_start_worker,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # iterating would otherwise advance the global generator
        **options,
    )


class BadImages:
    """Keeps the unreadable images of a run in the main process, and logs each of them once.

    n_images: images of the data set; batch_size: the least number that must be readable (0 for evaluation).
    """

    def __init__(self, n_images: int, batch_size: int) -> None:
        self.n_images, self.batch_size = n_images, batch_size
        self._names: set[str] = set()

    @property
    def count(self) -> int:
        """Unreadable images so far."""
        return len(self._names)

    def add(self, bad: Bad) -> None:
        """Log the new ones among `bad`. Raises DataError if fewer readable images than one batch remain."""
        for name, reason in bad:
            if name in self._names:
                continue
            self._names.add(name)
            logger.warning("skipped unreadable image %s: %s", name, reason)
            if self.n_images - self.count < self.batch_size:
                raise DataError(
                    f"only {self.n_images - self.count} of {self.n_images} images could be read, "
                    f"fewer than one batch of {self.batch_size}: {name}: {reason}"
                )
