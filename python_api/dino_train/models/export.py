"""Backbones for other libraries: safetensors, timm, Hugging Face and ONNX."""

import importlib.util
import json
import logging
import os
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from torch import Tensor

from dino_train.common.scale import scale_settings
from dino_train.models.names import to_huggingface, to_timm
from dino_train.models.plain_vit import PLAIN_SIZES, PlainSize, ViT
from dino_train.models.vit import VIT_SIZES
from dino_train.models.weights import Trained

Format = Literal["safetensors", "timm", "huggingface", "onnx"]
FOLDERS = ("timm", "huggingface")


def export(trained: Trained, path: Path, form: Format = "safetensors") -> None:
    """Write the backbone for other libraries: complete, or not at all.

    * safetensors: a file of the weights under their own names; arch, patch and image size are in its metadata.
    * timm: a folder for `timm.create_model("local-dir:<folder>", pretrained=True)`, or for the model hub. Its
      model.safetensors is also what `create_model("vit_small_patch16_224.dino", checkpoint_path=...)` takes.
    * huggingface: a folder for `transformers.ViTModel.from_pretrained(folder, add_pooling_layer=False)`, whose
      `last_hidden_state[:, 0]` are the features, and for `AutoImageProcessor.from_pretrained`. With registers it is for
      `Dinov2WithRegistersModel`, of DINOv2's ViT-g for `Dinov2Model`, of DINOv3 for `DINOv3ViTModel`.
    * onnx: a file with input "images" [batch, channels, image_size, image_size] and output "features" [batch, C].

    Raises:
        ValueError: a ResNet for huggingface, resnet_nano for timm, ONNX without its packages, or a folder that is in
            use at `path`.
    """
    is_folder = form in FOLDERS
    if path.is_dir() and not (is_folder and not any(path.iterdir())):
        raise ValueError(f"{path} is a folder{' that is not empty' if is_folder else ''}; choose another --output")
    if is_folder and path.is_file():
        raise ValueError(f"{path} is a file, and {form} is written as a folder; choose another --output")
    write = {"safetensors": _safetensors, "timm": _timm, "huggingface": _huggingface, "onnx": _onnx}[form]
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        temporary = Path(folder, path.name)
        if is_folder:
            temporary.mkdir()
        write(trained, temporary)
        os.replace(temporary, path)


def _safetensors(trained: Trained, path: Path) -> None:
    _save(trained.backbone.state_dict(), path, _metadata(trained))


def _metadata(trained: Trained) -> dict[str, str]:
    metadata = {"arch": trained.arch, "image_size": str(trained.image_size)}
    if isinstance(trained.backbone, ViT):
        metadata["patch_size"] = str(trained.patch_size)
    return metadata | _scale(trained)


def _scale(trained: Trained) -> dict[str, str]:
    return {name: json.dumps(value) for name, value in scale_settings(trained.scale).items()}


def _save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    from safetensors.torch import save

    # Not save_file, whose files only their owner may read.
    path.write_bytes(save({k: v.contiguous() for k, v in tensors.items()}, {"format": "pt", **metadata}))


def _timm(trained: Trained, folder: Path) -> None:
    if trained.arch == "resnet_nano":
        raise ValueError("timm has no resnet_nano; for it there are safetensors and onnx")
    arch, classifier, first = "resnet50", "fc", "conv1"
    arguments: dict[str, Any] = {}
    weights = trained.backbone.state_dict()
    if isinstance(trained.backbone, ViT):
        arch, arguments = _timm_vit(trained, trained.backbone.lead - 1)
        weights, classifier, first = to_timm(weights), "head", "patch_embed.proj"
    if trained.backbone.channels != 3:
        arguments, first = {**arguments, "in_chans": trained.backbone.channels}, ""  # timm adapts no first layer then
    preprocessing = {
        "input_size": [trained.backbone.channels, trained.image_size, trained.image_size],
        "fixed_input_size": "img_size" in arguments,
        "interpolation": "bicubic",
        "crop_pct": 224 / 256,
        "crop_mode": "center",
        "mean": trained.scale.mean,
        "std": trained.scale.std,
    }
    config: dict[str, Any] = {
        "architecture": arch,
        "num_classes": 0,
        "num_features": trained.backbone.embed_dim,
        "pretrained_cfg": {"tag": "dino", **preprocessing, "num_classes": 0, "first_conv": first or None}
        | {"classifier": classifier, "pool_size": None},
        "model_args": arguments,
    }
    _write_json(config, folder / "config.json")
    _save(weights, folder / "model.safetensors", _metadata(trained))


def _timm_vit(trained: Trained, registers: int) -> tuple[str, dict[str, Any]]:
    """The name of a model of timm, and the arguments that make it ours."""
    arguments: dict[str, Any] = {"img_size": trained.image_size, "patch_size": trained.patch_size}
    size = PLAIN_SIZES.get(trained.arch)
    if size is None:
        # timm has no vit_nano, but every size of ViT is made by the arguments.
        base = "vit_tiny" if trained.arch == "vit_nano" else trained.arch
        patch = 8 if trained.patch_size == 8 and base in ("vit_small", "vit_base") else 16
        arguments |= VIT_SIZES[trained.arch]._asdict()
        arguments |= {"reg_tokens": registers, "no_embed_class": True} if registers else {}
        return f"{base}_patch{patch}_224", arguments
    # With layer scale folded and biases of queries and values; the features are those of the class token.
    arguments |= size._asdict() | {"init_values": None, "qkv_bias": True, "global_pool": "token"}
    ratio = arguments.pop("hidden_dim") / size.embed_dim
    swiglu, rope = arguments.pop("swiglu"), arguments.pop("rope")
    if rope:
        arguments |= {"mlp_ratio": ratio, "swiglu_mlp": swiglu, "swiglu_align_to": 8, "num_reg_tokens": registers}
        return "vit_small_patch16_dinov3", arguments
    arguments |= {"mlp_ratio": 2 * ratio, "reg_tokens": registers, "no_embed_class": registers > 0}
    return "vit_giant_patch14_dinov2", arguments


def _huggingface(trained: Trained, folder: Path) -> None:
    backbone = trained.backbone
    if not isinstance(backbone, ViT):
        raise ValueError(f"huggingface takes a ViT, got {trained.arch}; for it there are safetensors, timm and onnx")
    plain = PLAIN_SIZES.get(trained.arch)
    size = plain or VIT_SIZES[trained.arch]
    config = {
        "hidden_size": size.embed_dim,
        "num_hidden_layers": size.depth,
        "num_attention_heads": size.num_heads,
        "layer_norm_eps": backbone.norm.eps,
        "image_size": trained.image_size,
        "patch_size": trained.patch_size,
        "num_channels": backbone.channels,
        "torch_dtype": "float32",
        **_huggingface_kind(plain, size.embed_dim, backbone.lead - 1),
    }
    _write_json(config, folder / "config.json")
    scale, rgb = trained.scale, trained.scale.is_8_bit_rgb
    channels = list(zip(scale.low, scale.high, scale.mean, scale.std, strict=True))
    # ViT's own processor crops nothing; this one, of DINOv2 too, does what our evaluation does.
    crop = trained.image_size
    processor = {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": rgb,
        "do_resize": True,
        "size": {"shortest_edge": round(crop * 256 / 224)},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": crop, "width": crop},
        "do_rescale": rgb,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": scale.mean if rgb else [low + mean * (high - low) for low, high, mean, _ in channels],
        "image_std": scale.std if rgb else [std * (high - low) for low, high, _, std in channels],
    }
    _write_json(processor, folder / "preprocessor_config.json")
    weights = to_huggingface(backbone.state_dict(), config["model_type"])
    _save(weights, folder / "model.safetensors", _scale(trained))


def _huggingface_kind(plain: PlainSize | None, dim: int, registers: int) -> dict[str, Any]:
    """The model's class and what only its configuration has."""
    if plain and plain.rope:
        kind = {"architectures": ["DINOv3ViTModel"], "model_type": "dinov3_vit", "num_register_tokens": registers}
        mlp = {"hidden_act": "silu" if plain.swiglu else "gelu", "use_gated_mlp": plain.swiglu}
        return kind | mlp | {"intermediate_size": plain.hidden_dim, "key_bias": True}
    common = {"hidden_act": "gelu", "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "qkv_bias": True}
    if registers:
        kind = {"architectures": ["Dinov2WithRegistersModel"], "model_type": "dinov2_with_registers"}
        kind["num_register_tokens"] = registers
    elif plain:
        kind = {"architectures": ["Dinov2Model"], "model_type": "dinov2"}
    else:
        return {"architectures": ["ViTModel"], "model_type": "vit", "intermediate_size": 4 * dim} | common
    return kind | common | {"mlp_ratio": 4, "use_swiglu_ffn": plain is not None}


def _write_json(values: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")


def _onnx(trained: Trained, path: Path) -> None:
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        needed = " and ".join(missing)
        raise ValueError(f"the ONNX format needs {needed}: pip install {' '.join(missing)}, or the extra [onnx]")
    backbone = trained.backbone
    device, size = next(backbone.parameters()).device, trained.image_size
    images = torch.zeros(2, backbone.channels, size, size, device=device)
    # Of torch's own parts, and of a torchvision that nothing here needs.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.onnx.export(
            backbone.eval(),
            (images,),
            path,
            input_names=["images"],
            output_names=["features"],
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            external_data=False,
            verbose=False,
        )
