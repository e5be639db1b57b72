"""Random access to the images in one tar file through a memory map.

Any uncompressed tar can be used. A tar written by `dino-train pack` needs no scan: its first member, __pack__, holds
the options it was made with and the position of the last member, __index__, which lists offset, size and CRC-32 of
every record. WebDataset ignores members with such names.
"""

import io
import json
import mmap
import tarfile
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

BLOCK = tarfile.BLOCKSIZE
HEAD, INDEX = "__pack__", "__index__"
ENCODING = ("utf-8", "surrogateescape")  # of names, which may be invalid Unicode


@dataclass
class Head:
    """Content of the first member, JSON in one block. index: (offset, size) of the index; (0, 0) in a partial file."""

    size: int
    quality: int
    source: str
    index: tuple[int, int] = (0, 0)

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
        fields = json.loads(start[BLOCK:])
        return cls(**fields | {"index": tuple(fields["index"])})


def header(name: str, size: int) -> bytes:
    """The header blocks of a member."""
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.PAX_FORMAT, *ENCODING)


class Index:
    """Positions of the records. names: of the records; table: uint64 [n, 3], offset and size in bytes and CRC-32, or
    [n, 2] without CRC-32 from a scan."""

    def __init__(self, names: list[str], table: np.ndarray) -> None:
        self.names, self.table = names, table

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
        names, rows = [], []
        with tarfile.open(path, "r:", encoding=ENCODING[0], errors=ENCODING[1]) as tar:
            while member := tar.next():
                tar.members.clear()  # type: ignore[attr-defined]  # tarfile keeps all members otherwise
                if member.isreg():
                    names.append(member.name)
                    rows.append((member.offset_data, member.size))
        return cls(names, np.array(rows, np.uint64).reshape(-1, 2))


class Store:
    """Members of a tar file. Raises ValueError, tarfile.TarError or OSError if it is damaged."""

    def __init__(self, path: Path) -> None:
        with open(path, "rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        head = Head.read(self._bytes[: 2 * BLOCK])
        if head:
            start, size = head.index
            if not size or start + size > len(self._bytes):
                raise ValueError("it is cut off")
        index = Index.read(self._bytes[start : start + size]) if head else Index.scan(path)
        self._table = index.table
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
