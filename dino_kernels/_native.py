"""The compiled module dino_kernels._C and the numbers that Python and C++ agree on."""

import torch

try:
    from dino_kernels import _C  # type: ignore[attr-defined]
except ImportError as error:
    raise ImportError(
        f"the compiled part of dino_kernels does not load ({error}); "
        "build it with `pip install .` or, in the source tree, `python setup.py build_ext --inplace`"
    ) from error

# enum class DType in csrc/kernels.h
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

__all__ = ["DTYPES", "_C"]
