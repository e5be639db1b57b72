"""Where the CUDA C++ kernels of an op are taken unless a backend is set: nowhere yet, since no GPU has measured them.

An entry is (op, compute capability): a file of bench/results, committed, whose measurement on that chip shows them
faster than Triton's.
"""

__all__ = ["CUDA_BY_DEFAULT"]

CUDA_BY_DEFAULT: dict[tuple[str, tuple[int, int]], str] = {}
