"""Modules on the kernels, for a model of one's own.

net = MyModel()                                   of Linear, Mlp, Block, WeightNormLinear and any module of torch
flat = FlatParameters(net, torch.bfloat16)
for x, y in batches:
    loss(net(x), y).backward()
    optimizer.step()                              of torch, over flat.weights or net.parameters()
    flat.renew()
    flat.clear_grad()
"""

from dino_kernels.nn.block import Block
from dino_kernels.nn.flat_parameters import FlatParameters
from dino_kernels.nn.layers import LayerScale, Linear, Mlp, PatchEmbed, WeightNormLinear, hold_copies
from dino_kernels.nn.packing import Branch, Packing, drop_path, split_sequences

__all__ = [
    "Block",
    "Branch",
    "FlatParameters",
    "LayerScale",
    "Linear",
    "Mlp",
    "Packing",
    "PatchEmbed",
    "WeightNormLinear",
    "drop_path",
    "hold_copies",
    "split_sequences",
]
