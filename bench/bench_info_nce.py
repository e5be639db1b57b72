"""InfoNCE against a queue, forward + backward, compared with the form of public code, which stores all logits."""

import pytest
import torch
import torch.nn.functional as F

from dino_kernels import info_nce

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS, KEYS, CHANNELS, TEMP = 64, 65536, 128, 0.2


def concatenation(query, positive, columns):
    """As in MoCo: the queue is stored as columns and copied, because it changes before the backward pass."""
    logits = torch.cat([(query * positive).sum(1, keepdim=True), query @ columns.clone()], dim=1)
    return F.cross_entropy(logits / TEMP, torch.zeros(len(query), dtype=torch.int64, device=query.device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("op", ["info_nce", "concatenation"])
def test_info_nce(benchmark, op, dtype):
    torch.set_num_threads(2)
    benchmark.group = f"info_nce, forward + backward, R={ROWS} K={KEYS} D={CHANNELS} {dtype} {DEVICE}"
    g = torch.Generator().manual_seed(0)
    sizes = (ROWS, ROWS, KEYS)
    query, positive, keys = (F.normalize(torch.randn(n, CHANNELS, generator=g), dim=1).to(DEVICE, dtype) for n in sizes)
    query.requires_grad_()
    columns = keys.t().contiguous()

    def step():
        query.grad = None
        loss = (
            info_nce(query, positive, keys, temp=TEMP) if op == "info_nce" else concatenation(query, positive, columns)
        )
        loss.backward()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(step, rounds=20, warmup_rounds=3)
