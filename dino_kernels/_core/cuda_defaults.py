"""Where the CUDA C++ kernels of an op are taken unless a backend is set: nowhere yet, since no GPU has measured them.

An entry is (module of the op, as "dino_loss"; compute capability): a committed file of bench/results, whose measurement
on that chip shows them to be faster than Triton's.
"""

__all__ = ["CUDA_BY_DEFAULT"]

CUDA_BY_DEFAULT: dict[tuple[str, tuple[int, int]], str] = {}
