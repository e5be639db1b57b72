"""What all ops share: the compiled module, their registration, and the choice of kernels on a GPU."""
