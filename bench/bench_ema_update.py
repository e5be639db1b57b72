"""ema_update_ of the parameters of a ViT-Ti/16 and its head, compared with the reference's loop and torch's fastest."""

import pytest
import torch
from dino_train.models.vit import build_model

from dino_kernels import ema_update_, ema_update_reference_

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def foreach_lerp(targets, sources, momentum):
    torch._foreach_lerp_(targets, sources, 1 - momentum)


@pytest.mark.parametrize(
    "op", [ema_update_, foreach_lerp, ema_update_reference_], ids=["ema_update_", "foreach_lerp", "reference"]
)
def test_ema(benchmark, op):
    torch.set_num_threads(2)
    benchmark.group = f"EMA of ViT-Ti/16 + head, 27.5 M parameters, {DEVICE}"
    settings = {"patch_size": 16, "out_dim": 65536, "img_size": 224, "drop_path_rate": 0.0}
    nets = [
        build_model("vit_tiny", **settings, use_bn_in_head=False, norm_last_layer=True).to(DEVICE) for _ in range(2)
    ]
    targets, sources = (list(p.detach() for p in net.parameters()) for net in nets)

    def step():
        op(targets, sources, 0.996)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(step, rounds=100, warmup_rounds=5)
