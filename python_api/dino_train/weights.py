"""Trained backbones: out of a run or a published file, and into safetensors."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from dino_train import checkpoint
from dino_train.model import VisionTransformer, load_backbone_weights, vit
from dino_train.resnet import resnet50


@dataclass
class Trained:
    """A backbone in eval mode, and what it was trained with."""

    backbone: nn.Module
    arch: str
    patch_size: int
    image_size: int
    data: Path | None


def load_trained(
    path: Path,
    *,
    arch: str | None = None,
    patch_size: int | None = None,
    net: str = "teacher",
    device: torch.device | None = None,
) -> Trained:
    """The backbone of a run's folder, of one of its checkpoints, or of a file in the reference's formats.

    Args:
        path: folder with last.pt, or a file.
        arch, patch_size: only where the file does not tell (published weights).
        net: "teacher" (what the paper evaluates) or "student".
        device: where to put it; the CPU by default.

    Raises:
        CheckpointError: unreadable; ValueError: arch or patch size unknown, or the weights do not fit them.
    """
    state = checkpoint.load_newest(path)[0] if path.is_dir() else checkpoint.load(path)
    args = state.get("args", {})
    args = args if isinstance(args, dict) else vars(args)
    arch = arch or args.get("arch", "").replace("deit_", "vit_") or None  # the reference's other name for its ViTs
    if arch is None:
        raise ValueError(f"{path} does not tell its architecture: add --arch and --patch-size")
    patch_size = patch_size or args.get("patch_size", 16)
    image_size = args.get("global_crops_size", 224)
    backbone: nn.Module
    if arch == "resnet50":
        backbone = resnet50()
    else:
        backbone = vit(arch, patch_size=patch_size, img_size=image_size)
    load_backbone_weights(backbone, state, net=net)
    data = Path(args["data"]) if "data" in args else None
    return Trained(backbone.eval().to(device), arch, patch_size, image_size, data)


def export(trained: Trained, path: Path) -> None:
    """Write the backbone's weights as safetensors, with arch, patch and image size in the metadata."""
    from safetensors.torch import save_file

    tensors = {name: tensor.contiguous() for name, tensor in trained.backbone.state_dict().items()}
    metadata = {"format": "pt", "arch": trained.arch, "image_size": str(trained.image_size)}
    if isinstance(trained.backbone, VisionTransformer):
        metadata["patch_size"] = str(trained.patch_size)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        save_file(tensors, temporary, metadata=metadata)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
