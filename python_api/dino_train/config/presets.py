"""What a method reads, and what a method and a recipe set. Flags beside them win."""

from pathlib import Path
from typing import Any

from dino_train.models.resnet import RESNETS

EMBEDDED_DATA = Path(__file__).parents[1] / "data/cifar10-5k.zip"
METHODS = ("dino", "byol", "moco", "swav", "ibot")
# Settings that not all methods read, and those that do.
READ_BY = {
    "centering": ("dino", "ibot"),
    "warmup_teacher_temp": ("dino", "ibot"),
    "warmup_teacher_temp_epochs": ("dino", "ibot"),
    "norm_last_layer": ("dino", "swav", "ibot"),
    "use_bn_in_head": ("dino", "swav"),
    "head_bottleneck_dim": ("dino", "swav", "ibot"),
    "freeze_last_layer": ("dino", "swav", "ibot"),
    "teacher_temp": ("dino", "swav", "ibot"),
    "sinkhorn_iterations": ("dino", "swav", "ibot"),
    "student_temp": ("dino", "moco", "swav", "ibot"),
    "predictor": ("byol", "moco"),
    "queue_size": ("moco", "swav"),
    "queue_start_epoch": ("swav",),
    "bn_split": ("moco",),
    "patch_head": ("ibot",),
    "patch_out_dim": ("ibot",),
    "mask_probability": ("ibot",),
    "mask_ratio": ("ibot",),
    "koleo": ("ibot",),
}

# Values of a method that are not DINO's; presets are laid over them.
METHOD_DEFAULTS: dict[str, dict[str, Any]] = {
    "dino": {},
    "byol": {
        "local_crops_number": 0,  # more crops make it worse: paper of DINO, appendix E
        "global_crops_scale": (0.08, 1.0),
        "out_dim": 256,
        "head_hidden_dim": 4096,
        "momentum_teacher": 0.99,
        "clip_grad": 0.0,
        "clip_per_module": False,
    },
    "moco": {
        "local_crops_number": 0,
        "global_crops_scale": (0.2, 1.0),
        "augmentation": "mocov2",
        "out_dim": 256,
        "predictor": False,
        "queue_size": 65536,
        "weight_decay": 0.05,
        "weight_decay_end": 0.05,
        "clip_grad": 0.0,
        "clip_per_module": False,
    },
    # The teacher is not used, and so a copy of the student.
    "swav": {"momentum_teacher": 0.0, "momentum_teacher_end": 0.0, "teacher_temp": 0.05},
    "ibot": {"out_dim": 8192, "local_crops_number": 10},
}

# Settings that mean something else in each method.
_OF_METHOD = ("out_dim", "student_temp", "momentum_teacher", "momentum_teacher_end")

# What `--preset demo` changes for a method.
METHOD_DEMO: dict[str, dict[str, Any]] = {
    "dino": {},
    "byol": {"augmentation": "small", "global_crops_scale": (0.3, 1.0), "out_dim": 128, "head_hidden_dim": 512},
    "moco": {"augmentation": "small", "global_crops_scale": (0.3, 1.0), "out_dim": 128, "queue_size": 1024},
    "swav": {},
    "ibot": {"out_dim": 128, "local_crops_number": 4},
}
# What it changes for a ResNet, as the published recipes do; with the rate and the decay of ViTs features become worse
# than random ones.
CONVNET_DEMO: dict[str, Any] = {
    "optimizer": "sgd",
    "lr": 0.12,
    "min_lr": 0.0,
    "weight_decay": 1e-4,
    "weight_decay_end": 1e-4,
}


def recipe(method: str | None, preset: str, arch: str | None = None) -> dict[str, Any]:
    """Settings of a method (None: the preset's own) with a preset ("none": without one), for `PretrainConfig`.

    arch: None is the preset's own.
    """
    values = PRESETS.get(preset, {})
    method = method or values.get("method", "dino")
    read = {name: value for name, value in values.items() if method in READ_BY.get(name, METHODS)}
    own = METHOD_DEFAULTS[method]
    if values.get("method", "dino") == method:
        merged = {**own, **read}
    else:  # a recipe for another method: only what this one leaves open and what means the same
        if "method" in values:
            read = {name: value for name, value in read.items() if name not in _OF_METHOD}
        if values.get("optimizer", "adamw") != "adamw":  # their decay is of other sizes
            own = {name: value for name, value in own.items() if not name.startswith("weight_decay")}
        merged = {**read, **own}
    demo = {**METHOD_DEMO[method], **(CONVNET_DEMO if arch in RESNETS else {})} if preset == "demo" else {}
    return {**merged, **demo, "method": method, "preset": preset}


_VITS16 = {"arch": "vit_small", "patch_size": 16}
_VITB16 = {
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
}
_MOCOV3 = {
    "method": "moco",
    "predictor": True,
    "queue_size": 0,
    "augmentation": "dino",
    "head_hidden_dim": 4096,
    "momentum_teacher": 0.99,
    "min_lr": 0.0,
}
_SWAV = {
    "method": "swav",
    "arch": "resnet50",
    "optimizer": "larc",
    "decay_all": True,
    "use_bn_in_head": True,
    "out_dim": 3000,
    "head_bottleneck_dim": 128,
    "global_crops_scale": (0.14, 1.0),
    "local_crops_scale": (0.05, 0.14),
    "local_crops_number": 6,
    "augmentation": "swav",
    "clip_grad": 0.0,
    "weight_decay": 1e-6,
    "weight_decay_end": 1e-6,
}
# dinov2/configs/ssl_default_config.yaml, with the Sinkhorn-Knopp of its ImageNet-22k recipes and the 4 registers of
# arXiv 2309.16588. Its epochs are of 1250 steps of 2048 images, two passes over ImageNet-1k.
_DINOV2 = {
    "method": "ibot",
    "augmentation": "dinov2",
    "centering": "sinkhorn",
    "koleo": 0.1,
    "registers": 4,
    "layer_scale": 1e-5,
    "out_dim": 65536,
    "local_crops_number": 8,
    "drop_path_rate": 0.3,
    "drop_path_uniform": True,
    "norm_last_layer": False,
    "freeze_last_layer": 2,
    "epochs": 200,
    "warmup_epochs": 20,
    "lr": 0.004,
    "lr_rule": "sqrt",
    "layer_decay": 0.9,
    "patch_embed_lr": 0.2,
    "clip_per_module": True,
    "momentum_teacher": 0.992,
    "teacher_temp": 0.07,
    "warmup_teacher_temp_epochs": 60,
    "global_crops_scale": (0.32, 1.0),
    "local_crops_scale": (0.05, 0.32),
}

# What --preset sets.
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
        **_VITB16,
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
    # Tiles from above: no direction is up, so that flips and turns lose nothing; bands are measurements, whose
    # relations a strong jitter would hide; what is small counts, so that there is less blur.
    "satellite": {
        **_VITS16,
        "vertical_flip": 0.5,
        "turn": True,
        "jitter": (0.2, 0.2, 0.0, 0.0),
        "grayscale": 0.0,
        "solarize": (0.0, 0.0, 0.0),
        "blur": (0.5, 0.1, 0.2),
    },
    # X-rays and the like: left and right are not the same side of a body, and up is up, so that nothing is flipped; a
    # finding may be faint and fine, so that there is little blur; brightness and contrast depend on the machine.
    "medical-gray": {
        **_VITS16,
        "channels": 1,
        "flip": 0.0,
        "jitter": (0.4, 0.4, 0.0, 0.0),
        "blur": (0.3, 0.1, 0.1),
    },
    # For minutes on a CPU. Measured on the embedded images (float32; one seed, another is worth 2 points), k-NN with
    # k = 10 (23.7 % with random weights) and linear probe (31.3 %): as here 30.7 and 39.8 %, after 14 epochs 30.1 and
    # 40.0 %; with patches of 8 and blur, 18 epochs in half the time, 26.9 and 38.0 %. Measured earlier by k-NN with
    # patches of 8 and blur: K = 512 with twice the rate: 27.7 % after 24 epochs; 128 wide, 2 deep, K = 256: 30.0 %.
    "demo": {
        "data": str(EMBEDDED_DATA),
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
    # BYOL: configs/byol.py of deepmind-research at 300 epochs, 4096 images a step. Linear 72.7, k-NN 65.4 (table 13).
    "byol-resnet50": {
        "method": "byol",
        "arch": "resnet50",
        "optimizer": "lars",
        "epochs": 300,
        "lr": 0.3,
        "min_lr": 0.0,
        "weight_decay": 1e-6,
        "weight_decay_end": 1e-6,
    },
    # MoCo v3, arXiv 2104.02057, figure 6 and section 5: 4096 images a step. Linear 71.0.
    "byol-vits16": {
        "method": "byol",
        "arch": "vit_small_12heads",
        "patch_size": 16,
        "epochs": 300,
        "lr": 1e-4,
        "min_lr": 0.0,
        "warmup_epochs": 40,
        "weight_decay": 0.03,
        "weight_decay_end": 0.03,
        "drop_path_rate": 0.0,
        "freeze_patch_embed": True,
    },
    # README of facebookresearch/moco, v2 at 200 epochs: 8 GPUs x 32 images. Linear 67.5.
    "mocov2-resnet50": {
        "method": "moco",
        "arch": "resnet50",
        "optimizer": "sgd",
        "epochs": 200,
        "batch_size_per_gpu": 256,
        "bn_split": 32,
        "decay_all": True,
        "lr": 0.03,
        "min_lr": 0.0,
        "warmup_epochs": 0,
        "weight_decay": 1e-4,
        "weight_decay_end": 1e-4,
        "out_dim": 128,
        "student_temp": 0.2,
        "momentum_teacher": 0.999,
        "momentum_teacher_end": 0.999,
    },
    # Settings that DINO's author gave (facebookresearch/dino issue 34). Linear 71.6, k-NN 62.0 (table 13).
    "mocov2-vits16": {**_VITS16, "method": "moco", "epochs": 300},
    # CONFIG.md of facebookresearch/moco-v3 at 100 epochs: 4096 images a step. Linear 68.9.
    "mocov3-resnet50": {
        **_MOCOV3,
        "arch": "resnet50",
        "optimizer": "lars",
        "epochs": 100,
        "lr": 0.6,
        "weight_decay": 1e-6,
        "weight_decay_end": 1e-6,
        "student_temp": 1.0,
    },
    # The same file: 4096 images a step. Linear 73.2, with fixed sine positions, which here are learned.
    "mocov3-vits16": {
        **_MOCOV3,
        "arch": "vit_small_12heads",
        "patch_size": 16,
        "epochs": 300,
        "lr": 1.5e-4,
        "warmup_epochs": 40,
        "weight_decay": 0.1,
        "weight_decay_end": 0.1,
        "decay_all": True,
        "global_crops_scale": (0.08, 1.0),
        "student_temp": 0.2,
        "drop_path_rate": 0.0,
        "freeze_patch_embed": True,
    },
    # scripts/swav_800ep_pretrain.sh of facebookresearch/swav: 64 GPUs x 64 images. Linear 75.3, k-NN 65.7 (table 2).
    "swav-resnet50": {**_SWAV, "epochs": 800, "lr": 0.3, "min_lr": 0.0048},
    # scripts/swav_200ep_bs256_pretrain.sh: 4 GPUs x 64 images. Linear 72.7.
    "swav-resnet50-bs256": {
        **_SWAV,
        "epochs": 200,
        "lr": 0.6,
        "min_lr": 0.0006,
        "warmup_epochs": 0,
        "queue_size": 3840,
        "queue_start_epoch": 15,
    },
    # Table 15 of DINO, row of Sinkhorn-Knopp without momentum: linear 71.8. Its rate was not published; here DINO's.
    "swav-vits16": {**_VITS16, "method": "swav", "epochs": 300},
    # README of bytedance/ibot: 16 GPUs x 64 images. k-NN 75.2, linear 77.9.
    "ibot-vits16": {
        **_VITS16,
        "method": "ibot",
        "epochs": 800,
        "teacher_temp": 0.07,
        "warmup_teacher_temp_epochs": 30,
        "norm_last_layer": False,
        "global_crops_scale": (0.25, 1.0),
        "local_crops_scale": (0.05, 0.25),
    },
    # Its ViT-B/16 (paper, section 4.1 and appendix B): 32 GPUs x 32 images. k-NN 77.1, linear 79.5.
    "ibot-vitb16": {
        **_VITB16,
        "method": "ibot",
        "global_crops_scale": (0.32, 1.0),
        "local_crops_scale": (0.05, 0.32),
    },
    # Not published at this size: DINOv2's ViT-S and ViT-B were distilled from ViT-g (its issue 108).
    # Linear 82.9, k-NN 81.6 are its ViT-L/16's on ImageNet-1k, with centering and no registers: 32 GPUs x 64 images.
    "dinov2-vits16": {**_DINOV2, "arch": "vit_small", "patch_size": 16},
    # Not published either; crops of 98 pixels, since patches of 14 do not divide 96.
    "dinov2-vitb14": {**_DINOV2, "arch": "vit_base", "patch_size": 14, "local_crops_size": 98},
}

PRESET_NAMES = ("none", *PRESETS)
