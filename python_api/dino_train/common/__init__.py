"""What the other rooms use: device, files, checkpoints, ranks, the process."""
