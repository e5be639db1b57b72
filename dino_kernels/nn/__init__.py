"""Modules on the kernels: what goes into a model of one's own."""
