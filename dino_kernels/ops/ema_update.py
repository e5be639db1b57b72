"""The teacher's exponential moving average, in place over lists of tensors.

    t = m t + (1 - m) s

Read and written once: 12 bytes a float32 parameter, where two eager calls a tensor move 28.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from dino_kernels._core.native import _C, DTYPES, setting
from dino_kernels._core.registry import custom_op

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


@custom_op("ema_update_", mutates_args=("targets",), triton="ema_update.update_triton", cuda="ema_update.update_cuda")
def _update_(targets: list[Tensor], sources: list[Tensor], momentum: Tensor) -> None:
    _update_cpu(targets, sources, momentum)


# --- CPU ---------------------------------------------------------------------------------------------


def _update_cpu(targets, sources, momentum):
    _C.ema_update(
        targets=[t.data_ptr() for t in targets],
        sources=[s.data_ptr() for s in sources],
        sizes=[t.numel() for t in targets],
        source_dtypes=[DTYPES[s.dtype] for s in sources],
        momentum=float(momentum),
        threads=torch.get_num_threads(),
    )
