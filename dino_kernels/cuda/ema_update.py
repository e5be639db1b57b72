"""The CUDA C++ kernel of ema_update_, csrc/cuda/ema_update.cu."""

from dino_kernels._core import backends
from dino_kernels._core.native import DTYPES

__all__ = ["update_cuda"]


def update_cuda(targets, sources, momentum):
    backends.kernels().ema_update(
        targets=[t.data_ptr() for t in targets],
        sources=[s.data_ptr() for s in sources],
        sizes=[t.numel() for t in targets],
        source_dtypes=[DTYPES[s.dtype] for s in sources],
        momentum=backends.given(momentum),
        stream=backends.stream(),
    )
