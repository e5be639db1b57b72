"""Every setting of pretraining, typed, documented and checked; and the recipes."""

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from dino_kernels import CropKind
from dino_train.common.device import gpu_of
from dino_train.models.vit import ARCHS

_BLUR = {"dino": (1.0, 0.1, 0.5), "dinov2": (0.0, 0.9, 0.5), "small": (0.0, 0.0, 0.0)}
EMBEDDED_DATA = Path(__file__).parents[1] / "data/cifar10-5k.zip"


def default_workers() -> int:
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


@dataclass(frozen=True)
class PretrainConfig:
    """Complete DINO pretraining. Defaults are the reference's (main_dino.py:42-129)."""

    preset: Literal["none", "vits16-vanilla", "vits16-boosted", "vitb16", "resnet50", "demo"] = "none"
    """Published recipe whose values become the defaults; flags given beside it win."""
    data: str = str(EMBEDDED_DATA)
    """Folder of images (any nesting; JPEG, PNG, WebP, BMP, TIFF), or a .zip or .tar of one (see dino-train pack). With
    folders train/ and val/ these are used; else a few images are held out. Or WebDataset shards to stream, of which
    none is held out: 'train-{000000..000146}.tar', 'pipe:aws s3 cp s3://bucket/{000..146}.tar -'. Default: 5,000
    embedded CIFAR-10 images."""
    output_dir: Path = Path("runs/dino")
    """Folder for checkpoints, metrics and plots."""
    resume: bool = False
    """Continue from last.pt in output_dir, in the middle of an epoch if that is where it stopped."""

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
    """Width of the projection head."""
    drop_path_rate: float = 0.1
    """Stochastic depth of the student, probability at the last block."""

    momentum_teacher: float = 0.996
    """EMA momentum of the teacher at the start; it rises to 1 along a cosine. Higher for small batches."""
    warmup_teacher_temp: float = 0.04
    """Teacher temperature at the start."""
    teacher_temp: float = 0.04
    """Teacher temperature after its warm-up. Above 0.07 training becomes unstable."""
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
    center are updated once. The crops of all micro-batches are held; batch norm sees one micro-batch at a time."""
    checkpoint_activations: bool = False
    """Keep only each block's input for the backward pass and recompute the rest: less memory, a third slower."""
    epochs: int = 100
    """Passes over the data."""
    lr: float = 0.0005
    """Peak learning rate for a batch of 256; scaled by batch / 256."""
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
    freeze_last_layer: int = 1
    """Epochs during which the last layer is not trained."""

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

    augmentation: Literal["dino", "dinov2", "small"] = "dino"
    """dino: blur as in the paper, with probability 1, 0.1 and 0.5 for the first global, the second and a local crop.
    dinov2: as DINOv2 and DINOv3 were released, which take 1 - p for it: 0, 0.9 and 0.5. small: no blur, which leaves
    little of images of few pixels."""

    saveckp_freq: int = 20
    """Keep a numbered checkpoint every so many epochs; last.pt is written after each. 0: last.pt only."""
    save_minutes: float = 15.0
    """Write last.pt at least this often within an epoch, in minutes."""
    log_interval: int = 10
    """Steps between two lines of metrics.jsonl."""
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
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU if there is one."""

    def __post_init__(self) -> None:
        least = {"patch_size": 1, "out_dim": 2, "head_hidden_dim": 1, "batch_size_per_gpu": 1, "epochs": 1}
        least |= {"accumulate": 1, "log_interval": 1, "num_workers": 1, "global_crops_size": 1, "local_crops_size": 1}
        for name in ("warmup_epochs", "warmup_teacher_temp_epochs", "freeze_last_layer", "local_crops_number"):
            least[name] = 0
        for name in ("saveckp_freq", "save_minutes", "knn_freq", "seed", "lr", "clip_grad"):
            least[name] = 0
        for name, bound in least.items():
            _require(getattr(self, name) >= bound, name, getattr(self, name), f"at least {bound}")
        for name in ("warmup_teacher_temp", "teacher_temp"):
            _require(getattr(self, name) > 0, name, getattr(self, name), "above 0")
        _require(0 <= self.momentum_teacher <= 1, "momentum_teacher", self.momentum_teacher, "from 0 to 1")
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
        if self.arch == "resnet50":
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

    def dtype(self, device: torch.device) -> torch.dtype:
        """What `precision` is on a device."""
        low = gpu_of(device) is not None if self.precision == "auto" else self.precision == "bfloat16"
        return torch.bfloat16 if low else torch.float32

    @property
    def crop_kinds(self) -> tuple[CropKind, ...]:
        """Of the crops of an image, in their order: the two global ones, then the local ones (main_dino.py:419-456)."""
        size, scale = self.global_crops_size, self.global_crops_scale
        first, second, third = _BLUR[self.augmentation]
        local = CropKind(self.local_crops_size, self.local_crops_scale, blur=third, solarize=0.0)
        return (
            CropKind(size, scale, blur=first, solarize=0.0),
            CropKind(size, scale, blur=second, solarize=0.2),
            *[local] * self.local_crops_number,
        )

    def plain(self) -> dict[str, Any]:
        """As plain values, which a checkpoint holds and `torch.load(weights_only=True)` reads."""
        return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self).items()}


def _require(fits: bool, name: str, value: object, wanted: str) -> None:
    if not fits:
        raise ValueError(f"{name} must be {wanted}, got {value}")


_VITS16 = {"arch": "vit_small", "patch_size": 16}

# What --preset sets; flags beside it win.
PRESETS: dict[str, dict[str, Any]] = {
    # README of the reference, "vanilla DINO training": 8 GPUs x 64 images.
    "vits16-vanilla": {**_VITS16, "epochs": 100},
    # Its "boosting DINO performance": 16 GPUs x 64 images.
    "vits16-boosted": {
        **_VITS16,
        "epochs": 300,
        "teacher_temp": 0.07,
        "warmup_teacher_temp_epochs": 30,
        "norm_last_layer": False,
    },
    # Arguments published with the ViT-B/16 weights: 32 GPUs x 32 images.
    "vitb16": {
        "arch": "vit_base",
        "patch_size": 16,
        "epochs": 400,
        "batch_size_per_gpu": 32,
        "lr": 0.00075,
        "min_lr": 2e-6,
        "clip_grad": 0.3,
        "freeze_last_layer": 3,
        "teacher_temp": 0.07,
        "warmup_teacher_temp_epochs": 50,
        "global_crops_scale": (0.25, 1.0),
        "local_crops_scale": (0.05, 0.25),
        "local_crops_number": 10,
    },
    # README of the reference, "ResNet-50 and other convnets trainings": 8 GPUs x 64 images.
    "resnet50": {
        "arch": "resnet50",
        "optimizer": "sgd",
        "lr": 0.03,
        "weight_decay": 1e-4,
        "weight_decay_end": 1e-4,
        "global_crops_scale": (0.14, 1.0),
        "local_crops_scale": (0.05, 0.14),
    },
    # For minutes on a CPU. Measured on the embedded images (float32; one seed, another is worth 2 points), k-NN with
    # k = 10 (23.7 % with random weights) and linear probe (31.3 %): as here 30.7 and 39.8 %, after 14 epochs 30.1 and
    # 40.0 %; with patches of 8 and blur, 18 epochs in half the time, 26.9 and 38.0 %. Measured earlier by k-NN with
    # patches of 8 and blur: K = 512 with twice the rate: 27.7 % after 24 epochs; 128 wide, 2 deep, K = 256: 30.0 %.
    "demo": {
        "arch": "vit_nano",
        "augmentation": "small",
        "patch_size": 4,
        "global_crops_size": 32,
        "global_crops_scale": (0.5, 1.0),
        "local_crops_size": 16,
        "local_crops_scale": (0.2, 0.6),
        "local_crops_number": 4,
        "out_dim": 128,
        "head_hidden_dim": 256,
        "drop_path_rate": 0.0,
        "momentum_teacher": 0.97,
        "lr": 0.004,
        "warmup_epochs": 1,
        "freeze_last_layer": 0,
        "epochs": 12,
        "knn_freq": 4,
        "output_dir": Path("runs/demo"),
    },
}
