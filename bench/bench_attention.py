"""attention forward + backward on the packed crops of a step (ViT-Ti, batch 4), compared with torch's attention."""

import pytest
import torch
import torch.nn.functional as F

from dino_kernels import attention, attention_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEADS, CHANNELS = 3, 64
GROUPS = ((8, 197), (32, 37))  # (sequences, tokens per sequence): 2 global and 8 local crops of 4 images


def sdpa(qkv, cu_seqlens):
    """scaled_dot_product_attention, one call per sequence length."""
    outs, begin = [], 0
    for count, length in GROUPS:
        x = qkv[begin : begin + count * length].unflatten(0, (count, length)).permute(2, 0, 3, 1, 4)
        outs.append(F.scaled_dot_product_attention(*x).transpose(1, 2).flatten(0, 1))
        begin += count * length
    return torch.cat(outs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("op", [attention, sdpa, attention_reference], ids=lambda op: op.__name__)
def test_attention(benchmark, op, dtype):
    torch.set_num_threads(2)
    benchmark.group = f"attention, forward + backward, {GROUPS} tokens, {HEADS} heads {dtype} {DEVICE}"
    lengths = [length for count, length in GROUPS for _ in range(count)]
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(DEVICE, torch.int32)
    g = torch.Generator().manual_seed(0)
    qkv = torch.randn(sum(lengths), 3, HEADS, CHANNELS, generator=g).to(DEVICE, dtype).requires_grad_()
    grad_out = torch.randn(sum(lengths), HEADS, CHANNELS, generator=g).to(DEVICE, dtype)

    def step():
        torch.autograd.grad(op(qkv, bounds), qkv, grad_out)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(step, rounds=50, warmup_rounds=5)
