"""Fused kernels for DINO pretraining: native C++ on the CPU, Triton or CUDA C++ on the GPU."""

from dino_kernels._cuda import set_backend
from dino_kernels._ops import without_autograd
from dino_kernels.adamw_ema import adamw_ema_step_, adamw_ema_step_reference_
from dino_kernels.add_layer_norm import add_layer_norm, add_layer_norm_reference
from dino_kernels.add_product import add_product_, add_product_reference_
from dino_kernels.attention import attention, attention_reference
from dino_kernels.bias_gelu import bias_gelu, bias_gelu_reference
from dino_kernels.dino_head_loss import dino_head_loss, dino_head_loss_reference
from dino_kernels.dino_loss import dino_loss, dino_loss_reference
from dino_kernels.drop_path_add import drop_path_add, drop_path_add_reference
from dino_kernels.ema_update import ema_update_, ema_update_reference_
from dino_kernels.fused_block import FusedBlock
from dino_kernels.linear import linear, linear_reference
from dino_kernels.mlp import mlp, mlp_reference
from dino_kernels.multicrop import CROP, CropKind, draw_crops, multicrop, multicrop_packed
from dino_kernels.weight_norm import (
    weight_norm_,
    weight_norm_backward_,
    weight_norm_backward_reference_,
    weight_norm_product_backward_,
    weight_norm_product_backward_reference_,
    weight_norm_reference_,
)

__all__ = [
    "CROP",
    "CropKind",
    "FusedBlock",
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
    "dino_head_loss",
    "dino_head_loss_reference",
    "dino_loss",
    "dino_loss_reference",
    "draw_crops",
    "drop_path_add",
    "drop_path_add_reference",
    "ema_update_",
    "ema_update_reference_",
    "linear",
    "linear_reference",
    "mlp",
    "mlp_reference",
    "multicrop",
    "multicrop_packed",
    "set_backend",
    "weight_norm_",
    "weight_norm_backward_",
    "weight_norm_backward_reference_",
    "weight_norm_product_backward_",
    "weight_norm_product_backward_reference_",
    "weight_norm_reference_",
    "without_autograd",
]
