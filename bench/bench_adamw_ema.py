"""The optimizer phase (clip, AdamW, EMA, bfloat16 copies) of a ViT-Ti/16 and its head against torch's best and the
reference's loops."""

import pytest
import torch
from dino_train.model import build_model

from dino_kernels import adamw_ema_step_

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CLIP, MOMENTUM = 3.0, 0.996


def reference_clip(parameters):
    for p in parameters:  # utils.py:132-141, a host sync a tensor
        coefficient = CLIP / (p.grad.norm(2).item() + 1e-6)
        if coefficient < 1:
            p.grad.mul_(coefficient)


def foreach_clip(parameters):
    grads = [p.grad for p in parameters]
    scales = torch._foreach_norm(grads)
    torch._foreach_add_(scales, 1e-6)
    torch._foreach_reciprocal_(scales)
    torch._foreach_mul_(scales, CLIP)
    torch._foreach_clamp_max_(scales, 1.0)
    torch._foreach_mul_(grads, scales)


def separate(parameters, teachers, best):
    """A step of torch's own calls: the fused ones, or the reference's."""
    settings = {"lr": 5e-4, "weight_decay": 0.04}
    optimizer = (
        torch.optim.AdamW(parameters, fused=True, **settings) if best else torch.optim.AdamW(parameters, **settings)
    )
    copies = [torch.empty_like(p, dtype=torch.bfloat16) for p in (*parameters, *teachers)]
    weights = [p.detach() for p in parameters]

    def step():
        (foreach_clip if best else reference_clip)(parameters)
        optimizer.step()
        if best:
            torch._foreach_lerp_(teachers, weights, 1 - MOMENTUM)
        else:
            for t, s in zip(teachers, weights, strict=True):
                t.mul_(MOMENTUM).add_((1 - MOMENTUM) * s)
        torch._foreach_copy_(copies, [*weights, *teachers])

    return step


def fused(parameters, teachers, _):
    def flat(tensors, dtype=torch.float32):
        return torch.cat([x.detach().flatten() for x in tensors]).to(dtype)

    offsets = [0]
    for p in parameters:
        offsets.append(offsets[-1] + p.numel())
    student, teacher, grad = flat(parameters), flat(teachers), flat([p.grad for p in parameters])
    moments = [torch.zeros_like(student) for _ in range(2)]
    flags = torch.zeros(len(parameters), dtype=torch.bool, device=DEVICE)
    options = {
        "offsets": offsets,
        "steps": torch.zeros(len(parameters), dtype=torch.int64, device=DEVICE),
        "decayed": ~flags,
        "frozen": flags,
        "nonfinite": torch.zeros((), dtype=torch.int32, device=DEVICE),
        "student_16": student.bfloat16(),
        "teacher_16": teacher.bfloat16(),
    }

    def step():
        settings = {"lr": 5e-4, "weight_decay": 0.04, "momentum": MOMENTUM, "clip_norm": CLIP}
        adamw_ema_step_(student, grad, *moments, teacher, **options, **settings)

    return step


@pytest.mark.parametrize(
    "make, best",
    [(fused, True), (separate, True), (separate, False)],
    ids=["adamw_ema_step_", "torch_fused_and_foreach", "reference"],
)
def test_optimizer_phase(benchmark, make, best):
    torch.set_num_threads(2)
    benchmark.group = f"optimizer phase of ViT-Ti/16 + head, 27.5 M parameters, bfloat16 copies, {DEVICE}"
    settings = {"patch_size": 16, "out_dim": 65536, "img_size": 224, "drop_path_rate": 0.0}
    nets = [
        build_model("vit_tiny", **settings, use_bn_in_head=False, norm_last_layer=False).to(DEVICE) for _ in range(2)
    ]
    parameters, teachers = list(nets[0].parameters()), [p.detach() for p in nets[1].parameters()]
    for p in parameters:
        p.grad = torch.randn_like(p) * 0.01
    phase = make(parameters, teachers, best)

    def step():
        phase()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(step, rounds=30, warmup_rounds=3)
