"""The compiled module dino_kernels._C, the numbers it shares with Python, memory for results, and settings of ops."""

import weakref
from collections.abc import Callable

import numpy as np
import torch

try:
    from dino_kernels import _C
    from dino_kernels._C import Products
except ImportError as error:
    raise ImportError(
        f"the compiled part of dino_kernels does not load ({error}); build it with `pip install .` or, in the source "
        "tree, `python setup.py build_ext --inplace`; if it is installed, start Python outside the source tree"
    ) from error

# enum class DType in csrc/common/dtype.h
DTYPES: dict[torch.dtype, int] = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
# the steps of a crop's jitter, struct Crop in csrc/cpu/multicrop/multicrop.h
JITTER: tuple[str, ...] = ("brightness", "contrast", "saturation", "hue")

__all__ = ["DTYPES", "JITTER", "Products", "_C", "address", "dtype_of", "reused_empty", "setting"]


def address(x: torch.Tensor | None) -> int:
    """Where a tensor's values begin; 0 for a tensor that may be left out and is."""
    return 0 if x is None else x.data_ptr()


def dtype_of(x: torch.Tensor | None) -> int:
    """The number of a tensor's dtype; any for a tensor that may be left out and is."""
    return 0 if x is None else DTYPES[x.dtype]


_spare: list[np.ndarray] = []  # at most one buffer, waiting for the next tensor of its size


def reused_empty(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """An uninitialized CPU tensor in the memory of the last one of its size that nobody holds any more.

    torch's CPU allocator returns large blocks to the system; faulting 40 MiB of pages in again costs as much as
    computing them. Kept between calls: one buffer.
    """
    size = shape.numel() * dtype.itemsize
    try:
        buffer = _spare.pop()
    except IndexError:  # none, or another thread was faster
        buffer = np.empty(0, np.uint8)
    if buffer.nbytes != size:
        buffer = np.empty(size, np.uint8)
    holder = buffer[:]  # lives as long as the tensor's storage
    weakref.finalize(holder, _give_back, buffer).atexit = False
    return torch.empty(0, dtype=dtype, device="cpu").set_(torch.from_numpy(holder).untyped_storage(), 0, shape)  # type: ignore[call-overload]


def _give_back(buffer: np.ndarray) -> None:
    _spare[:] = [buffer]


def setting(
    name: str, value: float | torch.Tensor, device: torch.device, allowed: str, fits: Callable[[float], bool]
) -> torch.Tensor:
    """`value` as a 0-d tensor: on `device`, or, if it was a float, float64 on the host, which costs no launch.

    Raises:
        ValueError: a tensor that is not 0-d or elsewhere; a float that does not fit, with `allowed` saying what does.
    """
    if isinstance(value, torch.Tensor):
        if value.ndim or value.device != device:
            raise ValueError(f"{name} must be a float or a 0-d tensor on {device}, got {value}")
        return value
    if not fits(value):
        raise ValueError(f"{name} must be {allowed}, got {value}")
    return torch.full((), value, dtype=torch.float64, device="cpu")
