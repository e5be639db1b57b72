"""The start of a net's weights."""

from torch import nn


def init_linear(module: nn.Module) -> None:
    """The reference's start for the linear layers of a ViT and of the head."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
