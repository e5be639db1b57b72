"""Common options of the commands of all protocols, and the report of results."""

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dino_kernels.nn import hold_copies
from dino_train.config.options import WeightsOptions, require_least
from dino_train.config.presets import EMBEDDED_DATA
from dino_train.config.pretrain import default_workers
from dino_train.data.folder import ImageFolder, part_of, split
from dino_train.data.loader import BadImages, eval_loader
from dino_train.data.stats import suited
from dino_train.evaluate.features import Cache, Features
from dino_train.models.plain_vit import ViT
from dino_train.models.vit import VisionTransformer
from dino_train.models.weights import Trained


@dataclass(kw_only=True)
class Protocol(WeightsOptions):
    """Options of every protocol. `run` evaluates and calls `report` once."""

    json: bool = False
    """Print the result as one JSON object instead of text."""

    def run(self) -> None:
        raise NotImplementedError

    @property
    def folder(self) -> Path:
        """Folder for results of the checkpoint: the folder of its run."""
        return self.checkpoint if self.checkpoint.is_dir() else self.checkpoint.parent

    def load_vit(self) -> tuple[Trained, ViT]:
        """Like `load`; ValueError if the backbone has no tokens."""
        trained = self.load()
        if not isinstance(trained.backbone, ViT):
            raise ValueError(f"{trained.arch} has no tokens and no self-attention; choose a run of a ViT")
        return trained, trained.backbone

    def require_rgb(self, trained: Trained) -> None:
        """ValueError if the backbone takes other images than 8-bit RGB, which the protocol has none of."""
        if not trained.scale.is_8_bit_rgb:
            raise ValueError(f"this protocol is of 8-bit RGB images, and {self.checkpoint} was trained on others")

    def report(self, values: Mapping[str, Any], text: str) -> None:
        """Print the result: `values` as JSON with --json, else `text`."""
        print(json.dumps(values) if self.json else text)


@dataclass(kw_only=True)
class Extraction(Protocol):
    """Options of the protocols that read images with several threads."""

    num_workers: int = field(default_factory=default_workers)
    """Threads that read images."""

    def check(self) -> None:
        """Raises ValueError for invalid options. Not in __post_init__, since tyro garbles the errors from there."""
        require_least(self, num_workers=1)


@dataclass(kw_only=True)
class Classification(Extraction):
    """Options of the protocols that classify images."""

    data: Path | None = None
    """Folder, .zip or .tar with train/<class>/ and val/<class>/, or with <class>/ (then some images are held out).
    Default: the run's images; the embedded CIFAR-10 images for published weights."""
    image_size: int | None = None
    """Side of the network's input in pixels. Default: the training size."""
    batch_size: int = 128
    """Images per forward pass, and per update if a classifier is trained."""

    def check(self) -> None:
        super().check()
        if self.batch_size < 1 or (self.image_size is not None and self.image_size < 1):
            raise ValueError(
                f"batch_size and image_size must be at least 1, got {self.batch_size} and {self.image_size}"
            )

    def images(self, trained: Trained) -> Path:
        """Path of the images; logged if the user did not pass it."""
        path = self.data or trained.data or EMBEDDED_DATA
        if not self.data:
            logging.warning("images: %s (--data takes others)", path)
        return path

    def split(self, trained: Trained) -> tuple[ImageFolder, ImageFolder]:
        """Training and held-out images with labels, as returned by `data.folder.split`.

        Raises:
            ValueError: only one of train/ and val/ exists, val/ has other classes, or as in `require_labels`.
        """
        path = self.images(trained)
        train, val = split(path)
        scale = suited(train, trained.scale, self.num_workers)
        train, val = train.scaled(scale), val.scaled(scale)
        train.log_notes()
        if train.prefix == val.prefix:  # not a split
            alone = Path(train.prefix).name
            found = [alone] if part_of(alone) else train.classes
            if found and all(map(part_of, found)):
                missing = "val" if part_of(found[0]) in ("train", "pool") else "train"
                raise ValueError(f"{path} has {found[0]}/ but no {missing}/: expected both, or class folders alone")
        require_labels({"training": train, "held-out": val})
        assert train.labels is not None and val.labels is not None
        unknown = [train.classes[i] for i in sorted(set(val.labels) - set(train.labels))]
        if unknown and train.prefix != val.prefix:
            raise ValueError(
                f"{path} has {val.prefix}{unknown[0]}/ but no image in {train.prefix}{unknown[0]}/ ({len(unknown)} "
                "such classes): expected the classes of val/ in train/ too"
            )
        return train, val


@dataclass(kw_only=True)
class Precision(Protocol):
    """The option of the protocols that extract features of a frozen backbone."""

    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of a ViT's GEMMs in the extraction: bfloat16 is faster on CPUs with AMX and on a Zen 5, and meant for
    GPUs. Not for DINOv3 and DINOv2's ViT-g."""

    def load(self) -> Trained:
        trained = super().load()
        if self.precision == "bfloat16":
            if not isinstance(trained.backbone, VisionTransformer):
                raise ValueError(
                    f"precision bfloat16 is for ViTs that can be trained, {trained.arch} takes float32 only"
                )
            hold_copies(trained.backbone, torch.bfloat16)
        return trained


@dataclass(kw_only=True)
class Frozen(Classification, Precision):
    """Options of the protocols that classify with features of a frozen backbone."""

    def cache(self, trained: Trained) -> Cache:
        """Cache of the run's features."""
        return Cache(trained.backbone, self.folder / "features")

    def kind(self, name: str, size: int) -> str:
        """Describes how features are computed; part of the cache key. `name`: the outputs of the network used."""
        return f"{name}, center {size}" + (", bfloat16" if self.precision == "bfloat16" else "")

    def extract(
        self, cache: Cache, images: ImageFolder, forward: Callable[[Tensor], Tensor], name: str, size: int, what: str
    ) -> Features:
        """Features of the center crops of images, from the cache if possible; `name` identifies `forward`.

        Raises:
            ValueError: none can be read.
        """
        bad = BadImages(len(images), 0)
        loader = eval_loader(images, size, self.batch_size, self.num_workers)
        features = cache.features(images, loader, forward, bad, kind=self.kind(name, size), title=what)
        log_skipped(bad, what)
        return features


def dense_size(trained: Trained) -> int:
    """Short side in pixels of images whose patches are looked at: twice the training size, which is a finer grid, up to
    480 and not below the training size."""
    return max(trained.image_size, min(480, 2 * trained.image_size))


def require_labels(parts: dict[str, ImageFolder]) -> None:
    """Check that the parts of a data set, named in the messages, can be classified.

    Raises:
        ValueError: a part is empty, or the images are not in folders of two classes or more.
    """
    for what, images in parts.items():
        if not len(images):
            raise ValueError(f"there is no {what} image in {images.path}: expected train/<class>/ and val/<class>/")
    if any(images.labels is None for images in parts.values()):
        strays = (images.prefix + name for images in parts.values() for name in images.names if "/" not in name)
        stray = next(strays, None)
        raise ValueError(
            f"{images.path} has no labels: expected a folder for each of two classes or more, train/<class>/ and "
            f"val/<class>/; " + (f"{stray} is in none" if stray else "there is only one")
        )


def log_skipped(bad: BadImages, what: str) -> None:
    """Log how many images are missing in a result."""
    if bad.count:
        logging.warning(
            "%d of %d images could not be read (%s); the result excludes them", bad.count, bad.n_images, what
        )
