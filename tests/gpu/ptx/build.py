"""Compiles the C++ core of the emulator when its sources have changed."""

import ctypes
import hashlib
import os
import subprocess
import tempfile
from functools import cache
from pathlib import Path

CORE = Path(__file__).parent / "core"
CACHE = Path(__file__).resolve().parents[3] / "build/ptx"
FLAGS = ["-std=c++20", "-O2", "-march=native", "-ftree-vectorize", "-fvect-cost-model=dynamic", "-fno-math-errno"]
FLAGS += ["-ffp-contract=off", "-frounding-math", "-fPIC", "-Wall", "-Wextra", "-Wno-parentheses"]


@cache
def library() -> ctypes.CDLL:
    native = subprocess.check_output(["g++", "-march=native", "-Q", "--help=target"])  # resolves -march=native
    common = (CORE / "machine.h").read_bytes() + " ".join(FLAGS).encode() + native
    objects = {
        source: f"{source.stem}-{hashlib.sha256(source.read_bytes() + common).hexdigest()[:16]}.o"
        for source in sorted(CORE.glob("*.cpp"))
    }
    target = CACHE / f"core-{hashlib.sha256(' '.join(objects.values()).encode()).hexdigest()[:16]}.so"
    if not target.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:  # renamed at the end: several processes may compile
            for source, name in objects.items():
                if not (CACHE / name).exists():
                    subprocess.run(["g++", *FLAGS, "-c", str(source), "-o", f"{folder}/{name}"], check=True)
                    os.replace(f"{folder}/{name}", CACHE / name)
            linked = [str(CACHE / name) for name in objects.values()]
            subprocess.run(["g++", "-shared", "-o", f"{folder}/core.so", *linked], check=True)
            os.replace(f"{folder}/core.so", target)
    core = ctypes.CDLL(str(target))
    core.ptx_program.restype = core.ptx_executed.restype = core.ptx_executed_lanes.restype = ctypes.c_void_p
    core.ptx_launch.restype = ctypes.c_char_p
    return core
