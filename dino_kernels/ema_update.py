"""The teacher's exponential moving average, in place over lists of tensors.

    t = m t + (1 - m) s

Read and written once: 12 bytes a float32 parameter, where two eager calls a tensor move 28.
"""

from collections.abc import Iterable
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from dino_kernels._native import _C, DTYPES, setting
from dino_kernels._ops import custom_op
from dino_kernels._triton import blend, blend_arguments, owner

__all__ = ["ema_update_", "ema_update_reference_"]


@torch.no_grad()
def ema_update_(targets: Iterable[Tensor], sources: Iterable[Tensor], momentum: float | Tensor) -> None:
    """t = m t + (1 - m) s for every pair of tensors, in place; one native call or launch for the whole list.

    Caron et al. 2021, section 3.1; main_dino.py:347-350. Computed in float32, no gradients.

    Args:
        targets: float32 tensors, contiguous, no two overlapping.
        sources: as many, of the same shapes and device; float32, float16 or bfloat16, contiguous.
        momentum: m in [0, 1], a float or a 0-d tensor on the device of the lists (read there: no
            synchronization). 1 - m is formed in the tensor's own precision.

    Raises:
        ValueError: lists of different lengths; a pair that does not fit the above, named by its index;
            m as a float outside [0, 1].
    """
    targets, sources = list(targets), list(sources)
    _check(targets, sources)
    if not targets:
        return
    torch.ops.dino_kernels.ema_update_(targets, sources, momentum_tensor(momentum, targets[0].device))


@torch.no_grad()
def ema_update_reference_(targets: Iterable[Tensor], sources: Iterable[Tensor], momentum: float | Tensor) -> None:
    """`ema_update_` in plain PyTorch, a tensor at a time as main_dino.py:349-350 does it."""
    for target, source in zip(targets, sources, strict=True):
        target.mul_(momentum).add_((1 - momentum) * source)


def momentum_tensor(momentum: float | Tensor, device: torch.device) -> Tensor:
    """`setting` of a momentum, in its own precision."""
    return setting("momentum", momentum, device, "in [0, 1]", lambda m: 0 <= m <= 1)


def _check(targets: list[Tensor], sources: list[Tensor]) -> None:
    if len(targets) != len(sources):
        raise ValueError(f"targets and sources must be as many, got {len(targets)} and {len(sources)}")
    for i, (t, s) in enumerate(zip(targets, sources, strict=True)):
        if t.shape != s.shape:
            raise ValueError(f"targets[{i}] has shape {list(t.shape)}, sources[{i}] {list(s.shape)}")
        if not t.device == s.device == targets[0].device:
            raise ValueError(
                f"targets[{i}] is on {t.device}, sources[{i}] on {s.device}, the list on {targets[0].device}"
            )
        if t.dtype != torch.float32 or s.dtype not in DTYPES:
            raise ValueError(
                f"targets[{i}] must be float32 and sources[{i}] float32, float16 or bfloat16, "
                f"got {t.dtype} and {s.dtype}"
            )
        if not (t.is_contiguous() and s.is_contiguous()):
            raise ValueError(
                f"targets[{i}] and sources[{i}] must be contiguous, "
                f"got strides {list(t.stride())} and {list(s.stride())}"
            )


# --- registration ------------------------------------------------------------------------------------


@custom_op("ema_update_", mutates_args=("targets",))
def _update_(targets: list[Tensor], sources: list[Tensor], momentum: Tensor) -> None:
    _update_cpu(targets, sources, momentum)


@_update_.register_kernel("cuda")
def _(targets, sources, momentum):
    with torch.cuda.device(targets[0].device):  # Triton launches on the current device
        _update_triton(targets, sources, momentum)


@_update_.register_fake
def _(targets, sources, momentum):
    return None


# --- CPU ---------------------------------------------------------------------------------------------


def _update_cpu(targets, sources, momentum):
    _C.ema_update(
        [t.data_ptr() for t in targets],
        [s.data_ptr() for s in sources],
        [t.numel() for t in targets],
        [DTYPES[s.dtype] for s in sources],
        float(momentum),
        torch.get_num_threads(),
    )


# --- GPU ---------------------------------------------------------------------------------------------

_BLOCK = 4096  # elements a program


@triton.jit
def _ema_kernel(table, tensors, momentum, rest, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    """One program a block of one tensor. Rows of table [5, tensors], int64: the tensor's first program, its
    size, the addresses of target and source, the source's dtype (numbers of DTYPES)."""
    program = tl.program_id(0)
    low = owner(table, tensors, program, STEPS)
    offset = (program - tl.load(table + low)) * BLOCK + tl.arange(0, BLOCK)
    mask = offset < tl.load(table + tensors + low)
    target = tl.load(table + 2 * tensors + low).to(tl.pointer_type(tl.float32))
    source = tl.load(table + 3 * tensors + low)
    dtype = tl.load(table + 4 * tensors + low)
    if dtype == 0:
        s = tl.load(source.to(tl.pointer_type(tl.float32)) + offset, mask)
    elif dtype == 1:
        s = tl.load(source.to(tl.pointer_type(tl.float16)) + offset, mask).to(tl.float32)
    else:
        s = tl.load(source.to(tl.pointer_type(tl.bfloat16)) + offset, mask).to(tl.float32)
    m, one_minus_m = blend(momentum, rest)
    t = tl.load(target + offset, mask)
    tl.store(target + offset, m * t + one_minus_m * s, mask)


@cache
def _table(rows: tuple[tuple[int, int, int, int], ...], device: torch.device) -> tuple[Tensor, int]:
    """The kernel's table and its number of programs. Kept, since a training run asks for the same every step:
    no upload, and a captured CUDA graph finds it where it was."""
    first, columns = 0, []
    for size, target, source, dtype in rows:
        columns.append((first, size, target, source, dtype))
        first += triton.cdiv(size, _BLOCK)
    return torch.tensor(columns, dtype=torch.int64, device="cpu").T.contiguous().to(device), first


def _update_triton(targets, sources, momentum):
    rows = tuple(
        (t.numel(), t.data_ptr(), s.data_ptr(), DTYPES[s.dtype])
        for t, s in zip(targets, sources, strict=True)
        if t.numel()
    )
    if rows:
        table, programs = _table(rows, targets[0].device)
        steps = len(rows).bit_length()
        _ema_kernel[(programs,)](table, len(rows), *blend_arguments(momentum), STEPS=steps, BLOCK=_BLOCK, num_warps=8)
