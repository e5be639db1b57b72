"""Small training runs and data sets for the tests."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from dino_train.cli import main
from dino_train.common import checkpoint
from dino_train.config.pretrain import PretrainConfig
from dino_train.models.vit import vit
from PIL import Image

TINY = [
    *("--arch", "vit_nano", "--patch-size", "8", "--out-dim", "64", "--head-hidden-dim", "16", "--epochs", "1"),
    *("--global-crops-size", "16", "--local-crops-size", "8", "--local-crops-number", "1"),
    *("--batch-size-per-gpu", "4", "--num-workers", "1", "--device", "cpu", "--log-interval", "2"),
]

# Fields of the config of a run of some steps
TINY_FIELDS = {
    "arch": "vit_nano",
    "patch_size": 8,
    "out_dim": 64,
    "head_hidden_dim": 16,
    "global_crops_size": 16,
    "local_crops_size": 8,
    "local_crops_number": 1,
    "batch_size_per_gpu": 4,
    "num_workers": 1,
    "device": "cpu",
}

# Options of a run of two ranks that is killed and resumed; flags and fields of the config
RANKS = {
    "arch": "vit_nano",
    "patch_size": 8,
    "out_dim": 64,
    "head_hidden_dim": 16,
    "drop_path_rate": 0.5,  # each rank draws its own random numbers for it
    "global_crops_size": 16,
    "local_crops_size": 8,
    "local_crops_number": 1,
    "batch_size_per_gpu": 2,
    "epochs": 3,  # of 5 steps
    "warmup_epochs": 1,
    "log_interval": 2,
    "num_workers": 1,
    "device": "cpu",
}


def tiny_run(folder):
    """Pretrain on folder/images, 40 images in class folders, into folder/run; returns folder."""
    data = make_images(folder / "images", n=40)
    assert main(["pretrain", "--data", str(data), "--output-dir", str(folder / "run"), *TINY]) == 0
    return folder


def tiny_checkpoint(folder, seed=0):
    """The folder of a run with random weights of a vit_nano for images of 16 pixels."""
    torch.manual_seed(seed)
    backbone = vit("vit_nano", patch_size=8, img_size=16)
    state = {f"backbone.{name}": tensor for name, tensor in backbone.state_dict().items()}
    args = {"arch": "vit_nano", "patch_size": 8, "global_crops_size": 16}
    checkpoint.save({"teacher": state, "args": args}, folder / checkpoint.LAST)
    return folder


def evaluate(capsys, *words):
    """The parsed output of `dino-train evaluate WORDS --json`."""
    capsys.readouterr()
    code = main(["evaluate", *map(str, words), "--num-workers", "1", "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    return json.loads(out)


def error_of(capsys, *words):
    """The error line of `dino-train evaluate WORDS`."""
    capsys.readouterr()
    code = main(["evaluate", *map(str, words), "--num-workers", "1"])
    err = capsys.readouterr().err
    assert code == 1 and err.count("\n") == 1, err
    return err


def colored_classes(root, train=12, val=5, classes=("red", "green", "blue")):
    """root/train and root/val with one folder per class, whose images are noise around one color."""
    rng = np.random.default_rng(0)
    for part, count in (("train", train), ("val", val)):
        for number, name in enumerate(classes):
            color = [200 if i == number % 3 else 30 + 60 * (number // 3) for i in range(3)]
            for i in range(count):
                pixels = np.clip(rng.normal(color, 20, (40, 50, 3)), 0, 255).astype(np.uint8)
                path = root / part / name / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
    return root


def make_images(folder: Path, n: int = 22, classes: int = 2) -> Path:
    rng = np.random.default_rng(0)
    for i in range(n):
        path = folder / f"class{i % classes}" / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8)).save(path)
    return folder


def final_weights(config: PretrainConfig) -> dict:
    state = checkpoint.load(config.output_dir / "last.pt")
    flat = {f"{net}.{k}": v for net in ("student", "teacher") for k, v in state[net].items()}
    moments = {f"{i}.{k}": v for i, s in state["optimizer"]["state"].items() for k, v in s.items()}
    return flat | moments | {"center": state["dino_loss"]["center"], "step": state["step"]}


def assert_same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(torch.as_tensor(a[name]), torch.as_tensor(b[name])), name


def torchrun(arguments, processes=2, **options):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.Popen([*command, *arguments], env=environment, text=True, **options)
