"""Weights of a backbone that was trained on images of another size, with another patch, channels or tokens."""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino_train.models.names import fold_layer_scale, registers_of

FIRST = ("patch_embed.proj.weight", "conv1.weight")


def adapt(weights: Mapping[str, Any], backbone: nn.Module) -> tuple[dict[str, Any], list[str]]:
    """Weights of the names and shapes of `backbone`, and in words what was changed.

    Layer scale is folded where the backbone has none. Registers and a mask token are left where it has none or another
    number, and are its own where the weights lack them. Positions are interpolated bicubically, a patch is resampled
    so that its products with smooth images stay the same, and channels are repeated or left, with the same sum of
    weights. What cannot be adapted is left as it is.
    """
    wanted = backbone.state_dict()
    adapted, notes = _parts(weights, wanted)
    for name in FIRST:
        if not _both_have(name, 4, adapted, wanted):
            continue
        old, new = adapted[name].shape, wanted[name].shape
        if old[1] != new[1]:
            adapted[name] = _channels(adapted[name], new[1])
            notes.append(f"first layer of {old[1]} channels adapted to {new[1]}")
        if name == FIRST[0] and old[2:] != new[2:]:
            adapted[name] = resample_patch(adapted[name], new[-1])
            notes.append(f"patches of {old[-1]} resampled to {new[-1]} pixels")
    name = "pos_embed"
    if _both_have(name, 3, adapted, wanted) and adapted[name].shape[1] != wanted[name].shape[1]:
        old, new = (math.isqrt(x[name].shape[1] - 1) for x in (adapted, wanted))
        if adapted[name].shape[1] == old**2 + 1:
            adapted[name] = _positions(adapted[name], new)
            notes.append(f"positions of {old} x {old} patches interpolated to {new} x {new}")
    return adapted, notes


def _parts(weights: Mapping[str, Any], wanted: Mapping[str, Tensor]) -> tuple[dict[str, Any], list[str]]:
    """With layer scale, registers and a mask token where they are wanted, and without them elsewhere."""
    adapted, notes = dict(weights), []
    gammas = {name: torch.ones_like(gamma) for name, gamma in wanted.items() if name.endswith(".gamma")}
    scaled = any(name.endswith(".gamma") for name in weights)
    if scaled and not gammas:
        adapted = fold_layer_scale(adapted)
        notes.append("layer scale folded")
    elif gammas and not scaled:
        adapted |= gammas
        notes.append("layer scale starts at 1")
    old, new = registers_of(weights), registers_of(wanted)
    if old != new:
        adapted.pop("register_tokens", None)
        notes += [f"{old} registers left"] * (old > 0) + [f"{new} registers are new"] * (new > 0)
    for name in ("register_tokens", "mask_token"):
        if name in wanted:
            adapted.setdefault(name, wanted[name])
    if "mask_token" not in wanted:
        adapted.pop("mask_token", None)
    return adapted, notes


def _both_have(name: str, dims: int, *states: Mapping[str, Any]) -> bool:
    return all(getattr(state.get(name), "ndim", None) == dims for state in states)


def _channels(weight: Tensor, channels: int) -> Tensor:
    """An image whose channels all are the same gives the same features as before."""
    old = weight.shape[1]
    repeated = weight.repeat(1, math.ceil(channels / old), 1, 1)[:, :channels]
    total, now = (x.sum(dim=1, keepdim=True) for x in (weight, repeated))
    return repeated + (total - now) / channels if channels % old else repeated * (old / channels)


def resample_patch(weight: Tensor, size: int) -> Tensor:
    """A patch embedding [C, channels, p, p] for patches of `size` pixels, whose products with patches that were
    resized bicubically are as near as possible to those with the patches before (Beyer et al. 2022, arXiv 2212.08013,
    equation 5)."""
    old = weight.shape[-1]
    basis = torch.eye(old * old, dtype=torch.float64).view(old * old, 1, old, old)
    resize = F.interpolate(basis, size=(size, size), mode="bicubic", antialias=size < old).flatten(1).T  # [new, old]
    resampled = weight.double().flatten(2) @ torch.linalg.pinv(resize)
    return resampled.unflatten(2, (size, size)).to(weight.dtype)


def _positions(positions: Tensor, side: int) -> Tensor:
    """[1, 1 + patches, C] for a grid of side x side patches; the class token's stays."""
    of_class, grid = positions.split([1, positions.shape[1] - 1], dim=1)
    old = math.isqrt(grid.shape[1])
    grid = grid.unflatten(1, (old, old)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid.float(), size=(side, side), mode="bicubic", antialias=side < old)
    return torch.cat((of_class, grid.flatten(2).transpose(1, 2).to(positions.dtype)), dim=1)
