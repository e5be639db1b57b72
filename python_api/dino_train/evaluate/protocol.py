"""What the commands of all protocols share: their options, and how they report."""

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor

from dino_train.config import EMBEDDED_DATA, default_workers
from dino_train.data import ImageFolder, split
from dino_train.evaluate.features import Cache, Features
from dino_train.layers import hold_copies
from dino_train.loader import BadImages, eval_loader
from dino_train.model import VisionTransformer
from dino_train.options import WeightsOptions
from dino_train.weights import Trained


@dataclass(kw_only=True)
class Protocol(WeightsOptions):
    """Options of every protocol. `run` evaluates and calls `report` once."""

    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print the result as one JSON object instead of text."""

    def run(self) -> None:
        raise NotImplementedError

    @property
    def folder(self) -> Path:
        """Where what belongs to the checkpoint is kept: its run's folder."""
        return self.checkpoint if self.checkpoint.is_dir() else self.checkpoint.parent

    def load_vit(self) -> tuple[Trained, VisionTransformer]:
        """As `load`; ValueError where the backbone has no tokens."""
        trained = self.load()
        if not isinstance(trained.backbone, VisionTransformer):
            raise ValueError(f"{trained.arch} has no tokens and no self-attention; choose a run of a ViT")
        return trained, trained.backbone

    def report(self, values: Mapping[str, Any], text: str) -> None:
        """Print the result: `values` as JSON where that was asked for, else `text`."""
        print(json.dumps(values) if self.json else text)


@dataclass(kw_only=True)
class Extraction(Protocol):
    """Options of the protocols that read images by workers."""

    num_workers: int = field(default_factory=default_workers)
    """Threads that read images."""

    def check(self) -> None:
        """Raises ValueError for options that make no sense; not in __post_init__, whose errors tyro garbles."""
        if self.num_workers < 1:
            raise ValueError(f"num_workers must be at least 1, got {self.num_workers}")


@dataclass(kw_only=True)
class Classification(Extraction):
    """Options of the protocols that classify images."""

    data: Annotated[Path, tyro.conf.arg(aliases=["--data-path"])] = EMBEDDED_DATA
    """Folder, .zip or .tar with train/<class>/ and val/<class>/, or <class>/ (then a few images are held out).
    Default: the embedded CIFAR-10 images."""
    image_size: int | None = None
    """Side of the network's input in pixels. Default: the training size."""
    batch_size: int = 128
    """Images that go through the network at once, and in an update where something is trained."""

    def check(self) -> None:
        super().check()
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")

    def split(self) -> tuple[ImageFolder, ImageFolder]:
        """Training and held-out images, as `data.split`; ValueError where a folder has one of train/ and val/ only."""
        found = [part for part in ("train", "val") if (self.data / part).is_dir()]
        if len(found) == 1:
            other = "val" if found == ["train"] else "train"
            raise ValueError(f"{self.data} has {found[0]}/ but no {other}/: expected both, or class folders alone")
        return split(self.data)

    def extract(
        self, cache: Cache, images: ImageFolder, forward: Callable[[Tensor], Tensor], kind: str, size: int, what: str
    ) -> Features:
        """Features of the central crops of labelled images, from the cache where they are; `kind` names `forward`.

        Raises:
            ValueError: there are no images, no labels, or none can be read.
        """
        bad = labelled(images, what)
        loader = eval_loader(images, size, self.batch_size, self.num_workers)
        features = cache.features(images, loader, forward, bad, kind=f"{kind}, center {size}", title=what)
        log_skipped(bad, what)
        return features


@dataclass(kw_only=True)
class Frozen(Classification):
    """Options of the protocols that classify by features of a frozen backbone."""

    precision: Literal["float32", "bfloat16"] = "float32"
    """Of a ViT's matrix products in the extraction: bfloat16 is two to four times faster where the processor or GPU
    multiplies it."""

    def load(self) -> Trained:
        trained = super().load()
        if self.precision == "bfloat16":
            if not isinstance(trained.backbone, VisionTransformer):
                raise ValueError(f"precision bfloat16 is for ViTs, {trained.arch} takes float32 only")
            hold_copies(trained.backbone, torch.bfloat16)
        return trained

    def extract(
        self, cache: Cache, images: ImageFolder, forward: Callable[[Tensor], Tensor], kind: str, size: int, what: str
    ) -> Features:
        if self.precision == "bfloat16":
            kind = f"{kind}, bfloat16"
        return super().extract(cache, images, forward, kind, size, what)


def labelled(images: ImageFolder, what: str) -> BadImages:
    """Check that images can be classified; returns where to count the unreadable ones.

    Raises:
        ValueError: there are none, or they lie in no class folders; `what` names them in it.
    """
    if not len(images):
        raise ValueError(f"there is no {what} image in {images.path}: expected train/<class>/ and val/<class>/ in it")
    if images.labels is None:
        raise ValueError(
            f"{images.path} has no class folders and this needs labels: put each class's images in a folder of its "
            "own, train/<class>/ and val/<class>/"
        )
    return BadImages(len(images), 0)


def log_skipped(bad: BadImages, what: str) -> None:
    """Say how many images a result is without."""
    if bad.count:
        logging.warning(
            "%d of %d %s images could not be read; the result is without them", bad.count, bad.n_images, what
        )
