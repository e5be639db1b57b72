"""What a step of a method computes: the measure by which methods of different crops compare."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dino_train.config.pretrain import PretrainConfig
from dino_train.methods import build_method
from dino_train.models.vit import Net, VisionTransformer


def flops_per_image(config: PretrainConfig) -> float:
    """Floating-point operations of matrix products and convolutions, forward and backward, both networks; a
    multiply-add is 2. What drop path leaves out is counted, what
    checkpointed activations compute again is not."""
    meta, batch = torch.device("meta"), 4
    method = build_method(replace(config, precision="float32", drop_path_rate=0.0), meta)
    attention = 0

    def add_attention(backbone: VisionTransformer, inputs: tuple[Any, ...], output: object) -> None:
        """The op of `dino_kernels`, of which the counter knows nothing."""
        nonlocal attention
        crops: list[Tensor] = [inputs[0]] if isinstance(inputs[0], Tensor) else list(inputs[0])
        for crop in crops:
            tokens = 1 + (crop.shape[2] // backbone.patch_size) * (crop.shape[3] // backbone.patch_size)
            products = 4 * backbone.embed_dim * tokens * ((len(backbone.blocks) - 1) * tokens + 1)
            attention += len(crop) * products * (3 if torch.is_grad_enabled() else 1)

    nets: tuple[Net, ...] = (method.student, method.teacher)
    for net in nets:
        net.to(meta)
        if isinstance(net.backbone, VisionTransformer):
            net.backbone.register_forward_hook(add_attention)
    method.teacher.requires_grad_(False)
    crops = [torch.empty(batch, config.channels, kind.size, kind.size, device=meta) for kind in config.crop_kinds]
    with FlopCounterMode(display=False) as counter:
        method.forward(crops, torch.empty((), device=meta)).loss.backward()
    return (counter.get_total_flops() + attention) / batch
