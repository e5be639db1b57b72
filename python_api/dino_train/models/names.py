"""Weights of a ViT under the names of Hugging Face's ViTModel and back, and without layer scale."""

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_HUGGINGFACE = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
    "norm1": "layernorm_before",
    "attn.proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_BARE = {there: here for here, there in _HUGGINGFACE.items()}
_PARTS = ("query", "key", "value")


def to_huggingface(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Under the names that published ViTs have there; queries, keys and values are layers of their own."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        block, stem, kind = _split(name, r"blocks\.(\d+)\.")
        block = block and f"encoder.layer.{block}."
        if stem == "attn.qkv":
            for part, rows in zip(_PARTS, tensor.chunk(3), strict=True):
                tensors[f"{block}attention.attention.{part}{kind}"] = rows.clone()
        else:
            tensors[f"{block}{_HUGGINGFACE[stem]}{kind}"] = tensor
    return tensors


def from_huggingface(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Under the names here; what has no other name keeps its own."""
    tensors: dict[str, Any] = {}
    joined: dict[str, dict[str, Any]] = defaultdict(dict)
    for name, tensor in weights.items():
        block, stem, kind = _split(name, r"encoder\.layer\.(\d+)\.")
        block = block and f"blocks.{block}."
        if stem.startswith("attention.attention."):
            joined[f"{block}attn.qkv{kind}"][stem.rpartition(".")[2]] = tensor
        else:
            tensors[f"{block}{_BARE.get(stem, stem)}{kind}"] = tensor
    for name, parts in joined.items():
        if set(parts) == set(_PARTS):  # else the missing name is reported
            tensors[name] = torch.cat([parts[part] for part in _PARTS])
    return tensors


def _split(name: str, blocks: str) -> tuple[str, str, str]:
    """The number of the block, the layer within it, and ".weight", ".bias" or nothing."""
    found = re.match(blocks, name)
    stem = name[found.end() :] if found else name
    kind = re.search(r"\.(weight|bias)$|$", stem)
    assert kind is not None
    return found[1] if found else "", stem[: kind.start()], kind[0]


def fold_layer_scale(weights: Mapping[str, Any]) -> dict[str, Any]:
    """The same function without layer scale (Touvron et al. 2021, arXiv 2103.17239, equation 4): its factors multiply
    the rows of the layer before."""
    folded = {name: value for name, value in weights.items() if not re.search(r"\.ls[12]\.gamma$", name)}
    for name in weights.keys() - folded.keys():
        block, layer = name.removesuffix(".gamma").rsplit(".", 1)
        for kind in ("weight", "bias"):
            before = f"{block}.{'attn.proj' if layer == 'ls1' else 'mlp.fc2'}.{kind}"
            if before in folded:  # else the missing name is reported
                gamma = weights[name]
                folded[before] = folded[before] * (gamma[:, None] if kind == "weight" else gamma)
    return folded
