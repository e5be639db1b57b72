"""The CUDA C++ kernel of ema_update_, csrc/cuda/ema_update.cu."""

from dino_kernels import _cuda
from dino_kernels._native import DTYPES

__all__ = ["update_cuda"]


def update_cuda(targets, sources, momentum):
    _cuda.kernels().ema_update(
        [t.data_ptr() for t in targets],
        [s.data_ptr() for s in sources],
        [t.numel() for t in targets],
        [DTYPES[s.dtype] for s in sources],
        _cuda.given(momentum),
        _cuda.stream(),
    )
