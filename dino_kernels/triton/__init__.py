"""The Triton kernels of the ops and their launches; imported by an op's first call on a GPU."""
