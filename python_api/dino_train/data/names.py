"""Which files are images, judged by their names alone."""

import os
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import TypeVar

Content = TypeVar("Content")

# Pictures that Pillow reads; no documents (PDF, EPS), films, icons and formats of scientific data.
SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".avif", ".gif", ".bmp", ".dib"),
    *(".tif", ".tiff", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
    *(".pbm", ".pgm", ".ppm", ".pnm", ".pfm", ".tga", ".pcx", ".qoi", ".sgi", ".psd"),
)
# Pictures that Pillow does not read, of phones and cameras.
CAMERA_SUFFIXES = (".heic", ".heif", ".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".raf", ".rw2")
# Taken where there are none of these.
DEEP_SUFFIXES = (".npy", ".dcm", ".dicom")
# Of systems and other programs, in lower case. Images in folders of _JUNK are counted, since they look like data.
_HIDDEN = {"__macosx", "thumbs.db", "desktop.ini"}
_JUNK = {
    *("@eadir", "thumbnails", "thumbs", "_thumbs", "#recycle", "@recycle", "$recycle.bin", "recycler", "#snapshot"),
    *("system volume information", "lost+found"),
}


def suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def is_image(name: str) -> bool:
    return suffix(name) in SUFFIXES


def is_hidden(part: str) -> bool:
    """Of one part of a path."""
    return part.startswith(".") or part.lower() in _HIDDEN


def junk_of(path: str) -> str | None:
    """The folder of another program that a path leads through."""
    return next((part for part in path.split("/") if part.lower() in _JUNK), None)


def is_data(path: str) -> bool:
    """Whether it is an image and neither hidden nor of another program."""
    return is_image(path) and not any(map(is_hidden, path.split("/"))) and not junk_of(path)


def of_shard(images: Iterable[tuple[str, Content]]) -> Iterator[tuple[str, Content, str]]:
    """Images of a tar in their order, as (name, content, why it is not used, empty if it is).

    Members in a row with one key, the name up to the first dot of its last part, are a sample of WebDataset, with one
    image: x.mask.png belongs to x.jpg. Where no name is the key and a suffix, the dots are those of names, and every
    image is used. Of members with one name it is the first.
    """
    seen: set[str] = set()
    for _, group in groupby(images, lambda image: _key(image[0])):
        sample = list(group)
        main = next((name for name, _ in sample if name.count(".", name.rfind("/") + 1) == 1), "")
        for name, content in sample:
            second = "a second member of that name" if name in seen else ""
            yield name, content, second or (f"in one sample with {main}" if main and name != main else "")
            seen.add(name)


def _key(name: str) -> str:
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]


def listed(reasons: dict[str, str]) -> str:
    """How many, and the first of them with their reasons."""
    first = ", ".join(f"{name} ({why})" for name, why in list(reasons.items())[:3])
    return f"{len(reasons)}: {first}" + (", ..." if len(reasons) > 3 else "")
