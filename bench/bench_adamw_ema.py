"""The optimizer phase (clip, AdamW, EMA, bfloat16 copies) of a ViT-Ti/16 and its head, compared with torch's fastest
form and the reference's loops: the case of gpu.py at a size for a CPU."""

import pytest
import torch
from gpu_report import OURS
from op_cases import adamw_ema
from setting import Sizes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROVIDERS = {"adamw_ema_step_": OURS, "torch_fused_and_foreach": "torch fused", "reference": "reference"}


@pytest.mark.parametrize("form", PROVIDERS)
def test_optimizer_phase(benchmark, form):
    torch.set_num_threads(2)
    case = adamw_ema(DEVICE, Sizes(width=192, heads=3))
    benchmark.group = f"{case.op}, ViT-Ti/16 + head, {case.shape}, {DEVICE}"
    phase = case.providers[PROVIDERS[form]]

    def step():
        phase()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(step, rounds=30, warmup_rounds=3)
