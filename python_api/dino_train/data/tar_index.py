"""Random access to the images in one tar file through a memory map.

Any uncompressed tar can be used. A tar written by `dino-train pack` needs no scan: its first member, __pack__, holds
the options it was made with and the position and CRC-32 of the last member, __index__, which lists offset, size and
CRC-32 of every record. WebDataset ignores members with such names.
"""

import io
import json
import mmap
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from dino_train.data.archive import plain, resolved
from dino_train.data.names import is_data, of_shard

BLOCK = tarfile.BLOCKSIZE
HEAD, INDEX = "__pack__", "__index__"
ENCODING = ("utf-8", "surrogateescape")  # of names, which may be invalid Unicode


@dataclass
class Head:
    """Content of the first member, JSON in one block. index: (offset, size, CRC-32) of the index, in packs of earlier
    versions without the last; (0, 0) in a partial file."""

    size: int
    quality: int
    source: str
    index: tuple[int, ...] = (0, 0)

    def to_bytes(self) -> bytes:
        """The member with its header: two blocks."""
        data = json.dumps(asdict(self)).encode()
        assert len(data) <= BLOCK
        return header(HEAD, BLOCK) + data.ljust(BLOCK)

    @classmethod
    def read(cls, start: bytes) -> "Head | None":
        """From the first two blocks of a file; None if another program wrote them."""
        if len(start) < 2 * BLOCK or not start.startswith(HEAD.encode() + b"\0"):
            return None
        try:
            fields = json.loads(start[BLOCK:])
            return cls(**fields | {"index": tuple(map(int, fields["index"]))})
        except (ValueError, TypeError, KeyError):
            raise ValueError("its first member is damaged") from None


def header(name: str, size: int) -> bytes:
    """The header blocks of a member."""
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.PAX_FORMAT, *ENCODING)


class Index:
    """Positions of the records. names: of the records; table: uint64 [n, 3], offset and size in bytes and CRC-32, or
    [n, 2] without CRC-32 from a scan. left_out: members that are not used, and why."""

    def __init__(self, names: list[str], table: np.ndarray, left_out: dict[str, str] | None = None) -> None:
        self.names, self.table, self.left_out = names, table, left_out or {}

    def to_bytes(self) -> bytes:
        file = io.BytesIO()
        np.save(file, self.table)
        file.write("\0".join(self.names).encode(*ENCODING))
        return file.getvalue()

    @classmethod
    def read(cls, data: bytes) -> "Index":
        file = io.BytesIO(data)
        table = np.load(file, allow_pickle=False)
        return cls(file.read().decode(*ENCODING).split("\0"), table)

    @classmethod
    def scan(cls, path: Path) -> "Index":
        """The index of a tar that has none, without checksums."""
        images, files = list[tuple[str, tuple[int, int]]](), dict[str, tuple[int, int]]()
        links, hard, left_out = dict[str, str](), dict[str, str](), dict[str, str]()
        for member in members(path):
            name, place = plain(member.name), (member.offset_data, member.size)
            if name is None:
                left_out |= {} if member.isdir() else {member.name: "outside of the archive"}
            elif member.issym():
                links[name] = member.linkname
            elif member.islnk():
                hard[name] = plain(member.linkname) or ""
            elif member.isreg() and not member.issparse():
                images.append((name, place)) if is_data(name) else files.update({name: place})
            elif not member.isdir():
                left_out[name] = "no ordinary file"
        for name, place, why in of_shard(images):
            if why:
                left_out[name] = why
            else:
                files[name] = place
        for name, target in hard.items():
            if target in files:
                files[name] = files[target]
            else:
                left_out[name] = "a link to nothing in the archive"
        files = resolved(files, links, left_out)
        return cls(list(files), np.array(list(files.values()), np.uint64).reshape(-1, 2), left_out)


def members(path: Path) -> Iterator[tarfile.TarInfo]:
    """All members of an uncompressed tar.

    Raises:
        tarfile.TarError: it is compressed or no tar.
        ValueError: while iterating: it is damaged, or cut off.
    """
    with tarfile.open(path, "r:", encoding=ENCODING[0], errors=ENCODING[1]) as tar, open(path, "rb") as file:
        try:
            yield from each(tar)
        except tarfile.TarError as error:
            raise ValueError(str(error)) from error
        # tarfile takes a damaged header and a missing one for the end, which is blocks of zeros.
        file.seek(tar.offset)  # type: ignore[attr-defined]
        end = file.read(BLOCK)
        if any(end):
            raise ValueError(f"the header at byte {tar.offset} is damaged")  # type: ignore[attr-defined]
        if len(end) < BLOCK:
            raise ValueError("it is cut off: its end is missing")
        if any(rest.strip(b"\0") for rest in iter(lambda: file.read(1 << 20), b"")):
            raise ValueError("there is data after its end: several archives in a row, or a header was overwritten")


def each(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    while member := tar.next():
        tar.members.clear()  # type: ignore[attr-defined]  # tarfile keeps all members otherwise
        yield member


class Store:
    """Members of a tar file. Raises ValueError, tarfile.TarError or OSError if it is damaged."""

    def __init__(self, path: Path) -> None:
        with open(path, "rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        head = Head.read(self._bytes[: 2 * BLOCK])
        if head:
            start, size, *checksum = head.index
            data = self._bytes[start : start + size]
            if not size or len(data) < size:
                raise ValueError("it is cut off")
            if checksum and zlib.crc32(data) != checksum[0]:
                raise ValueError("its index has a wrong checksum")
        index = Index.read(data) if head else Index.scan(path)
        self._table, self.left_out = index.table, index.left_out
        self._rows = {name: i for i, name in enumerate(index.names)}

    def names(self) -> list[str]:
        return list(self._rows)

    def read(self, name: str) -> bytes:
        """The data of a member; ValueError if it is truncated or its checksum does not match."""
        start, size, *checksum = self._table[self._rows[name]].tolist()
        data = self._bytes[start : start + size]
        if len(data) < size:
            raise ValueError("truncated")
        if checksum and zlib.crc32(data) != checksum[0]:
            raise ValueError("damaged (wrong checksum)")
        return data
