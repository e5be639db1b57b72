"""Names of a ViT's weights in other libraries and here.

Here they are those of DINO and DINOv2: cls_token, register_tokens, pos_embed, patch_embed.proj, norm and, in
blocks.N, norm1, attn.qkv, attn.proj, ls1.gamma, norm2, mlp.fc1 and mlp.fc2 (SwiGLU: mlp.w12 and mlp.w3), ls2.gamma.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Names of Hugging Face's ViTModel, Dinov2Model, Dinov2WithRegistersModel and DINOv3ViTModel, as in its files and, where
# those differ, in its modules since version 5; then of timm, iBOT, DINOv2 (blocks in chunks) and DINOv3.
_RENAMES = [
    (r"^embeddings\.", ""),
    (r"^position_embeddings$", "pos_embed"),
    (r"^patch_embeddings(\.projection)?\.", "patch_embed.proj."),
    (r"^layernorm\.", "norm."),
    (r"^(encoder\.|model\.)?layer\.", "blocks."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.(attention\.)?([qkv])(uery|ey|alue|_proj)\.", r".attn.\2_proj."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"\.(intermediate\.dense|mlp\.up_proj)\.", ".mlp.fc1."),
    (r"\.(output\.dense|mlp\.down_proj)\.", ".mlp.fc2."),
    (r"\.mlp\.weights_in\.", ".mlp.w12."),
    (r"\.mlp\.weights_out\.", ".mlp.w3."),
    (r"\.mlp\.(gate_proj|fc1_g|w1)\.", ".mlp.gate."),
    (r"\.mlp\.(fc1_x|w2)\.", ".mlp.fc1."),
    (r"^(reg_token|storage_tokens)$", "register_tokens"),
    (r"^masked_embed$", "mask_token"),
    (r"\.gamma_([12])$", r".ls\1.gamma"),
    (r"\.attn\.([qv])_bias$", r".attn.\1_proj.bias"),
    (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),
]
PERIODS = "rope_embed.periods"
_UNUSED = ("local_cls_norm.", "rope.", "rope_embeddings.")  # the norm of DINOv3's local crops; what follows from sizes


def is_rotary(weights: Mapping[str, Any]) -> bool:
    """Whether weights under the names here are of rotary positions, as DINOv3's are."""
    return "pos_embed" not in weights and ("register_tokens" in weights or PERIODS in weights)


def registers_of(weights: Mapping[str, Any]) -> int:
    """How many registers a backbone of these weights has."""
    shape = _shape(weights.get("register_tokens"))
    return shape[1] if len(shape) == 3 else 0


def from_others(weights: Mapping[str, Any]) -> dict[str, Any]:
    """A backbone's weights under the names here; what has no other name keeps its own.

    Queries, keys and values are joined, and so are the two halves of SwiGLU. DINOv3 has no bias of keys: it becomes 0.
    timm adds the position of the class token to the token itself where there are registers: that position becomes 0.
    """
    renamed = {}
    for name, tensor in weights.items():
        for pattern, replacement in _RENAMES:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    tensors = {name: tensor for name, tensor in renamed.items() if not name.startswith(_UNUSED)}
    rotary = is_rotary(tensors)
    for block in dict.fromkeys(name[: found.end()] for name in tensors if (found := re.match(r"blocks\.\d+\.", name))):
        attn, mlp = f"{block}attn.", f"{block}mlp."
        if rotary:
            _complete_biases(tensors, attn)
        first, second = (_shape(tensors.get(f"{mlp}{layer}.weight")) for layer in ("fc1", "fc2"))
        for kind in ("weight", "bias"):
            _join(tensors, f"{attn}qkv.{kind}", [f"{attn}{part}_proj.{kind}" for part in "qkv"])
            _join(tensors, f"{mlp}w12.{kind}", [f"{mlp}gate.{kind}", f"{mlp}fc1.{kind}"])
            if first and second and first[0] == 2 * second[-1]:  # both halves of SwiGLU in one, as timm has DINOv2's
                _join(tensors, f"{mlp}w12.{kind}", [f"{mlp}fc1.{kind}"])
            if f"{mlp}w12.{kind}" in tensors:
                _join(tensors, f"{mlp}w3.{kind}", [f"{mlp}fc2.{kind}"])
    positions = _shape(tensors.get("pos_embed"))
    if "register_tokens" in tensors and len(positions) == 3 and math.isqrt(positions[1]) ** 2 == positions[1]:
        tensors["pos_embed"] = F.pad(tensors["pos_embed"], (0, 0, 1, 0))
    return tensors


def _shape(tensor: Any) -> tuple[int, ...]:
    return tuple(tensor.shape) if isinstance(tensor, Tensor) else ()


def _join(tensors: dict[str, Any], name: str, parts: list[str]) -> None:
    """If all parts are there; else what is missing is reported by its name."""
    if all(part in tensors for part in parts):
        tensors[name] = torch.cat([tensors.pop(part) for part in parts])


def _complete_biases(tensors: dict[str, Any], attn: str) -> None:
    """DINOv3's biases of queries, keys and values: masked (its own files), without that of keys, or none at all."""
    bias, mask = f"{attn}qkv.bias", tensors.pop(f"{attn}qkv.bias_mask", None)
    if mask is not None and bias in tensors:
        tensors[bias] = tensors[bias] * mask
    for part in "qkv":
        if (weight := tensors.get(f"{attn}{part}_proj.weight")) is not None:
            tensors.setdefault(f"{attn}{part}_proj.bias", weight.new_zeros(weight.shape[0]))
    if (weight := tensors.get(f"{attn}qkv.weight")) is not None and bias not in tensors:
        q, v = (tensors.pop(f"{attn}{part}_proj.bias", weight.new_zeros(weight.shape[-1])) for part in "qv")
        tensors[bias] = torch.cat((q, torch.zeros_like(q), v))


def fold_layer_scale(weights: Mapping[str, Any]) -> dict[str, Any]:
    """The same function without layer scale (Touvron et al. 2021, arXiv 2103.17239, equation 4): its factors multiply
    the rows of the layer before."""
    folded = {name: value for name, value in weights.items() if not re.search(r"\.ls[12]\.gamma$", name)}
    for name in weights.keys() - folded.keys():
        block, branch = name.removesuffix(".gamma").rsplit(".", 1)
        gamma = weights[name]
        gamma = gamma.to(torch.promote_types(gamma.dtype, torch.float32))
        for layer in ("attn.proj",) if branch == "ls1" else ("mlp.fc2", "mlp.w3"):
            for kind in ("weight", "bias"):
                before = f"{block}.{layer}.{kind}"
                if before in folded:  # else the missing name is reported
                    folded[before] = folded[before] * (gamma[:, None] if kind == "weight" else gamma)
    return folded


_TOKENS = {
    "cls_token": "embeddings.cls_token",
    "register_tokens": "embeddings.register_tokens",
    "pos_embed": "embeddings.position_embeddings",
}
_DINOV2 = {
    **_TOKENS,
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
    "blocks": "encoder.layer",
    "attn.q": "attention.attention.query",
    "attn.k": "attention.attention.key",
    "attn.v": "attention.attention.value",
    "attn.proj": "attention.output.dense",
    "mlp.w12": "mlp.weights_in",
    "mlp.w3": "mlp.weights_out",
}
_HUGGINGFACE = {
    "vit": _DINOV2
    | {"norm1": "layernorm_before", "norm2": "layernorm_after"}
    | {"mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"},
    "dinov2": _DINOV2,
    "dinov2_with_registers": _DINOV2,
    "dinov3_vit": _TOKENS
    | {"patch_embed.proj": "embeddings.patch_embeddings", "blocks": "layer", "attn.proj": "attention.o_proj"}
    | {f"attn.{part}": f"attention.{part}_proj" for part in "qkv"}
    | {"mlp.gate": "mlp.gate_proj", "mlp.value": "mlp.up_proj", "mlp.w3": "mlp.down_proj"}
    | {"mlp.fc1": "mlp.up_proj", "mlp.fc2": "mlp.down_proj"},
}
_TIMM_DINOV2 = {"register_tokens": "reg_token", "mlp.w12": "mlp.fc1", "mlp.w3": "mlp.fc2"}
_TIMM_DINOV3 = {"register_tokens": "reg_token", "mlp.gate": "mlp.fc1_g", "mlp.value": "mlp.fc1_x", "mlp.w3": "mlp.fc2"}
# Layers that are one here and several where a table has names for the parts.
_PARTS = {"attn.qkv": ("attn.q", "attn.k", "attn.v"), "mlp.w12": ("mlp.gate", "mlp.value")}


def to_huggingface(weights: Mapping[str, Tensor], model_type: str) -> dict[str, Tensor]:
    """Under the names that files have there. Of the model types all but "vit" have layer scale, which becomes 1, and a
    token of masked patches, which becomes 0."""
    tensors = _renamed(weights, _HUGGINGFACE[model_type])
    if model_type != "vit":
        token = weights["cls_token"]
        tensors["embeddings.mask_token"] = torch.zeros_like(token if model_type == "dinov3_vit" else token[0])
        for name in weights:
            if found := re.match(r"(blocks\.\d+\.)norm([12])\.weight$", name):
                gamma = {f"{found[1]}layer_scale{found[2]}.lambda1": torch.ones_like(token[0, 0])}
                tensors |= _renamed(gamma, _HUGGINGFACE[model_type])
    return tensors


def to_timm(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Under the names of timm: those here, but for registers, SwiGLU and rotary positions."""
    weights = dict(weights)
    if is_rotary(weights):
        for name in [name for name in weights if name.endswith("attn.qkv.bias")]:
            q, _, v = weights.pop(name).chunk(3)  # that of keys is 0
            weights |= {name.replace("qkv.bias", "q_bias"): q, name.replace("qkv.bias", "v_bias"): v}
        return _renamed(weights, _TIMM_DINOV3)
    if "register_tokens" in weights:
        positions = weights["pos_embed"]
        weights |= {"cls_token": weights["cls_token"] + positions[:, :1], "pos_embed": positions[:, 1:]}
    return _renamed(weights, _TIMM_DINOV2)


def _renamed(weights: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """By a table of layers; what has no name there keeps its own."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if name == PERIODS:  # follow from the size of the heads
            continue
        found = re.fullmatch(r"(?:blocks\.(\d+)\.)?(.*?)(\.weight|\.bias)?", name)
        assert found is not None
        block, layer, kind = found.groups(default="")
        start = f"{names.get('blocks', 'blocks')}.{block}." if block else ""
        parts = _PARTS.get(layer, ())
        parts = parts if names.keys() & set(parts) else (layer,)
        for part, rows in zip(parts, tensor.chunk(len(parts)), strict=True):
            tensors[f"{start}{names.get(part, part)}{kind}"] = rows.clone()
    return tensors
