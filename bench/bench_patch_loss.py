"""patch_loss forward + backward + batch center, compared with plain PyTorch."""

import pytest
import torch

from dino_kernels import patch_loss

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS, OUTPUTS = 784, 8192  # masked patches of 8 images; the outputs of iBOT


def softmaxes(student, teacher, center, weights, student_temp=0.1, teacher_temp=0.07):
    """As in public code: two softmaxes and a product, for rows that all count."""
    q = ((teacher - center) / teacher_temp).softmax(dim=-1)
    loss = -(q * (student / student_temp).log_softmax(dim=-1)).sum(dim=-1)
    return (weights * loss).sum(), teacher.mean(dim=0, dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("op", [patch_loss, softmaxes], ids=lambda op: op.__name__)
def test_patch_loss(benchmark, op, dtype):
    torch.set_num_threads(2)
    benchmark.group = f"patch_loss, forward + backward, M={ROWS} K={OUTPUTS} {dtype} {DEVICE}"
    g = torch.Generator().manual_seed(0)
    student, teacher = ((torch.randn(ROWS, OUTPUTS, generator=g) / 16).to(DEVICE, dtype) for _ in range(2))
    student.requires_grad_()
    center, weights = torch.zeros(OUTPUTS, device=DEVICE), torch.full((ROWS,), 1 / ROWS, device=DEVICE)

    def step():
        student.grad = None
        loss, _ = op(student, teacher, center, weights=weights)
        loss.backward()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(step, rounds=30, warmup_rounds=3)
