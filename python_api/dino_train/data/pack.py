"""`dino-train pack`: convert a folder of images to one tar of small JPEGs, which decode several times faster."""

import hashlib
import io
import logging
import os
import tarfile
import zlib
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from dino_train.common.files import locked
from dino_train.data.decode import decode, decode_smaller, jpeg_size, reason
from dino_train.data.folder import ImageFolder
from dino_train.data.tar_index import BLOCK, ENCODING, INDEX, Head, Index, header
from dino_train.data.threads import in_order

logger = logging.getLogger(__name__)


def pack(images: ImageFolder, out: Path, *, size: int, quality: int, num_workers: int) -> int:
    """Write all readable images to the tar `out` in shuffled order; returns their number.

    An image is downscaled so that its longer side has at most `size` pixels, and written as a JPEG of that quality; a
    JPEG that is small enough is copied unchanged. The file is named `out`.partial until it is complete; the next call
    continues an interrupted one.

    Raises:
        ValueError: `out` exists, is being written by another process or does not end in .tar, size or quality out of
            range, or no image can be read.
        OSError: the file cannot be written; the part already written is kept for the next call.
    """
    from tqdm import tqdm

    if out.suffix != ".tar":
        raise ValueError(f"the output must end in .tar, got {out}")
    if out.exists():
        raise ValueError(f"{out} exists already: remove it, or choose another name")
    if size < 1 or not 1 <= quality <= 95:
        raise ValueError(f"size must be at least 1 and quality from 1 to 95, got {size} and {quality}")
    names = _record_names(images.names)
    head = Head(size, quality, hashlib.sha256("\0".join(images.names).encode(*ENCODING)).hexdigest())
    partial = out.with_name(out.name + ".partial")
    out.parent.mkdir(parents=True, exist_ok=True)
    with (
        locked(out.with_name(out.name + ".lock"), out),
        open(partial, "r+b" if partial.exists() else "w+b") as file,
    ):
        index = _begin(file, head)
        done = {name for name, *_ in index}
        # Shuffled, so that sequential reading does not yield class after class; by hash, so that every call agrees.
        order = sorted(range(len(images)), key=lambda i: hashlib.sha256(names[i].encode(*ENCODING)).digest())
        missing = [i for i in order if names[i] not in done]

        def record(i: int) -> bytes | str:
            try:
                return _record(images.read(i), size, quality)
            except Exception as error:
                return reason(error)

        with tqdm(total=len(images), initial=len(done), unit="image", disable=None) as bar:
            records = in_order(record, missing, threads=num_workers, ahead=4 * num_workers)
            for i, data in zip(missing, records, strict=True):
                if isinstance(data, str):
                    logger.warning("skipped unreadable image %s: %s", images.names[i], data)
                else:
                    index.append((names[i], *_append(file, names[i], data)))
                bar.update()
        if not index:
            raise ValueError(f"none of the {len(images)} images could be read")
        data = Index([name for name, *_ in index], np.array([row for _, *row in index], np.uint64)).to_bytes()
        place = _append(file, INDEX, data)
        file.write(bytes(2 * BLOCK))
        file.seek(0)
        file.write(replace(head, index=place).to_bytes())
        file.flush()
        os.fsync(file.fileno())
    partial.replace(out)
    return len(index)


def _record_names(names: list[str]) -> list[str]:
    """Names of the records: the names of the images, with .jpg as suffix if it is not that of a JPEG, and with only one
    dot, since WebDataset takes all after the first dot as the suffix."""
    taken: set[str] = set()
    records = []
    for name in names:
        folder, slash, file = name.rpartition("/")
        stem, suffix = os.path.splitext(file)
        stem, suffix = stem.replace(".", "_"), suffix if suffix.lower() in (".jpg", ".jpeg") else ".jpg"
        while (key := folder + slash + stem) in taken:
            stem += "_"
        taken.add(key)
        records.append(key + suffix)
    return records


def _record(data: bytes, size: int, quality: int) -> bytes:
    """The JPEG to be written for an image file."""
    sides = jpeg_size(data, any_size=True) or (0, 0)
    if sides[0] * sides[1] > 2 * (Image.MAX_IMAGE_PIXELS or 0) and max(sides) >= 2 * size:  # Pillow refuses it
        pixels = decode_smaller(data, max(sides) / size)
    else:
        pixels = decode(data)  # raises if the image is unreadable
    height, width = pixels.shape[:2]
    longer = max(height, width)
    if longer <= size and jpeg_size(data):
        return data
    image = Image.fromarray(pixels)
    if longer > size:
        shape = max(1, round(width * size / longer)), max(1, round(height * size / longer))
        image = image.resize(shape, Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


def _append(file: BinaryIO, name: str, data: bytes) -> tuple[int, int, int]:
    """Write a member; returns offset, size and checksum of its data."""
    file.write(header(name, len(data)))
    start = file.tell()
    file.write(data + bytes(-len(data) % BLOCK))
    return start, len(data), zlib.crc32(data)


def _begin(file: BinaryIO, head: Head) -> list[tuple[str, int, int, int]]:
    """The complete records of an interrupted call; the file is positioned after them. If that call had other options or
    images, the file starts again with a new head and no records."""
    index: list[tuple[str, int, int, int]] = []
    end = 2 * BLOCK
    saved = Head.read(file.read(2 * BLOCK))
    if saved and replace(saved, index=(0, 0)) == head:
        length = file.seek(0, os.SEEK_END)
        file.seek(0)
        with tarfile.open(fileobj=file, mode="r:", encoding=ENCODING[0], errors=ENCODING[1]) as tar:
            try:
                tar.next()
                while (member := tar.next()) and member.name != INDEX:
                    padded = member.offset_data + member.size + -member.size % BLOCK
                    if padded > length:
                        break
                    file.seek(member.offset_data)
                    data = file.read(member.size)
                    index.append((member.name, member.offset_data, member.size, zlib.crc32(data)))
                    end = padded
            except tarfile.TarError:  # the last header is incomplete
                pass
    file.seek(0)
    file.write(head.to_bytes())
    file.truncate(end)
    file.seek(end)
    return index
