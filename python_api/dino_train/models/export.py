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
from dino_train.models.names import to_huggingface
from dino_train.models.vit import VIT_SIZES, VisionTransformer
from dino_train.models.weights import Trained

Format = Literal["safetensors", "timm", "huggingface", "onnx"]
FOLDERS = ("timm", "huggingface")


def export(trained: Trained, path: Path, form: Format = "safetensors") -> None:
    """Write the backbone for other libraries: complete, or not at all.

    * safetensors: a file of the weights under their own names (which are also timm's); arch, patch and image size are
      in its metadata.
    * timm: a folder for `timm.create_model("local-dir:<folder>", pretrained=True)`, or for the model hub. Its
      model.safetensors is also what `create_model("vit_small_patch16_224.dino", checkpoint_path=...)` takes.
    * huggingface: a folder for `transformers.ViTModel.from_pretrained(folder, add_pooling_layer=False)`, whose
      `last_hidden_state[:, 0]` are the features, and for `AutoImageProcessor.from_pretrained`.
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
    metadata = {"arch": trained.arch, "image_size": str(trained.image_size)}
    if isinstance(trained.backbone, VisionTransformer):
        metadata["patch_size"] = str(trained.patch_size)
    metadata |= _scale(trained)
    _save(trained.backbone.state_dict(), path, metadata)


def _scale(trained: Trained) -> dict[str, str]:
    return {name: json.dumps(value) for name, value in scale_settings(trained.scale).items()}


def _save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    from safetensors.torch import save

    # Not save_file, whose files only their owner may read.
    path.write_bytes(save({k: v.contiguous() for k, v in tensors.items()}, {"format": "pt", **metadata}))


def _timm(trained: Trained, folder: Path) -> None:
    if trained.arch == "resnet_nano":
        raise ValueError("timm has no resnet_nano; for it there are safetensors and onnx")
    arch, arguments, classifier, first = "resnet50", {}, "fc", "conv1"
    if isinstance(trained.backbone, VisionTransformer):
        # timm has no vit_nano, but every size of ViT is made by the arguments.
        base = "vit_tiny" if trained.arch == "vit_nano" else trained.arch
        patch = 8 if trained.patch_size == 8 and base != "vit_tiny" else 16
        arch, classifier, first = f"{base}_patch{patch}_224", "head", "patch_embed.proj"
        arguments = {"img_size": trained.image_size, "patch_size": trained.patch_size}
        arguments |= VIT_SIZES[trained.arch]._asdict()
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
    _safetensors(trained, folder / "model.safetensors")


def _huggingface(trained: Trained, folder: Path) -> None:
    backbone = trained.backbone
    if not isinstance(backbone, VisionTransformer):
        raise ValueError(f"huggingface takes a ViT, got {trained.arch}; for it there are safetensors, timm and onnx")
    size = VIT_SIZES[trained.arch]
    config = {
        "architectures": ["ViTModel"],
        "model_type": "vit",
        "hidden_size": size.embed_dim,
        "num_hidden_layers": size.depth,
        "num_attention_heads": size.num_heads,
        "intermediate_size": 4 * size.embed_dim,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": backbone.norm.eps,
        "qkv_bias": True,
        "image_size": trained.image_size,
        "patch_size": trained.patch_size,
        "num_channels": backbone.channels,
        "torch_dtype": "float32",
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
    _save(to_huggingface(backbone.state_dict()), folder / "model.safetensors", _scale(trained))


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
