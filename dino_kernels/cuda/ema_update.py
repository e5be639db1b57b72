"""The CUDA C++ kernel of ema_update_, csrc/cuda/ema_update.cu."""

from dino_kernels._core import backends
from dino_kernels._core.native import DTYPES

__all__ = ["update_cuda"]


def update_cuda(targets, sources, momentum):
    backends.kernels().ema_update(
        [t.data_ptr() for t in targets],
        [s.data_ptr() for s in sources],
        [t.numel() for t in targets],
        [DTYPES[s.dtype] for s in sources],
        backends.given(momentum),
        backends.stream(),
    )
