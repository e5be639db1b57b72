"""The optimizer phase with LARS (clip, LARS, EMA, bfloat16 copies) of a ResNet-50 and a projection head, compared with
LARS' loop between foreach calls, and with loops alone."""

import pytest
import torch
from dino_train.models.resnet import resnet50
from gpu_report import OURS
from op_cases import lars_ema

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROVIDERS = {"sgd_ema_step_": OURS, "lars_and_foreach": "foreach", "reference": "reference"}


@pytest.mark.parametrize("form", PROVIDERS)
def test_optimizer_phase(benchmark, form):
    torch.set_num_threads(2)
    shapes = [tuple(p.shape) for p in resnet50().parameters()]
    case = lars_ema(DEVICE, [*shapes, (2048, 2048), (2048,), (128, 2048), (128,)])
    benchmark.group = f"{case.op}, ResNet-50 + head, {case.shape}, {DEVICE}"
    phase = case.providers[PROVIDERS[form]]

    def step():
        phase()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(step, rounds=30, warmup_rounds=3)
