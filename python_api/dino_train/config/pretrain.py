"""Every setting of pretraining, typed, documented and checked."""

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from dino_kernels import CropKind, PixelScale
from dino_train.common.device import gpu_of
from dino_train.common.masks import MaskKind
from dino_train.common.process import processors
from dino_train.common.scale import pixel_scale
from dino_train.config.presets import METHODS, PRESET_NAMES, READ_BY
from dino_train.models.resnet import RESNETS
from dino_train.models.vit import ARCHS

_JITTER = (0.4, 0.4, 0.2, 0.1)
# Of an augmentation: color jitter, and of the first global, the second and a local crop the probabilities of blur and
# of solarize.
_AUGMENTATIONS = {
    "dino": (_JITTER, (1.0, 0.1, 0.5), (0.0, 0.2, 0.0)),
    "dinov2": (_JITTER, (0.0, 0.9, 0.5), (0.0, 0.2, 0.0)),
    "small": (_JITTER, (0.0, 0.0, 0.0), (0.0, 0.2, 0.0)),
    "mocov2": ((0.4, 0.4, 0.4, 0.1), (0.5, 0.5, 0.5), (0.0, 0.0, 0.0)),
    "swav": ((0.8, 0.8, 0.8, 0.2), (0.5, 0.5, 0.5), (0.0, 0.0, 0.0)),
}


def default_workers() -> int:
    return max(1, processors() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


@dataclass(frozen=True)
class PretrainConfig:
    """Complete pretraining. Defaults are those of DINO's reference (main_dino.py:42-129)."""

    method: Literal[METHODS] = "dino"  # type: ignore[valid-type]
    """Training method, whose own values become the defaults of other settings. moco is version 3 with --predictor true
    --queue-size 0, else version 2."""
    preset: Literal[PRESET_NAMES] = "none"  # type: ignore[valid-type]
    """Published recipe whose values become the defaults; flags given beside it win."""
    data: str = ""
    """Folder of images (any nesting and format that Pillow reads, or .npy or DICOM), or a .zip or .tar of one (see
    dino-train pack). With folders train/ and val/ (or test/; and unlabelled/) these are used; else a few images are
    held out. Or WebDataset shards to stream, of which none is held out: 'train-{000000..000146}.tar',
    'pipe:aws s3 cp s3://bucket/{000..146}.tar -'. --preset demo has 5,000 embedded CIFAR-10 images."""
    output_dir: Path = Path("runs/dino")
    """Folder for checkpoints, metrics and plots."""
    resume: bool = False
    """Continue from last.pt in output_dir, in the middle of an epoch if that is where it stopped. On the command line,
    settings that are not given are those of the run."""
    allow_changes: bool = False
    """Resume with other data, another learning rate or an end that the run has passed, which are refused else."""
    init_from: Path | None = None
    """Start from these weights in place of random ones: a checkpoint, with the heads where they are of the same method
    and shapes, or a backbone (of this package, the reference, timm, Hugging Face, DINOv2; .pth, .safetensors or a
    folder). Positions, patches and channels of other sizes are adapted."""
    freeze_backbone_steps: int = 0
    """Steps at the beginning in which only the heads are trained, for weights without heads."""

    arch: Literal[ARCHS] = "vit_small"  # type: ignore[valid-type]
    """Backbone."""
    patch_size: int = 16
    """Side of a ViT's patch, in pixels."""
    out_dim: int = 65536
    """Number of outputs K of the head. 65536 suits large data sets; small ones train faster with fewer."""
    norm_last_layer: bool = True
    """Keep the rows of the last layer at norm 1. Steadier; without it ViT-S gains a little."""
    use_bn_in_head: bool = False
    """Batch norm in the projection head."""
    head_hidden_dim: int = 2048
    """Width of the hidden layers of projection and prediction heads."""
    head_bottleneck_dim: int = 256
    """Width of the normalized features that the last layer takes."""
    predictor: bool = True
    """A prediction head behind the student's projection."""
    drop_path_rate: float = 0.1
    """Stochastic depth of the student, probability at the last block."""
    drop_path_uniform: bool = False
    """The same probability at all blocks, as DINOv2 has it; else it rises linearly from 0."""
    layer_scale: float = 0.0
    """Start of the trained factors of each channel of a ViT's branches; DINOv2: 1e-5. 0: none."""
    registers: int = 0
    """Learned tokens of a ViT beside class token and patches, which keep its attention maps clean; DINOv2 has 4."""
    patch_head: Literal["shared", "untied", "separate"] = "shared"
    """Head of patches: that of the class token, one with a last layer of its own, or a whole one of its own."""
    patch_out_dim: int = 0
    """Number of outputs of an untied or a separate head of patches; 0: out_dim."""
    mask_probability: float = 0.5
    """Share of the global crops of which patches are hidden from the student."""
    mask_ratio: tuple[float, float] = (0.1, 0.5)
    """Range of the share of patches that are hidden of such a crop."""
    koleo: float = 0.0
    """Weight of the KoLeo loss, which spreads the class tokens of a batch; DINOv2 has 0.1."""

    momentum_teacher: float = 0.996
    """EMA momentum of the teacher at the start. Higher for small batches."""
    momentum_teacher_end: float = 1.0
    """EMA momentum at the end, along a cosine."""
    student_temp: float = 0.1
    """Temperature of the student's output, or of MoCo's products with the keys."""
    centering: Literal["ema", "sinkhorn"] = "ema"
    """What keeps the teacher's outputs balanced: a moving average of its mean output, or Sinkhorn-Knopp iterations over
    the batch, as DINOv2 has it."""
    sinkhorn_iterations: int = 3
    """Sinkhorn-Knopp iterations; 1 is a softmax over the batch."""
    queue_size: int = 0
    """Rows of earlier batches that a step also compares with; 0: none."""
    queue_start_epoch: int = 0
    """Epoch from which the queue is filled; it is used once it is full."""
    warmup_teacher_temp: float = 0.04
    """Teacher temperature at the start."""
    teacher_temp: float = 0.04
    """Teacher temperature after its warm-up, above 0.07 training becomes unstable; of SwAV's assignments."""
    warmup_teacher_temp_epochs: int = 0
    """Epochs of the teacher temperature's warm-up."""

    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the networks; weights, statistics and loss stay float32. auto: bfloat16 on a GPU, where float32 is
    several times slower, float32 on a CPU."""
    cuda_graph: bool = True
    """On a single GPU, run a step as one CUDA graph; false runs it op by op, for debugging."""
    optimizer: Literal["adamw", "sgd", "lars", "larc"] = "adamw"
    """adamw for ViTs; sgd, lars or larc for convnets."""
    batch_size_per_gpu: int = 64
    """Images a step (of each process, where torchrun starts several)."""
    accumulate: int = 1
    """Gradient accumulation micro-batches that a step's images are split into, for less memory: optimizer, teacher and
    center are updated once. The crops of all micro-batches are held; batch norm, the assignments of Sinkhorn-Knopp,
    MoCo version 3's comparison, KoLeo and the sizes of iBOT's masks see one micro-batch at a time."""
    bn_split: int = 0
    """Images that share the statistics of a batch norm, as if each so many were on a GPU of their own; 0: all."""
    checkpoint_activations: bool = False
    """Keep only each block's input for the backward pass and recompute the rest: less memory, a third slower."""
    epochs: int = 100
    """Passes over the data."""
    lr: float = 0.0005
    """Peak learning rate, see lr_rule."""
    lr_rule: Literal["linear", "sqrt"] = "linear"
    """linear: lr is for a batch of 256 and scaled by batch / 256. sqrt: it is for 1024 and scaled by the square root of
    batch / 1024, as DINOv2 has it."""
    min_lr: float = 1e-6
    """Learning rate at the end."""
    warmup_epochs: int = 10
    """Epochs of linear learning-rate warm-up (cut off where the run is shorter)."""
    weight_decay: float = 0.04
    """Weight decay at the start."""
    weight_decay_end: float = 0.4
    """Weight decay at the end, along a cosine."""
    decay_all: bool = False
    """Weight decay of biases and norms too, as SwAV and MoCo train."""
    clip_grad: float = 3.0
    """Largest L2 norm of each tensor's gradient; 0 turns it off."""
    clip_per_module: bool = False
    """Clip the norm of the backbone's whole gradient and of each head's, as DINOv2 does, in place of each tensor's."""
    layer_decay: float = 1.0
    """Factor by which the learning rate falls from each layer of a ViT to the one below, from the last norm (and the
    heads) on; DINOv2: 0.9."""
    patch_embed_lr: float = 1.0
    """Factor of the learning rate of a ViT's patch embedding, beside layer_decay; DINOv2: 0.2."""
    freeze_last_layer: int = 1
    """Epochs during which the last layer is not trained."""
    freeze_patch_embed: bool = False
    """Do not train a ViT's patch embedding: steadier for contrastive methods (MoCo v3, arXiv 2104.02057, section 4)."""

    channels: int = 3
    """Channels of an image, 1 to 16. 3: RGB, to which gray is repeated."""
    value_range: tuple[float, ...] = ()
    """Values of a pixel that are black and white: two numbers, or two for each channel. Default: 0 and 255; of images
    of more bits, their own range, which is measured before the first step."""
    mean: tuple[float, ...] = ()
    """Mean of a pixel as a fraction of value_range, of all channels or of each. Default: ImageNet's for 8-bit RGB, else
    as measured."""
    std: tuple[float, ...] = ()
    """Its standard deviation, likewise."""

    global_crops_scale: tuple[float, float] = (0.4, 1.0)
    """Range of a global crop's area, as a fraction of the image."""
    global_crops_size: int = 224
    """Side of a global crop, in pixels."""
    local_crops_number: int = 8
    """Local crops an image."""
    local_crops_scale: tuple[float, float] = (0.05, 0.4)
    """Range of a local crop's area, as a fraction of the image."""
    local_crops_size: int = 96
    """Side of a local crop, in pixels."""

    augmentation: Literal["dino", "dinov2", "small", "mocov2", "swav"] = "dino"
    """dino: blur as in the paper, with probability 1, 0.1 and 0.5 for the first global, the second and a local crop.
    dinov2: as DINOv2 and DINOv3 were released, which take 1 - p for it: 0, 0.9 and 0.5. small: no blur, which leaves
    little of images of few pixels. mocov2, swav: blur with probability 0.5 in all crops, no solarize, stronger jitter
    of saturation (mocov2) or of all colors (swav). What follows changes it."""
    jitter: tuple[float, ...] = ()
    """By how much brightness, contrast, saturation and hue vary; 0 0 0 0 turns it off. Images of other channels than
    RGB vary in the first two."""
    jitter_probability: float = 0.8
    """Probability of jitter."""
    grayscale: float | None = None
    """Probability of grayscale. Default: 0.2 of RGB."""
    blur: tuple[float, ...] = ()
    """Probabilities of blur of the first global crop, the second and a local one."""
    solarize: tuple[float, ...] = ()
    """Probabilities of solarize, likewise; of RGB."""
    flip: float = 0.5
    """Probability that left and right change places."""
    vertical_flip: float = 0.0
    """Probability that top and bottom change places, for images without an up."""
    turn: bool = False
    """Turn crops by 0, 90, 180 or 270 degrees, each as often."""

    saveckp_freq: int = 20
    """Keep a numbered checkpoint every so many epochs; last.pt is written after each. 0: last.pt only."""
    keep_last: int = 0
    """Keep only so many numbered checkpoints, the newest; 0 keeps all."""
    save_minutes: float = 15.0
    """Write last.pt at least this often within an epoch, in minutes."""
    log_interval: int = 10
    """Steps between two lines of metrics.jsonl."""
    tracker: Literal["none", "wandb", "mlflow"] = "none"
    """Send metrics and settings to Weights & Biases or MLflow too, which must be installed."""
    knn_freq: int = 10
    """Epochs between two k-NN evaluations (and one before and one after training), where the data has class
    folders; 0 turns it off."""
    seed: int = 0
    """Seed of weights, shuffling and crops."""
    num_workers: int = field(default_factory=default_workers)
    """Threads that read and crop images (of each process). Results do not depend on it."""
    scaled_decode: bool = False
    """Let the JPEG decoder shrink images whose crops are all made smaller anyway: much faster for photos of many
    megapixels, and a little different from the pixels of a full decode."""
    max_unreadable: float = 0.05
    """Share of the training images, from 0 to 1, that may be unreadable (ten may be in any case, unless it is 0): a run
    that finds more of them stops. Until then others take their places."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU if there is one."""

    def __post_init__(self) -> None:
        for setting in fields(self):
            methods = READ_BY.get(setting.name, METHODS)
            value = getattr(self, setting.name)
            value = tuple(value) if isinstance(value, list) else value  # as JSON has it
            if self.method not in methods and value != setting.default:
                raise ValueError(f"{setting.name} is for {' and '.join(methods)}, not for {self.method}")
        least = {"patch_size": 1, "out_dim": 2, "head_hidden_dim": 1, "batch_size_per_gpu": 1, "epochs": 1}
        least |= {"accumulate": 1, "log_interval": 1, "num_workers": 1, "global_crops_size": 1, "local_crops_size": 1}
        for name in ("warmup_epochs", "warmup_teacher_temp_epochs", "freeze_last_layer", "freeze_backbone_steps"):
            least[name] = 0
        least |= {"head_bottleneck_dim": 1, "sinkhorn_iterations": 1, "koleo": 0}
        for name in ("queue_size", "queue_start_epoch", "bn_split", "local_crops_number", "registers", "patch_out_dim"):
            least[name] = 0
        for name in ("saveckp_freq", "keep_last", "save_minutes", "knn_freq", "seed", "lr", "clip_grad", "layer_scale"):
            least[name] = 0
        for name, bound in least.items():
            _require(getattr(self, name) >= bound, name, getattr(self, name), f"at least {bound}")
        for name in ("warmup_teacher_temp", "teacher_temp", "student_temp"):
            _require(getattr(self, name) > 0, name, getattr(self, name), "above 0")
        for name in ("momentum_teacher", "momentum_teacher_end", "max_unreadable"):
            _require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "from 0 to 1")
        _require(0 <= self.drop_path_rate < 1, "drop_path_rate", self.drop_path_rate, "from 0 to below 1")
        for name in ("global_crops_scale", "local_crops_scale"):
            low, high = getattr(self, name)
            _require(0 < low <= high <= 1, name, (low, high), "two increasing fractions in (0, 1]")
        _require(
            self.batch_size_per_gpu % self.accumulate == 0,
            "accumulate",
            self.accumulate,
            f"a divisor of batch_size_per_gpu {self.batch_size_per_gpu}",
        )
        self._check_method()
        self._check_rates()
        self._check_pixels()
        if self.arch in RESNETS:
            _require(not self.checkpoint_activations, "checkpoint_activations", True, "false: it is for ViTs")
        else:
            _require(
                self.global_crops_size % self.patch_size == 0,
                "global_crops_size",
                self.global_crops_size,
                f"a multiple of patch_size {self.patch_size}",
            )
            if self.local_crops_number:
                _require(
                    self.local_crops_size >= self.patch_size,
                    "local_crops_size",
                    self.local_crops_size,
                    f"at least patch_size {self.patch_size}",
                )

    def _check_method(self) -> None:
        if self.method == "moco":
            _require(not self.local_crops_number, "local_crops_number", self.local_crops_number, "0 for moco")
            _require(self.out_dim <= 256, "out_dim", self.out_dim, "at most 256 for moco")
            _require(
                self.predictor == (not self.queue_size),
                "queue_size",
                self.queue_size,
                "0 with a predictor (MoCo v3), at least 1 without one (v2)",
            )
            _require(not (self.predictor and self.bn_split), "bn_split", self.bn_split, "0 with a predictor (MoCo v3)")
        images = self.micro_batch
        if self.method in ("byol", "moco"):
            _require(images > 1, "batch_size_per_gpu / accumulate", images, f"at least 2 for {self.method}")
        if self.bn_split:
            _require(
                images % self.bn_split == 0 and images > self.bn_split > 1,
                "bn_split",
                self.bn_split,
                f"a divisor of the {images} images of a micro-batch, at least 2, with at least 2 parts",
            )
        if self.arch in RESNETS:
            _require(not self.freeze_patch_embed, "freeze_patch_embed", True, "false for a convnet")
            _require(not self.registers, "registers", self.registers, "0 for a convnet")
            _require(not self.layer_scale, "layer_scale", self.layer_scale, "0 for a convnet")
            _require(
                self.norm_last_layer or self.method != "swav", "norm_last_layer", False, "true for swav with a convnet"
            )
            _require(self.method != "ibot", "arch", self.arch, "a ViT for ibot, which hides patches")
        if self.method == "ibot":
            low, high = self.mask_ratio
            _require(0 < self.mask_probability <= 1, "mask_probability", self.mask_probability, "in (0, 1]")
            _require(0 < low <= high < 1, "mask_ratio", (low, high), "two increasing fractions in (0, 1)")
            kind = self.mask_kind
            assert kind is not None
            _require(
                kind.masks > 0, "mask_probability", self.mask_probability, "larger: no view of a micro-batch has a mask"
            )
            _require(low * kind.side**2 >= 1, "mask_ratio", (low, high), f"of at least one of {kind.side**2} patches")
            own = self.patch_head != "shared"
            _require(own or not self.patch_out_dim, "patch_out_dim", self.patch_out_dim, "0 with a shared head")

    def _check_rates(self) -> None:
        for name, default in (("layer_decay", 1), ("patch_embed_lr", 1), ("clip_per_module", False)):
            if getattr(self, name) != default and self.optimizer != "adamw":
                raise ValueError(f"{name} is for adamw, not for {self.optimizer}")
        for name in ("layer_decay", "patch_embed_lr"):
            value = getattr(self, name)
            _require(0 < value <= 1, name, value, "above 0 and at most 1")
            _require(value == 1 or self.arch not in RESNETS, name, value, "1 for a convnet")
        fits = self.clip_grad > 0 or not self.clip_per_module
        _require(fits, "clip_grad", self.clip_grad, "above 0 with clip_per_module")

    def _check_pixels(self) -> None:
        _ = self.scale  # raises
        for name, count in (("jitter", 4), ("blur", 3), ("solarize", 3)):
            values = getattr(self, name)
            _require(len(values) in (0, count) and all(0 <= x <= 1 for x in values), name, values, f"{count} in [0, 1]")
        _require(len(self.jitter) < 4 or self.jitter[3] <= 0.5, "jitter", self.jitter, "of a hue of at most 0.5")
        for name in ("jitter_probability", "grayscale", "flip", "vertical_flip"):
            value = getattr(self, name)
            _require(value is None or 0 <= value <= 1, name, value, "from 0 to 1")
        if self.channels != 3:
            of_rgb = {"jitter of saturation and hue": self.jitter[2:], "grayscale": self.grayscale or ()}
            for name, values in {**of_rgb, "solarize": self.solarize}.items():
                _require(not np.any(values), name, values, f"0: it is for RGB, and channels is {self.channels}")

    def dtype(self, device: torch.device) -> torch.dtype:
        """What `precision` is on a device."""
        low = gpu_of(device) is not None if self.precision == "auto" else self.precision == "bfloat16"
        return torch.bfloat16 if low else torch.float32

    @property
    def crop_kinds(self) -> tuple[CropKind, ...]:
        """Of the crops of an image, in their order: the two global ones, then the local ones (main_dino.py:419-456)."""
        jitter: tuple[float, ...]
        jitter, blurs, solarizes = _AUGMENTATIONS[self.augmentation]
        jitter, grayscale = tuple(self.jitter or jitter), 0.2 if self.grayscale is None else self.grayscale
        if self.channels != 3:
            jitter, grayscale, solarizes = (*jitter[:2], 0.0, 0.0), 0.0, (0.0,) * 3
        same: dict[str, Any] = {
            "jitter": jitter,
            "jitter_probability": self.jitter_probability,
            "grayscale": grayscale,
            "flip": self.flip,
            "vertical_flip": self.vertical_flip,
            "turn": self.turn,
        }
        kinds: Iterator[dict[str, Any]] = (
            {"blur": blur, "solarize": solarize, **same}
            for blur, solarize in zip(self.blur or blurs, self.solarize or solarizes, strict=True)
        )
        first, second, local = kinds
        both = self.global_crops_size, self.global_crops_scale
        small = CropKind(self.local_crops_size, self.local_crops_scale, **local)
        return (CropKind(*both, **first), CropKind(*both, **second), *[small] * self.local_crops_number)

    @property
    def micro_batch(self) -> int:
        """Images of a process that are computed at once."""
        return self.batch_size_per_gpu // self.accumulate

    @property
    def mask_kind(self) -> MaskKind | None:
        """Masks of the global crops; None for methods without."""
        if self.method != "ibot":
            return None
        side = self.global_crops_size // self.patch_size
        return MaskKind(side, self.mask_probability, self.mask_ratio, self.micro_batch)

    @property
    def scale(self) -> PixelScale:
        """What the values of the images mean, and how they are normalized."""
        return pixel_scale(self.channels, self.value_range, self.mean, self.std)

    def plain(self) -> dict[str, Any]:
        """As plain values, which a checkpoint holds and `torch.load(weights_only=True)` reads; paths are absolute."""
        values = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self).items()}
        return values | {name: absolute(values[name]) for name in ("data", "init_from") if values[name]}


def absolute(path: str) -> str:
    """Unless it is a URL, a pipe or a list of shards."""
    return path if ":" in path else os.path.abspath(path)


def _require(fits: bool, name: str, value: object, wanted: str) -> None:
    if not fits:
        raise ValueError(f"{name} must be {wanted}, got {value}")
