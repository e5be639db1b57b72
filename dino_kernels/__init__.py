"""Fused kernels for DINO pretraining: native C++ on the CPU, Triton or CUDA C++ on the GPU."""

from importlib.metadata import PackageNotFoundError, version

from dino_kernels._core.backends import set_backend
from dino_kernels.ops.adamw_ema import adamw_ema_step_, adamw_ema_step_reference_
from dino_kernels.ops.add_layer_norm import add_layer_norm, add_layer_norm_reference
from dino_kernels.ops.add_product import add_product_, add_product_reference_
from dino_kernels.ops.attention import attention, attention_reference
from dino_kernels.ops.bias_gelu import bias_gelu, bias_gelu_reference
from dino_kernels.ops.column_mass import (
    column_mass,
    column_mass_reference,
    sinkhorn_center,
    sinkhorn_center_reference,
)
from dino_kernels.ops.dino_head_loss import dino_head_loss, dino_head_loss_reference
from dino_kernels.ops.dino_loss import dino_loss, dino_loss_reference
from dino_kernels.ops.ema_update import ema_update_, ema_update_reference_
from dino_kernels.ops.fused_block import FusedBlock
from dino_kernels.ops.info_nce import info_nce, info_nce_reference
from dino_kernels.ops.linear import linear, linear_reference
from dino_kernels.ops.mlp import mlp, mlp_reference
from dino_kernels.ops.multicrop import CROP, CropKind, PixelScale, draw_crops, multicrop, multicrop_packed
from dino_kernels.ops.patch_loss import patch_loss, patch_loss_reference
from dino_kernels.ops.sgd_ema import sgd_ema_step_, sgd_ema_step_reference_
from dino_kernels.ops.weight_norm import (
    weight_norm_,
    weight_norm_product_backward_,
    weight_norm_product_backward_reference_,
    weight_norm_reference_,
)

try:
    __version__ = version("dino-kernels")
except PackageNotFoundError:  # a source tree on the path, not installed
    __version__ = "0+unknown"

__all__ = [
    "CROP",
    "CropKind",
    "FusedBlock",
    "PixelScale",
    "adamw_ema_step_",
    "adamw_ema_step_reference_",
    "add_layer_norm",
    "add_layer_norm_reference",
    "add_product_",
    "add_product_reference_",
    "attention",
    "attention_reference",
    "bias_gelu",
    "bias_gelu_reference",
    "column_mass",
    "column_mass_reference",
    "dino_head_loss",
    "dino_head_loss_reference",
    "dino_loss",
    "dino_loss_reference",
    "draw_crops",
    "ema_update_",
    "ema_update_reference_",
    "info_nce",
    "info_nce_reference",
    "linear",
    "linear_reference",
    "mlp",
    "mlp_reference",
    "multicrop",
    "multicrop_packed",
    "patch_loss",
    "patch_loss_reference",
    "set_backend",
    "sgd_ema_step_",
    "sgd_ema_step_reference_",
    "sinkhorn_center",
    "sinkhorn_center_reference",
    "weight_norm_",
    "weight_norm_product_backward_",
    "weight_norm_product_backward_reference_",
    "weight_norm_reference_",
]
