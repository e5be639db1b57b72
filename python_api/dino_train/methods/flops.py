"""What a step of a method computes: the measure by which methods of different crops compare."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dino_kernels.nn import Packing
from dino_train.config.pretrain import PretrainConfig
from dino_train.methods import build_method
from dino_train.models.vit import Net, VisionTransformer


def flops_per_image(config: PretrainConfig) -> float:
    """Floating-point operations of matrix products and convolutions, forward and backward, both networks; a
    multiply-add is 2. What drop path leaves out is counted, what checkpointed activations compute again is not."""
    # Masks are spread over a micro-batch; anything else is the same of each image.
    meta, batch = torch.device("meta"), config.mask_kind.images if config.mask_kind else 4
    method = build_method(replace(config, precision="float32", drop_path_rate=0.0, bn_split=0), meta)
    attention = 0

    def with_attention(backbone: VisionTransformer) -> Callable[[Tensor, Packing, bool], Tensor]:
        """Adds the op of `dino_kernels`, of which the counter knows nothing."""
        run = backbone._run

        def counted(x: Tensor, packing: Packing, class_only: bool) -> Tensor:
            nonlocal attention
            for count, tokens in packing.groups:
                queries = (len(backbone.blocks) - 1) * tokens + (1 if class_only else tokens)
                attention += count * 4 * backbone.embed_dim * tokens * queries * (3 if torch.is_grad_enabled() else 1)
            return run(x, packing, class_only)

        return counted

    nets: tuple[Net, ...] = (method.student, method.teacher)
    for net in nets:
        net.to(meta)
        if isinstance(net.backbone, VisionTransformer):
            net.backbone._run = with_attention(net.backbone)  # type: ignore[assignment, method-assign]
    method.teacher.requires_grad_(False)
    crops = [torch.empty(batch, config.channels, kind.size, kind.size, device=meta) for kind in config.crop_kinds]
    if config.mask_kind is not None:
        crops.append(torch.empty(batch, 2, config.mask_kind.side**2, dtype=torch.bool, device=meta))
    with FlopCounterMode(display=False) as counter:
        method.forward(crops, torch.empty((), device=meta)).loss.backward()
    return (counter.get_total_flops() + attention) / batch
