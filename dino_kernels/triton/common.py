"""What the Triton kernels of all ops share.

Importing Triton takes 72 MiB of memory. Only this folder does so, and an op imports it only where it runs on a GPU:
a process on the CPU is spared it.
"""

import triton
import triton.language as tl
from torch import Tensor

__all__ = [
    "LOG2_E",
    "LOWEST",
    "argument",
    "blend",
    "blend_arguments",
    "operand",
    "scalar",
    "shared_memory",
    "warp_size",
]


LOG2_E = tl.constexpr(1.4426950408889634)  # the exponential of the hardware is exp2
LOWEST = tl.constexpr(-1e30)  # start of a maximum: finite, so that a lane which saw nothing gives no NaN


def argument(setting: Tensor) -> Tensor | float:
    """A 0-d tensor as a kernel takes it: from the host its value, which needs no upload, else the tensor itself."""
    if setting.device.type == "cpu" and not triton.knobs.runtime.interpret:
        return setting.item()
    return setting


@triton.jit
def scalar(x):
    """The value of a kernel argument that is a number or the address of a 0-d tensor."""
    if x.dtype.is_ptr():
        x = tl.load(x)
    return x


def blend_arguments(momentum: Tensor) -> tuple[Tensor | float, float]:
    """What `blend` takes for a momentum: its address, or it and its complement, formed in double precision."""
    given = argument(momentum)
    return (given, 0.0) if isinstance(given, Tensor) else (given, 1 - given)


@triton.jit
def blend(momentum, rest):
    """(momentum, 1 - momentum) as float32; the complement is formed in the momentum's own precision."""
    if momentum.dtype.is_ptr():
        m = tl.load(momentum)
        rest = (1 - m).to(tl.float32)
        momentum = m.to(tl.float32)
    return momentum, rest


@triton.jit
def operand(x, WIDEN: tl.constexpr):
    """An operand of tl.dot in its own dtype, for the tensor cores; the interpreter multiplies float32 only."""
    return x.to(tl.float32) if WIDEN else x


# KiB of shared memory that one program may use, by compute capability (CUDA C++ Programming Guide, table of
# technical specifications) or AMD architecture; an unknown chip is taken for the smallest.
_KIB = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99, 121: 99, "gfx950": 160}


def warp_size() -> int:
    """Threads of a warp: 32 on NVIDIA, 64 on AMD's data-center chips."""
    return 32 if triton.knobs.runtime.interpret else triton.runtime.driver.active.get_current_target().warp_size


def shared_memory() -> int:
    """Bytes of shared memory a program may use on the current chip: tiles are chosen to fit."""
    arch = 90 if triton.knobs.runtime.interpret else triton.runtime.driver.active.get_current_target().arch
    return _KIB.get(arch, 64) << 10
