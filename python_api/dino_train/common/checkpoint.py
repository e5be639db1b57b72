"""Checkpoints that survive a kill, a full disk and a flipped bit.

A file is complete or absent: it is written under a temporary name, synced, then renamed. The previous last.pt is kept
as previous.pt, and is used if the checksums of last.pt do not match.
"""

import argparse
import errno
import logging
import os
import pickle
import re
import zipfile
from pathlib import Path, PosixPath
from typing import Any

import numpy as np
import torch

_numpy_scalar = np.float64(0).__reduce__()[0]

logger = logging.getLogger(__name__)

# Safe types in checkpoints of the reference code and others: arguments (with a path set by its SLURM launcher), and
# rates and accuracies as numpy scalars.
_REFERENCE_TYPES: list[Any] = [argparse.Namespace, np.dtype, *{type(np.dtype(code)) for code in "?bhilqBHILQefd"}]
# numpy 1 and 2, and Python 3.13 and older, use different names; a file has the names of the versions that wrote it.
_REFERENCE_TYPES += [(_numpy_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
_REFERENCE_TYPES += [(PosixPath, f"{module}.PosixPath") for module in ("pathlib", "pathlib._local")]

_TEMPORARY = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE)  # errors that say nothing about a file
LAST, PREVIOUS = "last.pt", "previous.pt"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message says why and what to do."""


def exists(folder: Path) -> bool:
    """Whether a folder holds a run's checkpoint."""
    return any((folder / name).exists() for name in (LAST, PREVIOUS))


def require_none(folder: Path) -> None:
    """Raise ValueError if a new run would overwrite the one in `folder`."""
    if exists(folder):
        raise ValueError(f"{folder} holds a run already: add --resume to continue it, or choose another --output-dir")


def save(state: dict[str, Any], path: Path, *, previous: Path | None = None) -> None:
    """Write `state` to `path` atomically. If `previous` is given, an existing file is first renamed to it.

    Raises:
        CheckpointError: it could not be written (disk full, no permission); the existing file is unchanged.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)  # otherwise a power cut could undo the renames
        finally:
            os.close(directory)
    except (OSError, RuntimeError) as error:  # torch reports a failed write as either
        temporary.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or f"is the disk full? ({_first_line(error)})"
        raise CheckpointError(f"cannot write {path}: {reason}") from error


def numbered(folder: Path) -> list[Path]:
    """The checkpoints that are kept under their epoch, checkpoint0020.pt, in the order of the epochs."""
    found = [path for path in folder.glob("checkpoint*.pt") if path.stem[10:].isdecimal()]
    return sorted(found, key=lambda path: int(path.stem[10:]))


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint with `weights_only=True`, tensors on the CPU.

    Raises:
        CheckpointError: no such file, damaged, or not a checkpoint that is safe to load.
    """
    try:
        path.open("rb").close()
    except FileNotFoundError:
        raise CheckpointError(f"no checkpoint at {path}") from None
    except OSError as error:  # a folder, no permission
        if error.errno in _TEMPORARY:
            raise
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    try:
        if zipfile.is_zipfile(path):  # torch.load does not verify the checksums
            with zipfile.ZipFile(path) as archive:
                if archive.testzip() is not None:
                    raise CheckpointError(f"{path} is damaged (a checksum does not match)")
        with torch.serialization.safe_globals(_REFERENCE_TYPES):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (CheckpointError, MemoryError):  # the last may be temporary: the file is not damaged
        raise
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL (\S+)", str(error))  # torch's message also advises how to load it anyway
        why = f" and is not loaded for safety (it asks for {asked[1]})" if asked else ", or is not a checkpoint"
        raise CheckpointError(f"{path} is damaged, or holds more than tensors and plain values{why}") from error
    except Exception as error:  # damaged files raise almost any exception: OSError, struct.error, KeyError, ...
        if isinstance(error, OSError) and error.errno in _TEMPORARY:
            raise
        raise CheckpointError(f"{path} is damaged or not a checkpoint ({_first_line(error)})") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, expected a dictionary of weights")
    return state


def load_newest(folder: Path) -> tuple[dict[str, Any], Path]:
    """The run's last checkpoint and its path. If it is damaged or missing, the previous one, with a warning.

    Raises:
        CheckpointError: neither can be used.
    """
    problems = []
    for path in (folder / LAST, folder / PREVIOUS):
        try:
            state = load(path)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        if problems:
            logger.warning("%s; using %s instead", problems[0], path)
        return state, path
    raise CheckpointError("; ".join(problems))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
