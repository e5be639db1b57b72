"""Launches of the CUDA C++ kernels of csrc/cuda."""
