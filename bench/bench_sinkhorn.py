"""The center of Sinkhorn-Knopp, and with it the assignments, compared with the iterations of public code."""

import pytest
import torch

from dino_kernels import sinkhorn_center, sinkhorn_center_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TEMP = 0.05


def iterations(logits):
    """The assignments as SwAV and DINOv2 compute them: columns and rows of a float32 matrix are divided in turns."""
    q = (logits.float() / TEMP).exp().t()
    q /= q.sum()
    outputs, rows = q.shape
    for _ in range(3):
        q /= q.sum(dim=1, keepdim=True)
        q /= outputs
        q /= q.sum(dim=0, keepdim=True)
        q /= rows
    q *= rows
    return q.t()


def center(logits):
    """All that dino_loss needs."""
    return sinkhorn_center(logits, temp=TEMP)


def center_and_softmax(logits, center=sinkhorn_center):
    return ((logits - center(logits, temp=TEMP)) / TEMP).softmax(dim=1)


def reference(logits):
    return center_and_softmax(logits, sinkhorn_center_reference)


@pytest.mark.parametrize("rows, outputs", [(8, 65536), (128, 65536), (235, 8192), (128, 3000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("op", [center, center_and_softmax, iterations, reference], ids=lambda op: op.__name__)
def test_sinkhorn(benchmark, op, dtype, rows, outputs):
    torch.set_num_threads(2)
    benchmark.group = f"sinkhorn, 3 iterations, R={rows} K={outputs} {dtype} {DEVICE}"
    g = torch.Generator().manual_seed(0)
    # Same scale as cosines of 256-dimensional vectors, the output of a weight-normalized last layer.
    logits = (torch.randn(rows, outputs, generator=g) / 16).to(DEVICE, dtype)

    def step():
        op(logits)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(step, rounds=30, warmup_rounds=3)
