"""Linear layers and fused ops of a transformer block, forward + backward, compared with eager and torch.compile.

The packed crops of a step of ViT-Ti, 4 images: 8 sequences of 197 tokens and 32 of 37.
"""

from functools import partial

import pytest
import torch

import dino_kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOKENS, CHANNELS = 8 * 197 + 32 * 37, 192


def add_layer_norm(stream, branch, scale):
    affine = torch.ones(CHANNELS, device=DEVICE), torch.zeros(CHANNELS, device=DEVICE)
    return (stream, branch, *affine), {"scale": scale}


def bias_gelu(stream, branch, scale):
    return (branch.repeat(1, 4), torch.zeros(4 * CHANNELS, device=DEVICE)), {}


def linear(stream, branch, scale):
    return (branch, branch[: 3 * CHANNELS].clone(), branch[0].repeat(3)), {}


def mlp(stream, branch, scale):
    biases = torch.zeros(4 * CHANNELS, device=DEVICE), torch.zeros(CHANNELS, device=DEVICE)
    first, second = branch[: 4 * CHANNELS] / CHANNELS**0.5, branch[:CHANNELS].repeat(1, 4) / CHANNELS**0.5
    return (branch, first, biases[0], second, biases[1]), {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16 branch"])
@pytest.mark.parametrize("form", ["ours", "reference", "compiled reference"])
@pytest.mark.parametrize("inputs", [add_layer_norm, bias_gelu, linear, mlp], ids=lambda inputs: inputs.__name__)
def test_block_op(benchmark, inputs, form, dtype):
    torch.set_num_threads(2)
    name = inputs.__name__
    benchmark.group = f"{name}, forward + backward, {TOKENS} tokens, ViT-Ti {dtype} {DEVICE}"
    op = getattr(dino_kernels, name if form == "ours" else f"{name}_reference")
    if form == "compiled reference":
        op = torch.compile(op, fullgraph=True)
    g = torch.Generator().manual_seed(0)
    stream, branch = (torch.randn(TOKENS, CHANNELS, generator=g).to(DEVICE) for _ in range(2))
    scale = ((torch.rand(TOKENS, generator=g) < 0.9) / 0.9).to(DEVICE)
    leaves, options = inputs(stream, branch.to(dtype), scale)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    forward = partial(op, *leaves, **options)
    grads = torch.utils._pytree.tree_map(torch.ones_like, forward())

    def step():
        torch.autograd.grad(forward(), leaves, grads)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(step, rounds=50, warmup_rounds=5)
