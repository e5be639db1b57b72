"""Which kernels an op runs on a GPU, Triton's or those of csrc/cuda, and what the launches of the latter share."""

import importlib
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dino_kernels._core.cuda_defaults import CUDA_BY_DEFAULT
from dino_kernels._core.native import _C

__all__ = ["GpuKernel", "given", "kernels", "set_backend", "stream"]

_BACKENDS = ("triton", "cuda")
_VARIABLE = "DINO_KERNELS_BACKEND"
_REBUILD = "install nvcc (CUDA 12.8 or newer) and run `pip install .` or `python setup.py build_ext --inplace` again"
_backend: str | None = None


def set_backend(backend: str | None) -> None:
    """Chooses the kernels that ops run on a GPU, for the process; the environment variable DINO_KERNELS_BACKEND does
    the same at import.

    Args:
        backend: "triton", or "cuda" for the ahead-of-time compiled CUDA C++ kernels of ema_update_, adamw_ema_step_,
            dino_loss, and of attention over float16 or bfloat16 with D = 64, `groups` of at most 256 tokens and rows
            that begin at multiples of 16 bytes; everything else stays Triton's. None: what was measured to be faster
            on the chip (dino_kernels/_core/cuda_defaults.py), Triton where nothing was.

    Raises:
        ValueError: another name.
        RuntimeError: "cuda" in a build without CUDA C++ kernels; and, when an op is called, on a GPU for which
            they were not compiled.
    """
    global _backend
    if backend is not None and backend not in _BACKENDS:
        raise ValueError(f"backend ({_VARIABLE} in the environment) must be triton or cuda, got {backend!r}")
    if backend == "cuda" and not compiled_archs():
        raise RuntimeError(f"this build of dino_kernels has no CUDA C++ kernels: nvcc was not found; {_REBUILD}")
    _backend = backend


def compiled_archs() -> list[str]:
    """The architectures that the CUDA C++ kernels were compiled for, as nvcc names them: ["80", "90a", "100"]."""
    return list(kernels().archs) if hasattr(_C, "cuda") else []


class GpuKernel:
    """A function that runs on the device of its first tensor, a GPU.

    It is "module.function" of dino_kernels/triton, or of dino_kernels/cuda where that is chosen and `fits` says of the
    arguments that the kernels take them. They are imported at a call: a process on the CPU is spared Triton.
    """

    def __init__(self, *, triton: str, cuda: str | None = None, fits: Callable[..., bool] = lambda *_: True) -> None:
        self.triton, self.cuda, self.fits = triton, cuda, fits

    def __call__(self, *args: Any) -> Any:
        first = next(x for x in args if x is not None)
        device = (first[0] if isinstance(first, list) else first).device
        with torch.cuda.device(device):  # kernels are launched on the current device
            return self.chosen(device, *args)(*args)

    def chosen(self, device: torch.device, *args: Any) -> Callable[..., Any]:
        backend, name = "triton", self.triton
        if self.cuda is not None and _takes_cuda(self.cuda.partition(".")[0], device) and self.fits(*args):
            backend, name = "cuda", self.cuda
        module, function = name.split(".")
        return getattr(importlib.import_module(f"dino_kernels.{backend}.{module}"), function)


def _takes_cuda(op: str, device: torch.device) -> bool:
    if _backend == "triton" or (_backend is None and all(op != other for other, _ in CUDA_BY_DEFAULT)):
        return False
    capability = torch.cuda.get_device_capability(device)
    runs = any(_runs_on(arch, capability) for arch in compiled_archs())
    if _backend == "cuda" and not runs:
        raise RuntimeError(
            f"the CUDA C++ kernels of this build are for sm_{', sm_'.join(compiled_archs())}, but {device} has compute "
            f"capability {capability[0]}.{capability[1]}; set the backend to triton, or add the chip to NVCC_ARCHS in "
            "setup.py and build again"
        )
    return runs and (_backend == "cuda" or (op, capability) in CUDA_BY_DEFAULT)


def _runs_on(arch: str, capability: tuple[int, int]) -> bool:
    """Whether code for sm_<arch> runs on a chip, with the shared memory that the kernels ask for.

    Code for sm_100 runs on all of 10.x; sm_80's would on 8.6 and 8.9, which have less shared memory.
    """
    major, minor = divmod(int(arch.rstrip("a")), 10)
    return capability == (major, minor) or (major >= 10 and arch[-1] != "a" and capability[0] == major)


def kernels() -> "_C.Cuda":
    """The launchers of the CUDA C++ kernels."""
    return _C.cuda


def stream() -> int:
    """torch's current stream, on which a graph's capture sees the launch."""
    return torch.cuda.current_stream().cuda_stream


def given(setting: Tensor) -> tuple[int, bool, float]:
    """A 0-d tensor as a launcher takes it: its value if it is the host's, which needs no upload, else its address."""
    if on_host(setting):
        return 0, False, setting.item()
    return setting.data_ptr(), setting.dtype == torch.float64, 0.0


def on_host(setting: Tensor) -> bool:
    return setting.device.type == "cpu"


set_backend(os.environ.get(_VARIABLE) or None)
