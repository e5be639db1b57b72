"""Small runs for the tests of what uses one."""

import json

import numpy as np
import torch
from dino_train.cli import main
from dino_train.common import checkpoint
from dino_train.models.vit import vit
from PIL import Image
from test_train import make_images

TINY = [
    *("--arch", "vit_nano", "--patch-size", "8", "--out-dim", "64", "--head-hidden-dim", "16", "--epochs", "1"),
    *("--global-crops-size", "16", "--local-crops-size", "8", "--local-crops-number", "1"),
    *("--batch-size-per-gpu", "4", "--num-workers", "1", "--device", "cpu", "--log-interval", "2"),
]


def tiny_run(folder):
    """Pretrains on folder/images, 40 pictures in class folders, into folder/run; returns folder."""
    data = make_images(folder / "images", n=40)
    assert main(["pretrain", "--data", str(data), "--output-dir", str(folder / "run"), *TINY]) == 0
    return folder


def tiny_checkpoint(folder, seed=0):
    """A run's folder with random weights of a vit_nano for images of 16 pixels."""
    torch.manual_seed(seed)
    backbone = vit("vit_nano", patch_size=8, img_size=16)
    state = {f"backbone.{name}": tensor for name, tensor in backbone.state_dict().items()}
    args = {"arch": "vit_nano", "patch_size": 8, "global_crops_size": 16}
    checkpoint.save({"teacher": state, "args": args}, folder / checkpoint.LAST)
    return folder


def evaluate(capsys, *words):
    """What `dino-train evaluate WORDS --json` prints."""
    capsys.readouterr()
    code = main(["evaluate", *map(str, words), "--num-workers", "1", "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    return json.loads(out)


def error_of(capsys, *words):
    """The one line with which `dino-train evaluate WORDS` ends."""
    capsys.readouterr()
    code = main(["evaluate", *map(str, words), "--num-workers", "1"])
    err = capsys.readouterr().err
    assert code == 1 and err.count("\n") == 1, err
    return err


def colored_classes(root, train=12, val=5, classes=("red", "green", "blue")):
    """root/train and root/val with a folder a class, whose pictures are noise around one color."""
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
