"""Files that are complete or absent, and folders that one process writes to."""

import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

logger = logging.getLogger(__name__)


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path in the same folder as `path`; the folder is created. The file written there is on disk and
    renamed to `path` at the end of the block, or removed after an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def locked(path: Path, what: Path) -> Iterator[None]:
    """Hold a lock file, which names the process and is removed at the end of the block.

    Raises:
        ValueError: another process holds it, so that `what` is in use.
    """
    with _opened(path, what) as file:
        try:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            yield
        finally:
            path.unlink(missing_ok=True)


def _opened(path: Path, what: Path) -> IO[str]:
    """The lock file, locked."""
    while True:
        file = open(path, "a+")  # noqa: SIM115
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise ValueError(f"{what} is in use by {holder}: wait for its end, or choose another place") from None
        except OSError as error:  # some network file systems have no locks
            logger.warning("%s cannot be locked (%s): let no other process write there", what, error.strerror)
            return file
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()  # its holder has removed it since
