"""dino_loss forward + backward + batch center, compared with other implementations."""

import pytest
import torch

from dino_kernels import dino_loss, dino_loss_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OUTPUTS, VIEWS = 65536, 10


def einsum_form(student, teacher, center, student_temp=0.1, teacher_temp=0.04):
    """One log_softmax per student row, all pairs by one einsum (as in DINOv3 and lightly)."""
    batch = teacher.shape[0] // 2
    log_p = (student.float() / student_temp).log_softmax(dim=-1).unflatten(0, (-1, batch))
    q = ((teacher.float() - center) / teacher_temp).softmax(dim=-1).unflatten(0, (2, batch))
    pairs = -torch.einsum("ubk,vbk->uv", q, log_p)
    terms = 2 * log_p.shape[0] - 2
    return (pairs.sum() - pairs.diagonal().sum()) / (batch * terms), teacher.float().mean(dim=0)


@pytest.mark.parametrize("batch", [4, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("op", [dino_loss, einsum_form, dino_loss_reference], ids=lambda op: op.__name__)
def test_loss(benchmark, op, dtype, batch):
    torch.set_num_threads(2)
    benchmark.group = f"dino_loss, forward + backward, K={OUTPUTS} V={VIEWS} B={batch} {dtype} {DEVICE}"
    g = torch.Generator().manual_seed(0)
    # Same scale as cosines of 256-dimensional vectors, the output of a weight-normalized last layer.
    student = (torch.randn(VIEWS * batch, OUTPUTS, generator=g) / 16).to(DEVICE, dtype).requires_grad_()
    teacher = (torch.randn(2 * batch, OUTPUTS, generator=g) / 16).to(DEVICE, dtype)
    center = torch.zeros(OUTPUTS, device=DEVICE)

    def step():
        student.grad = None
        loss, _ = op(student, teacher, center)
        loss.backward()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(step, rounds=50, warmup_rounds=5)
