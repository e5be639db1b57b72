"""The memory that this machine, or the container, has."""

import os
import re
from contextlib import suppress
from pathlib import Path

from dino_train.common.device import Gpu


def local_processes() -> int:
    """Of this job, on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))


def memory(gpu: Gpu | None) -> tuple[int, int]:
    """Bytes in all and available, of the GPU or of this machine; a control group's limit counts as all."""
    if gpu is not None:
        return gpu.memory()
    kib = dict(re.findall(r"(\w+):\s+(\d+) kB", Path("/proc/meminfo").read_text()))
    total, available = 1024 * int(kib["MemTotal"]), 1024 * int(kib["MemAvailable"])
    limit = min(limits(), default=total)
    return min(total, limit), min(available, limit)


def limits(root: Path = Path("/")) -> list[int]:
    """Of the memory of this process's control groups, version 1 or 2, and of those that contain them."""
    found = []
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers in ("", "memory"):
                top = root / "sys/fs/cgroup" / controllers
                name = "memory.limit_in_bytes" if controllers else "memory.max"
                group = top / path.lstrip("/")
                for folder in (group, *group.parents):  # a container sees its own group as the top
                    with suppress(OSError, ValueError):  # "max" is no limit
                        found.append(int((folder / name).read_text()))
                    if folder == top:
                        break
    return found
