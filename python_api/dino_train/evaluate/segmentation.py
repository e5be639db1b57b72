"""Semantic segmentation by frozen patch features: k-NN and a linear layer, without the backbone's training.

Dimensions: h x w patches of an image, C channels of a feature, H x W pixels of a mask, K classes.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from dino_train.common.views import open_mask, size_of, whole_patches
from dino_train.config.options import require_least
from dino_train.data.decode import UnreadableImage
from dino_train.data.folder import ImageFolder, split
from dino_train.data.loader import BadImages
from dino_train.data.stats import suited
from dino_train.data.threads import in_order
from dino_train.evaluate.features import NoneReadable
from dino_train.evaluate.knn import nearest, vote
from dino_train.evaluate.linear import cosine
from dino_train.evaluate.metrics import intersection_over_union
from dino_train.evaluate.protocol import Extraction, Precision, dense_size, log_skipped
from dino_train.models.plain_vit import ViT

IGNORED = 255  # pixels of a mask that count nowhere
WEIGHT_DECAY = 1e-4  # of the linear layer, as in DINOv2
# Points a side of a patch where the linear layer is trained. Of patches of 16 pixels all would take 14 times as long;
# of 8, on shapes, they change its mIoU by 0.1 to 0.3 points.
SAMPLES = 4
ROWS = 256  # of pixels that are classified at once, so that the scores of all are never in memory

Item = TypeVar("Item")


@dataclass(frozen=True)
class Masked:
    """Images and the folder with the mask of each."""

    images: ImageFolder
    masks: Path

    def mask(self, i: int) -> Path:
        name = self.images.prefix + self.images.names[i]
        return self.masks / Path(name).with_suffix(".png")

    def classes(self, num_workers: int) -> dict[int, Path]:
        """The classes in the masks, sorted, each with a mask that has it.

        Raises:
            ValueError: an image has no mask, or as in `read_mask`.
        """
        paths = [self.mask(i) for i in range(len(self.images))]
        if missing := [i for i, path in enumerate(paths) if not path.is_file()]:
            raise ValueError(
                f"no mask {paths[missing[0]]}: expected a PNG of the same name for each image in {self.images.path}; "
                f"{len(missing)} of {len(paths)} images have none"
            )
        found: dict[int, Path] = {}
        contents = _read_ahead(lambda path: np.unique(read_mask(path)), paths, num_workers)
        for path, labels in zip(paths, contents, strict=True):
            for label in labels.tolist():
                found.setdefault(label, path)
        found.pop(IGNORED, None)
        return dict(sorted(found.items()))


def masked_split(root: Path) -> tuple[Masked, Masked]:
    """Training and held-out images of a folder.

    With train/images/, the held-out images are those of val/images/, and masks are in train/masks/ and val/masks/.
    Else images/ is split as for pretraining (`data.folder.split`): by its own train/ and val/, or by a hash of the
    names, n / 20 of n images and at most 512; masks/ has the same folders as images/.

    Raises:
        ValueError: there is neither, or a part has no image.
    """
    if (root / "train/images").is_dir():
        train, val = (Masked(ImageFolder(root / part / "images"), root / part / "masks") for part in ("train", "val"))
    elif (root / "images").is_dir():
        train, val = (Masked(images, root / "masks") for images in split(root / "images"))
    else:
        raise ValueError(
            f"{root} has neither train/images/ nor images/: expected train/images/, train/masks/, val/images/ and "
            "val/masks/, or images/ and masks/"
        )
    for part in (train, val):
        if not len(part.images):
            raise ValueError(
                f"{len(train.images) + len(val.images)} images in {root / 'images'} are too few to hold some out: "
                "expected 20 or more, or train/images/ and val/images/ with their masks/"
            )
    return train, val


def read_mask(path: Path, size: tuple[int, int] | None = None) -> np.ndarray:
    """The class of each pixel, uint8 [H, W]; 255 is ignored. Of a palette the numbers count, not the colors.

    size: required (width, height).

    Raises:
        ValueError: unreadable, not of one channel of 8 bits, or of another size.
    """
    image = open_mask(path)
    if image.mode not in ("P", "L", "1"):
        raise ValueError(
            f"mask {path} has mode {image.mode}, expected one channel of 8 bits or a palette: the class of each pixel"
        )
    if size is not None and image.size != size:
        raise ValueError(
            f"mask {path} has {image.width}x{image.height} pixels, expected {size[0]}x{size[1]} like its image"
        )
    return np.asarray(image).astype(np.uint8)


def patch_labels(mask: np.ndarray, grid: tuple[int, int], classes: int) -> Tensor:
    """The most frequent class of each patch's pixels (of equally frequent ones the first), -1 where all are ignored.

    A pixel belongs to the patch that contains its center.

    Args:
        mask: uint8 [H, W], 0 to classes - 1 or 255.
        grid: (h, w).

    Returns:
        int64 [h * w].
    """
    rows, columns = (
        (2 * np.arange(pixels) + 1) * n // (2 * pixels) for pixels, n in zip(mask.shape, grid, strict=True)
    )
    cells = (rows[:, None] * grid[1] + columns) * classes + mask
    counts = np.bincount(cells[mask != IGNORED], minlength=grid[0] * grid[1] * classes).reshape(-1, classes)
    return torch.from_numpy(np.where(counts.any(1), counts.argmax(1), -1))


def interpolation(n: int, pixels: int, device: torch.device) -> Tensor:
    """The matrix [pixels, n] of linear interpolation (align_corners=False) from n values.

    Bilinear interpolation as two products has a deterministic gradient; that of F.interpolate is summed by atomics on a
    GPU.
    """
    return F.interpolate(torch.eye(n, device=device)[None], size=pixels, mode="linear")[0].T


def label_map(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """Scores of patches [h, w, K] to the class of each pixel, int64 [H, W]: argmax of their bilinear interpolation.

    size: (H, W).
    """
    down, across = (interpolation(n, pixels, scores.device) for n, pixels in zip(scores.shape[:2], size, strict=True))
    wide = scores.permute(2, 0, 1) @ across.T
    return torch.cat([(rows @ wide).argmax(0) for rows in down.split(ROWS)])


class LinearHead(nn.Module):
    """A 1 x 1 convolution of normalized features, as in DINOv2: logits = W (x - mean) / sqrt(variance + 1e-5) + b.

    Mean and variance are those of all training patches, which batch norm estimates from batches; its weight and bias
    are part of W and b. W and b start at 0: the problem is convex.

    Args:
        features: of the training images, [h, w, C] each. classes: K.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, features: Sequence[Tensor], classes: int) -> None:
        super().__init__()
        count = sum(x.shape[0] * x.shape[1] for x in features)
        mean = torch.stack([x.double().sum((0, 1)) for x in features]).sum(0) / count
        variance = torch.stack([(x.double() - mean).square().sum((0, 1)) for x in features]).sum(0) / count
        self.register_buffer("mean", mean.float())
        self.register_buffer("scale", (variance + 1e-5).rsqrt().float())
        self.linear = nn.Linear(len(mean), classes)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: Tensor) -> Tensor:
        """[..., C] -> [..., K]."""
        return self.linear((features - self.mean) * self.scale)


def train_head(
    head: LinearHead,
    features: Sequence[Tensor],
    masks: Sequence[np.ndarray],
    *,
    epochs: int,
    batch_size: int,
    lr: float,
) -> None:
    """Train by AdamW, with a rate that falls as a cosine, in a fixed random order of the images.

    The loss of a batch is the mean cross-entropy over its labelled pixels, of logits interpolated to the masks.

    Args:
        features: [h, w, C] of each image. masks: uint8 [H, W] of each.
    """
    from tqdm import tqdm

    device = head.linear.weight.device
    optimizer = torch.optim.AdamW(head.parameters(), weight_decay=WEIGHT_DECAY)
    generator = torch.Generator().manual_seed(0)
    for epoch in tqdm(range(epochs), "linear", disable=None, unit="epoch", leave=False):
        optimizer.param_groups[0]["lr"] = lr * cosine(epoch, epochs)
        for rows in torch.randperm(len(features), generator=generator).split(batch_size):
            pixels = sum(int((masks[i] != IGNORED).sum()) for i in rows)
            optimizer.zero_grad()
            for i in rows:
                logits = head(features[i].to(device)).permute(2, 0, 1)
                down, across = (
                    interpolation(n, m, device) for n, m in zip(logits.shape[1:], masks[i].shape, strict=True)
                )
                logits = (down @ logits @ across.T).flatten(1).T
                labels = torch.from_numpy(masks[i]).flatten().long().to(device)
                loss = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
                (loss / max(1, pixels)).backward()
            optimizer.step()


def bank_of(features: Sequence[Tensor], labels: Sequence[Tensor], most: int) -> tuple[Tensor, Tensor]:
    """Labelled patches [m, C] of norm 1, and their classes [m]; of more than `most` a random choice, always the same.

    Args:
        features: [h, w, C] of each image. labels: int64 [h * w] of each, -1 without.
    """
    rows = (torch.cat(list(labels)) >= 0).nonzero().squeeze(1)
    chosen = torch.zeros(sum(map(len, labels)), dtype=torch.bool)
    chosen[rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:most]]] = True
    keeps = chosen.split([len(each) for each in labels])
    bank = [F.normalize(x.flatten(0, 1)[keep], dim=1) for x, keep in zip(features, keeps, strict=True)]
    return torch.cat(bank), torch.cat([each[keep] for each, keep in zip(labels, keeps, strict=True)])


def scores_of(confusion: np.ndarray, classes: Sequence[int]) -> dict[str, Any]:
    """mIoU over the classes that occur, accuracy of the pixels and IoU of each such class, in percent.

    confusion: [K, K] pixels by true and predicted class.
    """
    ious = 100 * intersection_over_union(confusion)
    return {
        "mIoU": float(np.nanmean(ious)),
        "accuracy": 100 * float(np.trace(confusion) / confusion.sum()),
        "IoU": {str(name): float(iou) for name, iou in zip(classes, ious, strict=True) if not math.isnan(iou)},
    }


def _read_ahead(read: Callable[[Item], Any], items: Sequence[Item], num_workers: int) -> Iterator[Any]:
    return in_order(read, items, threads=num_workers, ahead=2 * num_workers)


@dataclass(kw_only=True)
class Segmentation(Extraction, Precision):
    """Semantic segmentation by the patch features of a ViT: k-NN and a linear layer, mean IoU (as in DINOv2).

    The features are the normalized patch tokens of the last block. Masks have the class of each pixel, 255 is ignored.
    Both predictions are interpolated to the pixels of the masks.
    """

    data: Path
    """Folder with train/images/, train/masks/, val/images/ and val/masks/; or with images/ and masks/, of which some
    are held out. The mask of images/a/b.jpg is masks/a/b.png: one channel or a palette, of the same size."""
    image_size: int | None = None
    """Short side in pixels of the network's input, whose sides are rounded to whole patches. Default: 2 x its training
    size (at most 480)."""
    nb_knn: int = 20
    """Number of neighbors."""
    bank: int = 100_000
    """Training patches that are searched for neighbors; of more, so many are drawn, always the same."""
    epochs: int = 20
    """Passes of the linear layer over the training images."""
    lr: float = 1e-3
    """Learning rate of the linear layer."""
    batch_size: int = 4
    """Images per update of the linear layer."""

    def check(self) -> None:
        super().check()
        require_least(self, image_size=1, nb_knn=1, bank=1, epochs=1, batch_size=1)
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr must be above 0, got {self.lr}")

    def run(self) -> None:
        self.check()
        trained, backbone = self.load_vit()
        train, val = masked_split(self.data)
        scale = suited(train.images, trained.scale, self.num_workers)
        train, val = (Masked(part.images.scaled(scale), part.masks) for part in (train, val))
        train.images.log_notes()
        classes = self._classes(train, val)
        size = self.image_size or dense_size(trained)
        images = partial(self._images, backbone=backbone, size=size, classes=classes)
        count, frequent, bank, bank_labels, head = self._train(images(train, what="training"), backbone, len(classes))

        names = ("chance", "knn", "linear")
        confusions = np.zeros((len(names), len(classes), len(classes)), np.int64)
        held_out = 0
        for tokens, mask in images(val, what="held-out"):
            held_out += 1
            found = [np.full(mask.shape, frequent)]
            for scores in (self._votes(tokens, bank, bank_labels, len(classes)), head(tokens)):
                found.append(label_map(scores, mask.shape).cpu().numpy())
            counts = mask != IGNORED
            for confusion, labels in zip(confusions, found, strict=True):
                cells = len(classes) * mask[counts].astype(np.int64) + labels[counts]
                confusion += np.bincount(cells, minlength=confusion.size).reshape(confusion.shape)
        values = {name: scores_of(confusion, classes) for name, confusion in zip(names, confusions, strict=True)}
        lines = [f"{name:8}mIoU {v['mIoU']:.2f} %  pixel accuracy {v['accuracy']:.2f} %" for name, v in values.items()]
        self.report(
            {
                "protocol": "segmentation",
                "train": count,
                "val": held_out,
                "image_size": size,
                "bank": len(bank),
                "k": min(self.nb_knn, len(bank)),
                "classes": classes,
                **values,
            },
            "\n".join(
                [f"{held_out} images by {count}, {len(classes)} classes; chance: class {classes[frequent]}", *lines]
            ),
        )

    def _classes(self, train: Masked, val: Masked) -> list[int]:
        """The classes of the training masks.

        Raises:
            ValueError: they are fewer than two, a held-out mask has another or none has any, or as `Masked.classes`.
        """
        known, held_out = (part.classes(self.num_workers) for part in (train, val))
        if len(known) < 2:
            raise ValueError(
                f"the only class in the masks in {train.masks} is {next(iter(known), 'none')}, besides 255, which is "
                "ignored: expected a number for each of two or more"
            )
        if not held_out:
            raise ValueError(f"every pixel of the held-out masks in {val.masks} is 255, which is ignored")
        if unknown := sorted(held_out.keys() - known.keys()):
            raise ValueError(
                f"{held_out[unknown[0]]} has class {unknown[0]}, which no training mask has ({len(unknown)} such "
                "classes): expected the classes of the held-out masks in training masks too, or 255 for such pixels"
            )
        return list(known)

    @torch.no_grad()
    def _images(
        self, part: Masked, *, backbone: ViT, size: int, classes: Sequence[int], what: str
    ) -> Iterator[tuple[Tensor, np.ndarray]]:
        """Of each readable image the patch tokens, float32 [h, w, C], and the mask, uint8 [H, W]: places in `classes`.

        Raises:
            ValueError: no image can be read, or as `read_mask`.
        """
        from tqdm import tqdm

        places = np.full(256, IGNORED, np.uint8)
        places[classes] = np.arange(len(classes))
        bad = BadImages(len(part.images), 0)

        def read(i: int) -> tuple[Tensor, np.ndarray] | UnreadableImage:
            try:
                view = part.images.view(i)
            except UnreadableImage as error:
                return error
            pixels = whole_patches(view, size, backbone.patch_size, part.images.scale)
            return pixels, places[read_mask(part.mask(i), size_of(view))]

        found = _read_ahead(read, range(len(part.images)), self.num_workers)
        for one in tqdm(found, what, total=len(part.images), disable=None, unit="image", leave=False):
            if isinstance(one, UnreadableImage):
                bad.add([(one.name, one.reason)])
                continue
            pixels, mask = one
            tokens = backbone.features(pixels[None].to(backbone.cls_token.device))[-1][0, 1:].float()
            yield tokens.unflatten(0, (pixels.shape[1] // backbone.patch_size, -1)), mask
        log_skipped(bad, what)
        if bad.count == len(part.images):
            raise NoneReadable(f"none of {bad.count} {what} images in {part.images.path} could be read")

    def _train(
        self, images: Iterable[tuple[Tensor, np.ndarray]], backbone: ViT, classes: int
    ) -> tuple[int, int, Tensor, Tensor, LinearHead]:
        """Number of images, most frequent class, patches to search [m, C] of norm 1 and their classes [m], and the
        trained layer."""
        side, device = min(SAMPLES, backbone.patch_size), backbone.cls_token.device
        features, labels, masks, pixels = [], [], [], np.zeros(classes, np.int64)
        for tokens, mask in images:
            h, w, _ = tokens.shape
            features.append(tokens.cpu())
            labels.append(patch_labels(mask, (h, w), classes))
            masks.append(np.array(Image.fromarray(mask).resize((w * side, h * side), Image.Resampling.NEAREST)))
            pixels += np.bincount(mask[mask != IGNORED], minlength=classes)
        bank, bank_labels = bank_of(features, labels, self.bank)
        head = LinearHead(features, classes).to(device)
        train_head(head, features, masks, epochs=self.epochs, batch_size=self.batch_size, lr=self.lr)
        return len(features), int(pixels.argmax()), bank.to(device), bank_labels.to(device), head.requires_grad_(False)

    def _votes(self, tokens: Tensor, bank: Tensor, labels: Tensor, classes: int) -> Tensor:
        """Shares of the classes in the votes of each patch's neighbors [h, w, K]; see `knn.vote`."""
        queries = F.normalize(tokens, dim=2).flatten(0, 1)
        similarity, rows = nearest(bank, queries, min(self.nb_knn, len(bank)))
        votes = vote(similarity, labels[rows], classes)
        return F.normalize(votes, p=1, dim=1).unflatten(0, tokens.shape[:2])
