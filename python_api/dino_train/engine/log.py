"""log.txt of a run: versions and machine, what was printed, every warning of every rank, and how it ended."""

import logging
import os
import platform
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import torch

from dino_kernels import __version__
from dino_train.common.process import peak_memory, processors

NAME = "log.txt"


class RunLog(logging.Handler):
    """Inside this context it takes the warnings of all loggers. A line that cannot be written is left out. Ranks other
    than the first append to the same file under their number."""

    def __init__(self, folder: Path, rank: int = 0) -> None:
        super().__init__(logging.WARNING)
        self.path, self.began = folder / NAME, time.monotonic()
        self.rank, self.prefix = rank, f"rank {rank}, " if rank else ""

    def __enter__(self) -> "RunLog":
        if not logging.getLogger().handlers:  # else this one would be the only one
            logging.basicConfig(format="dino-train: %(message)s")
        logging.getLogger().addHandler(self)
        if self.rank:
            return self
        self.line(
            f"dino-kernels {__version__}{_commit()}, torch {torch.__version__}, Python {platform.python_version()}, "
            f"{platform.platform()}, {_processor()}, {processors()} processors, "
            f"{torch.get_num_threads()} threads, process {os.getpid()}"
        )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        logging.getLogger().removeHandler(self)
        if self.rank and kind is None:
            return
        how = "ended" if kind is None else str(error) or kind.__name__
        self.line(f"{how}; {duration(time.monotonic() - self.began)}, at most {peak_memory():.0f} MiB of memory")

    def line(self, text: str) -> None:
        with suppress(OSError), open(self.path, "a", encoding="utf-8", errors="backslashreplace") as file:
            now = time.strftime("%Y-%m-%d %H:%M:%S")
            file.write("".join(f"{now}  {self.prefix}{line}\n" for line in text.splitlines()))

    def emit(self, record: logging.LogRecord) -> None:
        self.line(f"{record.levelname.lower()}: {record.getMessage()}")


def duration(seconds: float) -> str:
    minutes, hours = int(seconds) // 60, int(seconds) // 3600
    return f"{hours}:{minutes % 60:02d}:{int(seconds) % 60:02d}"


def _commit() -> str:
    """Of a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    with suppress(OSError, subprocess.SubprocessError):
        return f" ({subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL, timeout=5).strip()})"
    return ""


def _processor() -> str:
    with suppress(OSError, IndexError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return [line.partition(":")[2].strip() for line in lines if line.startswith("model name")][0]
    return platform.machine()
