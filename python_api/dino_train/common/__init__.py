"""Shared by the other packages of the trainer: devices, files, checkpoints, ranks, settings of the process."""
