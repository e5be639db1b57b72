"""Settings of the training process: threads, garbage collection, memory allocation."""

import contextlib
import ctypes
import gc
import os
import resource
import sys
from pathlib import Path


def processors() -> int:
    """Those that this process may use, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_memory() -> float:
    """MiB that this process took at most."""
    with contextlib.suppress(OSError):  # of Linux, where the other number begins at that of the parent process
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)  # which counts bytes, others KiB


def tune() -> None:
    """Call before torch is imported: short spinning of threads, few garbage collections, freed memory is kept.

    Between two operations, torch's OpenMP threads spin for milliseconds by default, which takes CPU time from data
    workers on the same cores. If they sleep at once (OMP_WAIT_POLICY=passive), waking them makes a step of ViT-Ti a
    quarter slower. 0.1 ms of spinning (0.4 ms on Intel, whose pause instruction is longer) avoids most of both costs.
    OpenMP reads the setting once, when torch loads it.

    A step creates thousands of short-lived objects but no reference cycles; they trigger Python's garbage collector,
    which visits all objects that torch has loaded. By default glibc returns freed tensors to the system, which has to
    zero their pages again in the next step.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    gc.set_threshold(50_000, 10, 100)
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc
        libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the largest allowed
        libc.mallopt(_M_TRIM_THRESHOLD, -1)  # never


def use_huge_pages() -> None:
    """Call after the networks are built: memory that steps allocate uses 2 MiB pages, which have fewer TLB misses.

    A step of ViT-Ti takes 1 to 3 percent less time. Needs `tune`. The heap reserves addresses for half of the physical
    memory, which is used only when needed; if the address space is limited, nothing changes. Free memory of the startup
    is first returned to the system, so that it is allocated again as 2 MiB pages. The largest tensors of the startup
    are outside of the heap.
    """
    libc = ctypes.CDLL(None)
    limited = any(resource.getrlimit(kind)[0] != resource.RLIM_INFINITY for kind in _ADDRESSES)
    if limited or not (hasattr(libc, "mallopt") and hasattr(libc, "madvise")):  # glibc on Linux
        return
    with contextlib.suppress(OSError):  # /proc may be hidden
        if Path("/proc/sys/vm/overcommit_memory").read_bytes().strip() == b"2":  # reserved addresses count as memory
            return
        libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
        libc.free.argtypes, libc.madvise.argtypes = [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        libc.malloc_trim(0)
        libc.mallopt(_M_MMAP_MAX, 0)  # so that malloc grows the heap
        grown = libc.malloc(min(_MOST, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2))
        libc.mallopt(_M_MMAP_MAX, 1 << 16)  # the default
        libc.free(grown)
        for line in Path("/proc/self/maps").read_bytes().splitlines():
            if line.endswith(b"[heap]"):
                begin, end = (int(bound, 16) for bound in line.split()[0].split(b"-"))
                libc.madvise(begin, end - begin, _MADV_HUGEPAGE)


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # malloc.h
_MADV_HUGEPAGE = 14  # sys/mman.h
_MOST = 16 << 30
_ADDRESSES = resource.RLIMIT_AS, resource.RLIMIT_DATA
