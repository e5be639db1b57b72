"""Features of images: extracted once, cached next to the checkpoint, saved and loaded as safetensors."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dino_kernels import PixelScale
from dino_train.common.files import atomic
from dino_train.data.decode import UnreadableImage
from dino_train.data.folder import ImageFolder
from dino_train.data.loader import BadImages, Batch

logger = logging.getLogger(__name__)


@dataclass
class Features:
    """Features of images.

    values: [n, C] float32, on the CPU. labels: [n] int64, index into `classes`, -1 without classes. paths: of the n
    images, relative to the root of their data set.
    """

    values: Tensor
    labels: Tensor
    paths: list[str]
    classes: list[str]

    def save(self, path: Path) -> None:
        """Write atomically to a safetensors file: "values" and "labels" as tensors, "paths" and "classes" as UTF-8
        bytes, each terminated by a zero byte (the header is too small for a million names).

        Raises:
            OSError: it could not be written.
        """
        from safetensors.torch import save  # not save_file, whose files only their owner may read

        tensors = {
            "values": self.values.contiguous(),
            "labels": self.labels,
            "paths": _pack(self.paths),
            "classes": _pack(self.classes),
        }
        with atomic(path) as temporary:
            temporary.write_bytes(save(tensors))

    @classmethod
    def load(cls, path: Path) -> "Features":
        """Read what `save` wrote.

        Raises:
            ValueError: no such file, damaged, or without the four tensors of `save`.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        if not path.is_file():
            raise ValueError(f"no features at {path}: expected a safetensors file that --dump-features wrote")
        try:
            tensors = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or not a safetensors file ({error})") from error
        if set(tensors) != {"values", "labels", "paths", "classes"}:
            raise ValueError(f"{path} holds {', '.join(tensors)}, expected values, labels, paths and classes")
        features = cls(tensors["values"], tensors["labels"], _unpack(tensors["paths"]), _unpack(tensors["classes"]))
        if not len(features.values) == len(features.labels) == len(features.paths):
            raise ValueError(
                f"{path} holds {len(features.values)} features, {len(features.labels)} labels and "
                f"{len(features.paths)} paths, expected equal numbers"
            )
        return features


def _pack(words: list[str]) -> Tensor:
    data = "".join(word + "\0" for word in words).encode("utf-8", "surrogateescape")
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def _unpack(data: Tensor) -> list[str]:
    return data.numpy().tobytes().decode("utf-8", "surrogateescape").split("\0")[:-1]


@torch.no_grad()
def extract(
    backbone: nn.Module,
    forward: Callable[[Tensor], Tensor],
    loader: Iterable[Batch],
    count: int,
    bad: BadImages,
    title: str = "",
) -> tuple[Tensor, Tensor, Tensor]:
    """Features [n, C] float32, labels [n] and indices [n] of a loader's readable images, on the CPU.

    Args:
        backbone: in eval mode during the extraction; the pixels are moved to its device.
        forward: pixels [B, 3, h, w] to features [B, C].
        loader: like `eval_loader`.
        count: expected number of images, including unreadable ones.
        bad: unreadable images are added to it.
        title: of a progress bar, shown if stderr is a terminal; no bar if empty.

    Raises:
        RuntimeError: the loader yields a different number of images.
    """
    device = next(backbone.parameters()).device
    values = torch.empty(count, 0)
    labels, indices = [torch.empty(0, dtype=torch.int64)], [torch.empty(0, dtype=torch.int64)]
    read = seen = 0
    was_training = backbone.training
    backbone.eval()
    with _bar(title, count) if title else nullcontext() as progress:
        for pixels, batch_labels, batch_indices, unreadable in loader:
            bad.add(unreadable)
            seen += len(pixels) + len(unreadable)
            if progress is not None:
                progress.update(len(pixels) + len(unreadable))
            if not len(pixels):
                continue
            batch = forward(pixels.to(device, non_blocking=True)).float().cpu()
            if not read:
                values = torch.empty(count, batch.shape[1])
            values[read : read + len(batch)] = batch
            read += len(batch)
            labels.append(batch_labels)
            indices.append(batch_indices)
    backbone.train(was_training)
    if seen != count:
        raise RuntimeError(f"expected {count} images, got {seen}")
    return values[:read], torch.cat(labels), torch.cat(indices)


def _bar(title: str, total: int):
    from tqdm import tqdm

    return tqdm(total=total, desc=title, disable=None, unit="image", leave=False)


FORMAT = 2  # of cached features: increase it when decoding, transforms or features change


def weights_digest(backbone: nn.Module) -> str:
    """Identifies a backbone: SHA-256 of its attention heads and its weights' names, dtypes, shapes and values."""
    heads = [module.num_heads for module in backbone.modules() if hasattr(module, "num_heads")]
    digest = hashlib.sha256(f"{type(backbone).__name__} {heads}".encode())
    for name, tensor in backbone.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


class NoneReadable(ValueError):
    """None of the images can be read."""


class Cache:
    """Cache of features of one backbone: a folder of files whose names are hashes of all the features depend on.

    These are the weights, the images (path, size and time of each file, and label) and `kind`, which describes how
    pixels and features are computed. A file is complete or absent, so an interrupted extraction starts again.
    """

    def __init__(self, backbone: nn.Module, folder: Path) -> None:
        self.backbone, self.folder = backbone, folder
        self._weights = weights_digest(backbone)

    def path(self, images: ImageFolder, *, kind: str, title: str) -> Path:
        """Path, without suffix, for results that depend on the weights, the images and `kind`."""
        facts = [FORMAT, self._weights, kind, images.classes, _identity(images)]
        if images.scale != PixelScale():
            facts.append(repr(images.scale))
        key = hashlib.sha256(json.dumps(facts).encode())
        return self.folder / f"{title}-{key.hexdigest()[:24]}"

    def features(
        self,
        images: ImageFolder,
        loader: Iterable[Batch],
        forward: Callable[[Tensor], Tensor],
        bad: BadImages,
        *,
        kind: str,
        title: str,
    ) -> Features:
        """Features from the cache, or computed by `extract` and cached. In both cases unreadable images are added to
        `bad`.

        Raises:
            NoneReadable: none of the images can be read.
        """
        path = self.path(images, kind=kind, title=title).with_suffix(".safetensors")
        if path.exists():
            try:
                features = Features.load(path)
            except ValueError as error:
                logger.warning("%s: extracting again", error)
            else:
                known = set(features.paths)
                lost = [i for i, name in enumerate(images.names) if name not in known]
                reasons = [_unreadable(images, i) for i in lost]
                if all(reasons):
                    bad.add([(images.prefix + images.names[i], str(why)) for i, why in zip(lost, reasons, strict=True)])
                    return features
                logger.warning("images that could not be read before can be read now: extracting again")
        values, labels, indices = extract(self.backbone, forward, loader, len(images), bad, title)
        if not len(values):
            raise NoneReadable(f"none of {len(images)} images in {images.path} could be read")
        features = Features(values, labels, [images.names[i] for i in indices.tolist()], images.classes)
        try:
            features.save(path)
        except OSError as error:
            logger.warning("features are not cached: %s", error)
        return features


def _unreadable(images: ImageFolder, i: int) -> str | None:
    """Why image i cannot be read, if it cannot."""
    try:
        images.view(i)
    except UnreadableImage as error:
        return error.reason
    return None


def _identity(images: ImageFolder) -> list[Any]:
    """Identifies the images: names, labels, and sizes and times of the files."""
    whole = images.path.stat()
    facts: list[Any] = [images.names, images.labels, str(images.path.resolve()), images.prefix]
    if images.path.is_file():
        return [*facts, whole.st_size, whole.st_mtime_ns]
    return [*facts, [_stat(images.path / images.prefix / name) for name in images.names]]


def _stat(path: Path) -> tuple[int, int] | None:
    try:
        stat = path.stat()
    except OSError:  # reported later as an unreadable image
        return None
    return stat.st_size, stat.st_mtime_ns
