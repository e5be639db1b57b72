"""A small pretraining run for the tests of what uses one."""

from dino_train.cli import main
from test_train import make_images

TINY = [
    *("--arch", "vit_nano", "--patch-size", "8", "--out-dim", "64", "--head-hidden-dim", "16", "--epochs", "1"),
    *("--global-crops-size", "16", "--local-crops-size", "8", "--local-crops-number", "1"),
    *("--batch-size-per-gpu", "4", "--num-workers", "0", "--device", "cpu", "--log-interval", "2"),
]


def tiny_run(folder):
    """Pretrains on folder/images, 40 pictures in class folders, into folder/run; returns folder."""
    data = make_images(folder / "images", n=40)
    assert main(["pretrain", "--data", str(data), "--output-dir", str(folder / "run"), *TINY]) == 0
    return folder
