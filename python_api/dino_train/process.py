"""What a training process asks of the system, before torch is loaded."""

import ctypes
import gc
import os


def tune() -> None:
    """Threads that wait briefly, few collections, and memory that is kept.

    Between two operations torch's OpenMP threads spin for milliseconds by default, which starves data workers on the
    same cores; asleep at once (OMP_WAIT_POLICY=passive) they cost a step of ViT-Ti a quarter more for waking up. 0.1 ms
    of spinning (0.4 on Intel, whose pause is longer) is nearly as good as either alone. OpenMP reads it once, as torch
    loads it.

    A step makes thousands of short-lived objects and no cycles, which make Python's collector walk all that torch has
    loaded. glibc gives freed tensors back to the system, which clears their pages again at the next step.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    gc.set_threshold(50_000, 10, 100)
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # not glibc
        return
    mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the largest allowed
    mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
