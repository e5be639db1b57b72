"""Whether a device is a GPU: asked here alone, so that a test can take another device for one."""

import torch

__all__ = ["GPU_TYPES", "on_gpu"]

GPU_TYPES = {"cuda"}


def on_gpu(device: torch.device) -> bool:
    return device.type in GPU_TYPES
