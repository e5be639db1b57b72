"""CUDA C++ kernels without a GPU: csrc/cuda compiled by nvcc, on CPU tensors.

The launchers are linked to a test double of the CUDA runtime (cuda_runtime_double.cpp), which runs the PTX of the
kernels on the emulator. So everything from the op to its result is as on a GPU, except for the machine code.
"""

import ctypes
import fcntl
import functools
import gc
import importlib
import importlib.util
import shutil
import struct
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from ptx import launch

from dino_kernels._core import backends

ROOT = Path(__file__).resolve().parents[2]
STREAM = 0x5EED0  # any address: a launch on another stream is an error
# Fixture parameters: one architecture in every run, both in `make prove`.
QUICK = [pytest.param("80", marks=pytest.mark.prove), "90a"]
PROVE = [pytest.param(arch, marks=pytest.mark.prove) for arch in ("80", "90a")]
# (compute capability, maximum shared memory of a block): cudaDevAttrComputeCapabilityMajor, -Minor and ...Optin
CHIPS = {"80": (8, 0, 163 << 10), "90a": (9, 0, 227 << 10)}
MULTIPROCESSORS = 3  # few, so that a block processes several rows
_MULTIPROCESSOR_COUNT, _MAJOR, _MINOR, _MOST_SHARED = 16, 75, 76, 97  # enum cudaDeviceAttr
_LAUNCHER = ctypes.CFUNCTYPE(
    None, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint), ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p
)


NVCC = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
needs_nvcc = pytest.mark.skipif(not Path(NVCC).exists(), reason="nvcc is not installed")


def build(arch: str) -> Path:
    """The folder with cuda_double.so and the PTX of its kernels for sm_<arch>; built again when sources change."""
    import pybind11

    folder = ROOT / "build" / f"cuda_double_{arch}"
    folder.mkdir(parents=True, exist_ok=True)
    csrc = ROOT / "csrc"
    includes = f"-I{csrc} -I{pybind11.get_include()} -I{sysconfig.get_paths()['include']}"
    flags = "-MD -MF $out.d -std=c++17 -Xcompiler=-fPIC,-fvisibility=hidden"
    gencode = f"-gencode=arch=compute_{arch},code=compute_{arch}"
    lines = [
        "rule cpp",
        f"  command = {NVCC} {flags} -O1 {includes} -c $in -o $out",
        "  depfile = $out.d",
        "rule cuda",
        f"  command = {NVCC} {flags} -O3 -lineinfo -I{csrc} {gencode} --keep --keep-dir . -c $in -o $out",
        "  depfile = $out.d",
        "rule link",
        "  command = g++ -shared $in -o $out",
    ]
    objects = []
    for path in [
        *sorted(csrc.glob("cuda/*.cu")),
        csrc / "bindings/cuda.cpp",
        ROOT / "tests/helpers/cuda_runtime_double.cpp",
    ]:
        objects.append(f"{path.name}.o")
        lines.append(f"build {objects[-1]}: {'cuda' if path.suffix == '.cu' else 'cpp'} {path}")
    lines.append(f"build cuda_double.so: link {' '.join(objects)}")
    with open(folder / "lock", "w") as lock:  # for concurrent test processes
        fcntl.flock(lock, fcntl.LOCK_EX)
        (folder / "build.ninja").write_text("\n".join(lines) + "\n")
        done = subprocess.run([sys.executable, "-m", "ninja", "-C", str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    return folder


class Emulated:
    """dino_kernels._C.cuda on the emulator."""

    def __init__(self, arch: str) -> None:
        folder = build(arch)
        spec = importlib.util.spec_from_file_location("cuda_double", folder / "cuda_double.so")
        self.archs, self._double = [arch], importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self._double)
        self._error: Exception | None = None
        self.programs = {}
        for path in folder.glob("*.ptx"):
            module = launch.Module(path.read_text())
            self.programs.update({name: (module, name) for name in module.kernels})
        self._launcher = _LAUNCHER(self._launch)
        self._double.set_launcher(ctypes.cast(self._launcher, ctypes.c_void_p).value)
        self.launches: list[str] = []
        major, minor, shared = CHIPS[arch]
        for attribute, value in (
            (_MULTIPROCESSOR_COUNT, MULTIPROCESSORS),
            (_MAJOR, major),
            (_MINOR, minor),
            (_MOST_SHARED, shared),
        ):
            self._double.set_attribute(attribute, value)

    def __getattr__(self, name: str):
        function = getattr(self._double, name)

        @functools.wraps(function)
        def call(*args, **kwargs):
            result = function(*args, **kwargs)
            if self._error:
                error, self._error = self._error, None
                raise error
            return result

        return call

    def _launch(self, name: bytes, sizes, arguments, stream: int | None) -> None:
        """An exception cannot pass through C: it is raised after the launcher has returned."""
        try:
            assert stream == STREAM, f"launched on stream {stream}, the current one is {STREAM}"
            module, entry = self.programs[name.decode()]
            program = module.program(entry)
            parameters = bytearray(program.kernel.param_size)
            for i, (offset, size) in enumerate(program.kernel.params.values()):
                parameters[offset : offset + size] = ctypes.string_at(arguments[i], size)
            self.launches.append(entry)
            grid, block, shared = tuple(sizes[0:3]), tuple(sizes[3:6]), sizes[6]
            launch.launch(program, grid, block, bytes(parameters), _spans(bytes(parameters)), shared)
        except Exception as error:  # noqa: BLE001
            self._error = self._error or error


def _spans(parameters: bytes) -> list[launch.Span]:
    """The live tensors whose addresses are parameters of a kernel: all memory that it may access."""
    words = {word for (word,) in struct.iter_unpack("<Q", parameters[: len(parameters) // 8 * 8]) if word >> 32}
    spans = []
    for x in gc.get_objects():
        plain = type(x) in (torch.Tensor, torch.nn.Parameter) and x.device.type == "cpu" and x.numel()
        if plain and x.data_ptr() in words:
            last = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
            end = x.data_ptr() + (last + 1) * x.element_size()
            spans.append(launch.Span(x.data_ptr(), end, f"{x.dtype} {list(x.shape)}"))
    return spans


@functools.cache
def emulated(arch: str) -> Emulated:
    return Emulated(arch)


def use_cuda(monkeypatch: pytest.MonkeyPatch, op: str, arch: str, *, addresses: bool = False) -> str:
    """Select the CUDA C++ kernels of the op of module dino_kernels.ops.<op>, for CPU tensors; returns their device.

    addresses: scalar arguments are passed as 0-d device tensors, not by value. On sm_80, approximate functions have the
    maximum error that the ISA allows.
    """
    kernels = emulated(arch)
    monkeypatch.setattr(backends, "kernels", lambda: kernels)
    monkeypatch.setattr(backends, "stream", lambda: STREAM)
    monkeypatch.setattr(backends, "on_host", lambda setting: not addresses)
    options = launch.Options(fails_on=("error", "warning"), seed=int(arch[:2]), noise=arch == "80")
    monkeypatch.setattr(launch, "options", options)
    for target, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(target, name, _poisoned(getattr(target, name)))
    module, launchers = (importlib.import_module(f"dino_kernels.{room}.{op}") for room in ("ops", "cuda"))
    for name, function in vars(launchers).items():
        if name.endswith("_cuda") and hasattr(module, cpu := f"_{name.removesuffix('_cuda')}_cpu"):
            monkeypatch.setattr(module, cpu, function)
    return "cpu"


def _poisoned(make):
    """Fill new memory with the value that the emulator reports as unwritten."""

    @functools.wraps(make)
    def run(*args, **kwargs):
        x = make(*args, **kwargs)
        if type(x) is torch.Tensor and x.device.type == "cpu" and x.numel() and x.dtype != torch.bool:
            x.view(-1).view(torch.int16).fill_(0xFFA5 - (1 << 16))
        return x

    return run
