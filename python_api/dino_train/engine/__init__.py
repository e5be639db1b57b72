"""A run: its step, optimizers, gradient sum over ranks, CUDA graph, metrics."""
