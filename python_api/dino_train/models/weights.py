"""Trained backbones out of a run, one of its files or a published one."""

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dino_kernels import PixelScale
from dino_train.common import checkpoint
from dino_train.common.checkpoint import CheckpointError
from dino_train.common.scale import scale_of
from dino_train.models.adapt import FIRST
from dino_train.models.names import PERIODS, fold_layer_scale, from_others, is_rotary, registers_of
from dino_train.models.plain_vit import PLAIN_SIZES, PlainViT
from dino_train.models.resnet import RESNETS, ResNet
from dino_train.models.vit import ARCHS, VIT_SIZES, VisionTransformer, build_backbone

logger = logging.getLogger(__name__)

Backbone = VisionTransformer | PlainViT | ResNet
Choice = Literal["auto", "teacher", "student"]
ALL_ARCHS = (*ARCHS, *PLAIN_SIZES)
# Of the backbones of others' checkpoints: MoCo, MoCo v3, solo-learn, lightly, Lightning and Hugging Face.
_STUDENT = ("encoder_q.", "base_encoder.", "student.", "student_backbone.")
_TEACHER = (
    *("encoder_k.", "momentum_encoder.", "momentum_backbone.", "backbone_momentum."),
    *("teacher.", "teacher_backbone."),
)
_EITHER = ("backbone.", "vit.", "dinov2.", "dinov2_with_registers.", "model.", "net.")
_PREFIXES = {
    "student": (*_STUDENT, *_EITHER),
    "teacher": (*_TEACHER, *_EITHER),
    "auto": ("teacher.", "teacher_backbone.", *_STUDENT, *_EITHER),  # the teacher of DINO, else the student
}
_WRAPPERS = ("state_dict", "model")
_BARE_NAMES = ("cls_token", "embeddings.cls_token", "conv1.weight")
_HEADS = (
    "head.",
    "fc.",
    "projection_head.",
    "prototypes.",
    "projector.",
    "predictor.",
    "classifier.",
    "linear.",
    "pooler.",
)
_RESNET_PARTS = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}


@dataclass
class Trained:
    """A backbone in eval mode, and what it was trained with."""

    backbone: Backbone
    net: str  # teacher, student or weights
    arch: str
    patch_size: int
    image_size: int
    data: Path | None
    scale: PixelScale = field(default_factory=PixelScale)  # what the values of its images mean

    def transform(self, image: Any) -> Tensor:
        """The evaluation view of an image [channels, image_size, image_size]: a PIL image, or values [H, W, C].

        Raises:
            ValueError: the image has other channels.
        """
        from dino_train.common.views import eval_transform, view_of  # needs Pillow, which loading does not

        return eval_transform(view_of(image, self.scale), self.image_size, self.scale)


def load_backbone(path: str | Path, *, net: Choice = "auto", allow_partial: bool = False) -> Backbone:
    """A trained backbone in eval mode on the CPU; arch, patch and image size are read off the weights.

    Images are [B, channels, h, w], float, normalized as in training: `backbone.transform(image)` is the evaluation view
    of a PIL image or of values [H, W, C] (8-bit RGB with ImageNet's mean and std, unless it was trained on others). Of
    a ViT, `backbone(images)` are the normed
    class tokens [B, C], `backbone.features(images, n_blocks)` all tokens of the last blocks, each [B, 1 + patches, C],
    and `backbone.attention(images)` the class token's attention [B, heads, 1 + patches]. Of a ResNet-50,
    `backbone(images)` are the pooled features [B, 2048].

    Args:
        path: a run's folder, one of its checkpoints, a .safetensors file, a folder of timm's or Hugging Face's weights,
            or a .pth of the reference, DINOv2 or DINOv3.
        net: "teacher" or "student", where the file has both; "auto" is the one that its method evaluates.
        allow_partial: load what matches and warn of the rest, in place of an error.

    Raises:
        CheckpointError: unreadable; ValueError: no such net, an unknown architecture, weights that do not match.
    """
    trained = load_trained(Path(path), net=net, allow_partial=allow_partial)
    trained.backbone.transform = trained.transform  # type: ignore[assignment]
    return trained.backbone


def load_trained(
    path: Path,
    *,
    arch: str | None = None,
    patch_size: int | None = None,
    net: Choice = "auto",
    allow_partial: bool = False,
    device: torch.device | None = None,
) -> Trained:
    """As `load_backbone`, with what is known of the training; logs which weights of the file were taken.

    Args:
        arch, patch_size: what the weights must fit; by default what they are of.
        device: where to put the backbone; the CPU by default.
    """
    state, args = read(path)
    weights, found, left = backbone_weights(state, net=net)
    weights = fold_layer_scale(weights)
    weights.pop("mask_token", None)
    arch = arch or arch_of(weights, left, args.get("arch"))
    patch_size, image_size = _sizes(weights, patch_size, args.get("global_crops_size", 224))
    first = next((weights[name] for name in FIRST if name in weights), torch.empty(1, 3))
    sizes = {"patch_size": patch_size, "img_size": image_size, "channels": first.shape[1]}
    backbone = build(arch, registers=registers_of(weights), **sizes)
    if PERIODS in (own := backbone.state_dict()):
        weights.setdefault(PERIODS, own[PERIODS])  # only DINOv3's own files have them
    name = arch if arch in RESNETS else f"{arch}/{patch_size}"
    logger.info("%s: %s, a %s", path, f"{found} ({left})" if left else found, name)
    fit(backbone, weights, allow_partial=allow_partial)
    data = Path(args["data"]) if "data" in args else None
    scale = scale_of(args, backbone.channels)
    return Trained(backbone.eval().to(device), found, arch, patch_size, image_size, data, scale)


def build(arch: str, *, registers: int = 0, **options: Any) -> Backbone:
    """A backbone of a name in ALL_ARCHS with random weights; options and errors as in `build_backbone`."""
    if arch in PLAIN_SIZES:
        return PlainViT(PLAIN_SIZES[arch], registers=registers, **options)
    return build_backbone(arch, registers=registers, **options)


def load_linear(path: Path) -> nn.Linear:
    """A linear classifier on frozen features, from a file of the reference (`eval_linear.py:179`, `utils.py:118`).

    Returns:
        Linear layer [classes, features]; the file has it as "module.linear.weight" and "module.linear.bias" under
        "state_dict".

    Raises:
        CheckpointError: unreadable; ValueError: no linear classifier in it.
    """
    state, _ = read(path)
    state = state.get("state_dict", state)
    weights = {key.removeprefix("module.").removeprefix("linear."): value for key, value in state.items()}
    shapes = {key: list(value.shape) if isinstance(value, Tensor) else value for key, value in weights.items()}
    if set(shapes) != {"weight", "bias"} or len(shapes["weight"]) != 2 or shapes["bias"] != shapes["weight"][:1]:
        raise ValueError(
            f"{path} has no linear classifier: expected linear.weight [classes, features] and linear.bias [classes], "
            f"got {_listed(list(state))}"
        )
    classes, features = shapes["weight"]
    linear = nn.Linear(features, classes)
    linear.load_state_dict(weights)
    logger.info("%s: linear classifier, %d classes of %d features", path, classes, features)
    return linear


def backbone_weights(state: Mapping[str, Any], *, net: Choice = "auto") -> tuple[dict[str, Any], str, str]:
    """A backbone's weights under their bare names, from our files and from the formats that others publish.

    Args:
        state: a state dict of the backbone or of a whole net, a checkpoint with such dicts under "teacher" and
            "student" (DINO, `utils.py:72`), or one with both networks under "state_dict" or "model", told apart by
            prefixes (MoCo, MoCo v3, solo-learn, lightly). Prefixes, also of torch.compile and Lightning, are removed,
            heads and classifiers are left, and names of Hugging Face, timm and DINOv3 are replaced. A ViT's layer scale
            and mask token stay.
        net: which network. "auto": the one that the file's method evaluates, the teacher of DINO, else the student.

    Returns:
        The weights; "teacher", "student" or, where the file has one network, "weights"; in words what was left.

    Raises:
        ValueError: the file lacks `net`, or there are no weights.
    """
    chosen = "weights" if net == "auto" else net
    if "teacher" in state or "student" in state:
        chosen = state.get("evaluate", "teacher") if net == "auto" else net
        if chosen not in state:
            raise ValueError(f"the checkpoint has no {chosen!r}, only {', '.join(state)}")
        state = state[chosen]
        net = "auto"  # what is left is one network
    for name in _WRAPPERS:
        state = state[name] if isinstance(state.get(name), Mapping) else state
    if not isinstance(state, Mapping) or not any(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"expected a backbone's weights, or a teacher and a student, got {_listed(list(state))}")
    names = {_bare(key): key for key in state}  # bare: in the file
    while prefix := _prefix(names, net):
        names = {_bare(key.removeprefix(prefix)): name for key, name in names.items() if key.startswith(prefix)}
        net = "auto"
    weights = {key: state[name] for key, name in names.items() if not key.startswith(_HEADS)}
    if not weights:
        raise ValueError(f"expected a backbone's weights, got {_listed(list(state))}")
    if "4.0.conv1.weight" in weights:  # lightly numbers the parts of torchvision's ResNet
        parts = {key: key.partition(".") for key in weights}
        weights = {f"{_RESNET_PARTS[parts[key][0]]}.{parts[key][2]}": value for key, value in weights.items()}
    count = len(weights)
    weights = from_others(weights)
    bare, name = next(iter(names.items()))
    left = [f"prefix {name.removesuffix(bare)!r}"] if name != bare else []
    if count < len(state):
        left.append(f"{len(state) - count} tensors of a head")
    return weights, chosen, f"without {' and '.join(left)}" if left else ""


def _bare(key: str) -> str:
    """Without what DistributedDataParallel and torch.compile put in front."""
    key = key.replace("_orig_mod.", "")
    while key.startswith("module."):
        key = key.removeprefix("module.")
    return key


def _prefix(keys: Mapping[str, str], net: Choice) -> str:
    """What the names of a network's backbone begin with; nothing where they are bare."""
    if any(key in keys for key in _BARE_NAMES):
        return ""
    for prefix in _PREFIXES[net]:
        if any(key.startswith(prefix) for key in keys):
            return prefix
    if net != "auto" and any(key.startswith((*_STUDENT, *_TEACHER)) for key in keys):
        raise ValueError(f"the file has no {net}, only {_listed(sorted({key.partition('.')[0] for key in keys}))}")
    return ""


def fit(backbone: nn.Module, weights: Mapping[str, Any], *, allow_partial: bool = False) -> None:
    """Load weights under bare names into `backbone`, all of them or (`allow_partial`) those that match, with a warning.

    Raises:
        ValueError: weights are missing, unexpected or of another shape (a pos_embed of another grid too), or none
            match; then nothing has changed.
    """
    wanted = backbone.state_dict()
    shapes = {key: list(value.shape) if isinstance(value, Tensor) else None for key, value in weights.items()}
    matching = {key: weights[key] for key in wanted if shapes.get(key) == list(wanted[key].shape)}
    problems = [f"missing {key}" for key in wanted if key not in weights]
    problems += [f"unexpected {key}" for key in weights if key not in wanted]
    problems += [
        f"{key} has shape {shapes[key]}, expected {list(wanted[key].shape)}"
        for key in weights
        if key in wanted and key not in matching
    ]
    if problems and not (allow_partial and matching):
        raise ValueError(
            "the weights do not fit this backbone, whose arch and patch size must be those they were trained with: "
            f"{_listed(problems, '; ')}"
        )
    if problems:
        logger.warning("%d of %d weights loaded; %s", len(matching), len(wanted), "; ".join(problems))
    backbone.load_state_dict(matching, strict=not problems)


def read(path: Path) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """What a file or folder holds, and the settings it was trained with as far as it tells."""
    if (path / "model.safetensors").exists():  # a folder of timm or Hugging Face
        path = path / "model.safetensors"
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    state = checkpoint.load_newest(path)[0] if path.is_dir() else checkpoint.load(path)
    args = state.get("args", {})
    return state, args if isinstance(args, dict) else vars(args)


def _read_safetensors(path: Path) -> tuple[Mapping[str, Any], dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except FileNotFoundError:
        raise CheckpointError(f"no weights at {path}") from None
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged or not a safetensors file ({error})") from error
    settings = {"arch": metadata.get("arch"), "global_crops_size": int(metadata.get("image_size", 224))}
    settings |= {name: json.loads(metadata[name]) for name in ("value_range", "mean", "std") if name in metadata}
    return state, settings


def arch_of(weights: Mapping[str, Any], left: str, said: str | None) -> str:
    """The architecture of weights that `backbone_weights` returned with `left`. `said` decides between those of the
    same shapes, unless prefixes tell that they are MoCo v3's.

    Raises:
        ValueError: it is not known.
    """
    if any(prefix in left for prefix in ("base_encoder.", "momentum_encoder.")):
        said = "vit_small_12heads"
    blocks = {key.split(".")[1] for key in weights if key.startswith("blocks.")}
    for arch, last in (("resnet50", "layer4.2.conv3.weight"), ("resnet_nano", "layer4.0.conv3.weight")):
        if last in weights:
            return arch
    width = getattr(weights.get("cls_token"), "shape", (0,))[-1]
    kind = is_rotary(weights), "blocks.0.mlp.w12.weight" in weights
    for arch, plain in PLAIN_SIZES.items():
        if any(kind) and (plain.rope, plain.swiglu, plain.depth, plain.embed_dim) == (*kind, len(blocks), width):
            return arch
    for arch, size in sorted(VIT_SIZES.items(), key=lambda item: item[0] != said):
        if not any(kind) and (size.depth, size.embed_dim) == (len(blocks), width):
            return arch
    raise ValueError(
        f"the weights are of no known architecture ({', '.join(ALL_ARCHS)}): {_listed(list(weights))}; "
        "--arch says what to take them for"
    )


def _sizes(weights: Mapping[str, Any], patch_size: int | None, image_size: int) -> tuple[int, int]:
    """Patch and image size in pixels; what is given holds where the weights do not tell."""
    projection, positions = (weights.get(key) for key in ("patch_embed.proj.weight", "pos_embed"))
    patch = projection.shape[-1] if isinstance(projection, Tensor) and projection.dim() == 4 else 16
    if isinstance(positions, Tensor) and positions.dim() == 3:
        image_size = patch * math.isqrt(positions.shape[1] - 1)
    return patch_size or patch, image_size


def _listed(words: list[Any], separator: str = ", ") -> str:
    more = f"{separator}and {len(words) - 5} more" if len(words) > 5 else ""
    return (separator.join(map(str, words[:5])) or "nothing") + more
