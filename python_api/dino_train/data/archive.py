"""The files of an archive under the names that a folder of it would have: paths made plain, links resolved."""

import posixpath
import stat
import zipfile
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

Place = TypeVar("Place")


def plain(name: str) -> str | None:
    """A member's name as a path below the archive, None if it is outside: ./a//b, /a/b and c/../a/b are a/b."""
    path = posixpath.normpath(name.lstrip("/"))
    return None if path in (".", "..") or path.startswith("../") else path


def resolved(files: Mapping[str, Place], links: Mapping[str, str], left_out: dict[str, str]) -> dict[str, Place]:
    """The files, and those that symbolic links lead to, with where they are. Links to files and folders are followed as
    in a folder, and not out of the archive. Those that lead nowhere are added to `left_out`, with the reason."""
    if not links:
        return dict(files)
    entries: dict[str, set[str]] = defaultdict(set)  # of each folder
    for path in (*files, *links):
        while path:
            parent, _, entry = path.rpartition("/")
            entries[parent].add(entry)
            path = parent
    found: dict[str, Place] = {}

    def walk(folder: str, prefix: str, parents: frozenset[str]) -> None:
        for entry in sorted(entries[folder]):
            path = _real(posixpath.join(folder, entry), links)
            if path is None or (path not in files and path not in entries):
                left_out[prefix + entry] = "a link to nothing in the archive"
            elif path in files:
                found[prefix + entry] = files[path]
            elif path not in parents:
                walk(path, f"{prefix}{entry}/", parents | {path})

    walk("", "", frozenset([""]))
    return found


def _real(path: str, links: Mapping[str, str], depth: int = 0) -> str | None:
    """A path without links; None if it leads out of the archive or in a circle."""
    done = ""
    for part in path.split("/"):
        if part == ".." and not done:
            return None
        done = (
            posixpath.dirname(done) if part == ".." else posixpath.join(done, part) if part not in ("", ".") else done
        )
        if done in links:
            if depth == 40 or links[done].startswith("/"):
                return None
            target = _real(posixpath.join(posixpath.dirname(done), links[done]), links, depth + 1)
            if target is None:
                return None
            done = target
    return done


def _entries(path: Path) -> int:
    """The number of members that the end of a zip states, modulo 65536; 65535 if it is elsewhere (zip64)."""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 22 - 0xFFFF))  # 22 bytes and a comment
        end = file.read()
    at = end.rfind(b"PK\5\6") + 10
    return int.from_bytes(end[at : at + 2], "little")


class Zip:
    """Files of a zip. Raises zipfile.BadZipFile or OSError if it is damaged."""

    def __init__(self, path: Path) -> None:
        try:
            self._archive, self.left_out = zipfile.ZipFile(path), dict[str, str]()
        except NotImplementedError as error:  # a version that no program writes
            raise zipfile.BadZipFile(str(error)) from error
        found, expected = len(self._archive.infolist()), _entries(path)
        if expected not in (found & 0xFFFF, 0xFFFF):  # a flipped bit in a length can hide files
            raise zipfile.BadZipFile(f"its directory has {found} entries, and its end says {expected}")
        files: dict[str, zipfile.ZipInfo] = {}
        links: dict[str, str] = {}
        for info in self._archive.infolist():
            written = info.filename.replace("\\", "/")  # of some programs on Windows, against the format
            name = plain(written)
            if written.endswith("/"):
                if info.file_size:
                    self.left_out[written] = "a folder with content"
            elif name is None:
                self.left_out[written] = "outside of the archive"
            elif stat.S_ISLNK(info.external_attr >> 16) and info.file_size < 4096:
                try:
                    links[name] = self._archive.read(info).decode("utf-8", "surrogateescape")
                except Exception as error:  # damaged files raise almost any exception: EOFError, zlib.error, ...
                    self.left_out[name] = f"a damaged link, {error}"
            else:
                if name in files:
                    self.left_out[name] = "an earlier member of that name"
                files[name] = info
        self._files = resolved(files, links, self.left_out)

    def names(self) -> list[str]:
        return list(self._files)

    def read(self, name: str) -> bytes:
        return self._archive.read(self._files[name])
