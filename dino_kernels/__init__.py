"""Fused kernels for DINO pretraining: native C++ on the CPU, Triton on the GPU."""

from dino_kernels.attention import attention, attention_reference
from dino_kernels.dino_loss import dino_loss, dino_loss_reference
from dino_kernels.ema_update import ema_update_, ema_update_reference_

__all__ = [
    "attention",
    "attention_reference",
    "dino_loss",
    "dino_loss_reference",
    "ema_update_",
    "ema_update_reference_",
]
