"""Last layer and loss, forward + backward from the bottleneck output, compared with separate GEMMs and loss."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from dino_kernels import dino_head_loss, dino_head_loss_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OUTPUTS, VIEWS, CHANNELS = 65536, 10, 256
OPS = {
    "dino_head_loss": dino_head_loss,
    "dino_head_loss_with_logits": partial(dino_head_loss, store_logits=True),
    "reference": dino_head_loss_reference,
}


@pytest.mark.parametrize("batch", [4, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("op", OPS)
def test_head_loss(benchmark, op, dtype, batch):
    if DEVICE == "cuda" and dtype == torch.float32 and op == "dino_head_loss":
        pytest.skip("float32 on a GPU needs store_logits")
    torch.set_num_threads(2)
    benchmark.group = f"dino_head_loss, forward + backward, K={OUTPUTS} V={VIEWS} B={batch} {dtype} {DEVICE}"
    g = torch.Generator().manual_seed(0)
    sizes = (VIEWS * batch, 2 * batch, OUTPUTS, OUTPUTS)
    rows = [F.normalize(torch.randn(n, CHANNELS, generator=g), dim=-1).to(DEVICE, dtype) for n in sizes]
    student_z, teacher_z, weight, weight_teacher = rows
    student_z.requires_grad_()
    weight.requires_grad_()
    center = torch.zeros(OUTPUTS, device=DEVICE)

    def step():
        student_z.grad = weight.grad = None
        loss, _ = OPS[op](student_z, teacher_z, weight, weight_teacher, center)
        loss.backward()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(step, rounds=20, warmup_rounds=3)
