"""Features of images: extracted once, kept beside the checkpoint, saved and loaded as safetensors."""

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

from dino_train.common.files import atomic
from dino_train.data.folder import ImageFolder
from dino_train.data.loader import BadImages, Batch

logger = logging.getLogger(__name__)


@dataclass
class Features:
    """Features of images.

    values: [n, C] float32, on the CPU. labels: [n] int64, index into `classes`, -1 without classes. paths: of the n
    images, below their data set's root.
    """

    values: Tensor
    labels: Tensor
    paths: list[str]
    classes: list[str]

    def save(self, path: Path) -> None:
        """Write to a safetensors file, atomically: "values" and "labels" as they are, "paths" and "classes" as
        UTF-8 bytes, each ended by a zero byte (a header has no room for a million names).

        Raises:
            OSError: it could not be written.
        """
        from safetensors.torch import save_file

        tensors = {
            "values": self.values.contiguous(),
            "labels": self.labels,
            "paths": _pack(self.paths),
            "classes": _pack(self.classes),
        }
        with atomic(path) as temporary:
            save_file(tensors, temporary)

    @classmethod
    def load(cls, path: Path) -> "Features":
        """Read what `save` wrote.

        Raises:
            ValueError: no such file, damaged, or it has not the four tensors of `save`.
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
                f"{len(features.paths)} paths, expected as many of each"
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
        backbone: put into eval mode meanwhile; its device is where the pixels go.
        forward: pixels [B, 3, h, w] to features [B, C].
        loader: as `eval_loader`.
        count: images that it must yield or name as unreadable.
        bad: what cannot be read is added.
        title: names a progress bar, shown where errors go to a terminal; none where empty.

    Raises:
        RuntimeError: the loader ends before or after that.
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


FORMAT = 2  # of what is kept: raise it with a change of decoding, transforms or features


def weights_digest(backbone: nn.Module) -> str:
    """Tells weights apart: SHA-256 of names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in backbone.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


class Cache:
    """Features of one backbone, kept in a folder under a name that follows from all they depend on.

    These are the weights, the images (path, size and time of each file, and label) and `kind`, which says how pixels
    and features are made. A file is complete or absent, so an interrupted extraction starts anew.
    """

    def __init__(self, backbone: nn.Module, folder: Path) -> None:
        self.backbone, self.folder = backbone, folder
        self._weights = weights_digest(backbone)

    def path(self, images: ImageFolder, *, kind: str, title: str) -> Path:
        """Where to keep what follows from the weights, the images and `kind`; without a suffix."""
        key = hashlib.sha256(json.dumps([FORMAT, self._weights, kind, images.classes, _identity(images)]).encode())
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
        """Out of the cache, or by `extract` and then into it; `bad` learns of the unreadable images either way.

        Raises:
            ValueError: none of the images can be read.
        """
        path = self.path(images, kind=kind, title=title).with_suffix(".safetensors")
        if path.exists():
            try:
                features = Features.load(path)
            except ValueError as error:
                logger.warning("%s: extracting again", error)
            else:
                known = set(features.paths)
                lost = [images.prefix + name for name in images.names if name not in known]
                bad.add([(name, "no kept features, so it could not be read before") for name in lost])
                return features
        values, labels, indices = extract(self.backbone, forward, loader, len(images), bad, title)
        if not len(values):
            raise ValueError(f"none of {len(images)} images in {images.path} could be read")
        features = Features(values, labels, [images.names[i] for i in indices.tolist()], images.classes)
        try:
            features.save(path)
        except OSError as error:
            logger.warning("features are not kept for the next time: %s", error)
        return features


def _identity(images: ImageFolder) -> list[Any]:
    """Changes with the images: their names, labels, and sizes and times of the files."""
    whole = images.path.stat()
    facts: list[Any] = [images.names, images.labels, str(images.path.resolve()), images.prefix]
    if images.path.is_file():
        return [*facts, whole.st_size, whole.st_mtime_ns]
    return [*facts, [_stat(images.path / images.prefix / name) for name in images.names]]


def _stat(path: Path) -> tuple[int, int] | None:
    try:
        stat = path.stat()
    except OSError:  # it will be among the unreadable ones
        return None
    return stat.st_size, stat.st_mtime_ns
