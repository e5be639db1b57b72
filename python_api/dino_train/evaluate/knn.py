"""Weighted k-NN classification (`eval_knn.py`), and retrieval of a second view of an image."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino_kernels import CropKind
from dino_train.common import parallel
from dino_train.common.device import pick_device
from dino_train.data.folder import ImageFolder
from dino_train.data.loader import BadImages, CropLoader, eval_loader
from dino_train.evaluate.features import Features, extract
from dino_train.evaluate.metrics import accuracy, label_ranks
from dino_train.evaluate.protocol import Frozen, require_labels

PARTS = ("train", "val")  # names of dumped features
KNN_TEMPERATURE = 0.07  # eval_knn.py:218
RETRIEVAL_IMAGES = 256  # enough to distinguish 1 % from 3 %, few enough for every epoch
BATCH = 64  # of view retrieval
QUERY_BLOCK, TRAIN_BLOCK = 1024, 32768  # similarities computed at once: 128 MiB


def extract_features(
    backbone: nn.Module, images: ImageFolder, bad: BadImages, size: int, *, batch_size: int = 128, num_workers: int = 1
) -> tuple[Tensor, Tensor]:
    """L2-normalized features [n, C] float32 and labels [n] of the readable images, on the backbone's device.

    The images are distributed over the ranks; every rank gets all features.

    Images are resized, center-cropped to `size` pixels and normalized (eval_knn.py:36-41); unreadable images are added
    to `bad`.
    """
    device = next(backbone.parameters()).device
    share = images.subset(range(parallel.rank(), len(images), parallel.size()))
    features, labels, _ = extract(
        backbone, backbone, eval_loader(share, size, batch_size, num_workers), len(share), bad
    )
    # A rank without readable images must take part too.
    all_features = parallel.gather(F.normalize(features, dim=1).to(device))
    all_labels = parallel.gather(labels.to(device))
    if not len(all_features):
        raise ValueError(f"none of {len(images)} images could be read")
    return all_features, all_labels


def nearest(train: Tensor, queries: Tensor, k: int, title: str = "") -> tuple[Tensor, Tensor]:
    """The k most similar training features of each query: similarities [n, k], descending, and their rows [n, k].

    Similarities are computed in blocks and merged into a running top-k, so that the matrix [n, m] is never in memory;
    each block of `train` is moved once to the device of `queries`.

    Args:
        train: [m, C] with m >= k, on any device.
        queries: [n, C].
        title: of a progress bar, shown if stderr is a terminal; no bar if empty.
    """
    best = torch.full((len(queries), k), -torch.inf, device=queries.device)
    rows = torch.zeros(len(queries), k, dtype=torch.int64, device=queries.device)
    starts = range(0, len(train), TRAIN_BLOCK)
    for start in _with_bar(starts, title) if title else starts:
        block = train[start : start + TRAIN_BLOCK].to(queries.device)
        for i in range(0, len(queries), QUERY_BLOCK):
            part = slice(i, i + QUERY_BLOCK)
            similar, found = (queries[part] @ block.T).topk(min(k, len(block)), dim=1)
            both = torch.cat((best[part], similar), dim=1)
            best[part], order = both.topk(k, dim=1)
            rows[part] = torch.cat((rows[part], found + start), dim=1).gather(1, order)
    return best, rows


def _with_bar(blocks: Iterable[int], title: str) -> Iterable[int]:
    from tqdm import tqdm

    return tqdm(blocks, title, disable=None, unit="block", leave=False)


def vote(similarity: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Scores [n, classes] of weighted k-NN voting (eval_knn.py:161-168; Wu et al. 2018).

    score_c = sum over the neighbors of class c of exp(cosine / 0.07).

    Args:
        similarity: [n, k] cosines of the neighbors.
        labels: [n, k] int64 classes of the neighbors, 0 to classes - 1.
    """
    votes = torch.zeros(len(labels), classes, device=labels.device)
    return votes.scatter_add_(1, labels, (similarity / KNN_TEMPERATURE).exp())


def knn_top(
    train_features: Tensor,
    train_labels: Tensor,
    features: Tensor,
    labels: Tensor,
    *,
    ks: Iterable[int],
    classes: int,
    title: str = "",
) -> dict[int, dict[str, float]]:
    """Top-1 and top-5 accuracy in percent for each k: {10: {"top1": 33.1, "top5": 78.0}, ...}.

    Top-5 considers only classes with votes. The reference fills up with classes without votes, in arbitrary order, so
    its top-5 is higher for small k.

    Args:
        train_features: [m, C], rows of norm 1. train_labels: [m] int64, 0 to classes - 1.
        features: [n, C], rows of norm 1. labels: [n] int64.
        ks: numbers of neighbors, at most m is used.
        title: of a progress bar, as in `nearest`.
    """
    ks = list(ks)
    similarity, rows = nearest(train_features, features, min(max(ks), len(train_features)), title)
    neighbors = train_labels.to(features.device)[rows]
    labels = labels.to(features.device)
    blocks = [slice(i, i + QUERY_BLOCK) for i in range(0, len(features), QUERY_BLOCK)]
    result = {}
    for k in ks:
        ranks = [label_ranks(vote(similarity[b, :k], neighbors[b, :k], classes), labels[b]) for b in blocks]
        result[k] = accuracy(torch.cat(ranks))
    return result


def knn_accuracy(
    backbone: nn.Module,
    train: ImageFolder,
    test: ImageFolder,
    size: int,
    *,
    bad: tuple[BadImages, BadImages] | None = None,
    ks: Iterable[int] = (10, 20),
    num_workers: int = 1,
) -> dict[str, float]:
    """Top-1 accuracy in percent by k: {"knn10": 33.1, ...}. Unreadable images of train and test are added to `bad`.

    Raises:
        ValueError: the images are not in class folders, or none can be read.
    """
    require_labels({"training": train, "held-out": test})
    train_bad, test_bad = bad or (BadImages(len(train), 0), BadImages(len(test), 0))
    train_features, train_labels = extract_features(backbone, train, train_bad, size, num_workers=num_workers)
    test_features, test_labels = extract_features(backbone, test, test_bad, size, num_workers=num_workers)
    values = knn_top(train_features, train_labels, test_features, test_labels, ks=ks, classes=len(train.classes))
    return {f"knn{k}": value["top1"] for k, value in values.items()}


@dataclass(kw_only=True)
class Knn(Frozen):
    """Weighted k-NN accuracy on images in class folders (eval_knn.py)."""

    checkpoint: Path | None = None  # type: ignore[assignment]
    """A run's folder, a checkpoint, or a file of published weights; not needed with --load-features."""
    nb_knn: tuple[int, ...] = (10, 20, 100, 200)
    """Numbers of neighbors."""
    dump_features: Path | None = None
    """Folder for train.safetensors and val.safetensors: features with paths and labels."""
    load_features: Path | None = None
    """Folder written by --dump-features, to use instead of a checkpoint and images."""

    def check(self) -> None:
        super().check()
        if not self.nb_knn or min(self.nb_knn) < 1:
            raise ValueError(f"nb_knn must be numbers of at least 1, got {self.nb_knn}")
        if (self.checkpoint is None) == (self.load_features is None):
            raise ValueError("pass either --checkpoint, a run's folder or a file, or --load-features, a dumped folder")

    def run(self) -> None:
        self.check()
        train, val = self._load_features(self.load_features) if self.load_features else self._extract()
        if self.dump_features:
            for part, features in zip(PARTS, (train, val), strict=True):
                features.save(self.dump_features / f"{part}.safetensors")
        if max(self.nb_knn) > len(train.paths):
            logging.warning("there are only %d training images: larger k use all of them", len(train.paths))
        device = pick_device(self.device)
        values = knn_top(
            F.normalize(train.values, dim=1),
            train.labels,
            F.normalize(val.values, dim=1).to(device),
            val.labels,
            ks=self.nb_knn,
            classes=len(train.classes),
            title="neighbors",
        )
        named = {f"knn{k}": value for k, value in values.items()}
        self.report(
            {"protocol": "knn", "train": len(train.paths), "val": len(val.paths)} | named,
            f"{len(val.paths)} images by {len(train.paths)} of {len(train.classes)} classes, chance "
            f"{100 / len(train.classes):.2f} %\n"
            + "\n".join(f"{k}: top-1 {v['top1']:.2f} %  top-5 {v['top5']:.2f} %" for k, v in named.items()),
        )

    def _load_features(self, folder: Path) -> tuple[Features, Features]:
        train, val = (Features.load(folder / f"{part}.safetensors") for part in PARTS)
        labels = torch.cat((train.labels, val.labels))
        known = len(labels) > 0 and 0 <= labels.min() <= labels.max() < len(train.classes)
        if train.values.shape[1:] != val.values.shape[1:] or train.classes != val.classes or not known:
            raise ValueError(f"train and val in {folder} are not labelled features of one backbone")
        return train, val

    def _extract(self) -> tuple[Features, Features]:
        trained = self.load()
        size = self.image_size or trained.image_size
        train, val = self.split(trained)
        extract = partial(self.extract, self.cache(trained), forward=trained.backbone, name="output", size=size)
        return extract(train, what="training"), extract(val, what="held-out")


def recall_at_1(queries: Tensor, candidates: Tensor) -> float:
    """Percent of rows whose most similar candidate (cosine; rows of norm 1) has the same index."""
    nearest = (queries @ candidates.T).argmax(dim=1)
    return 100 * (nearest == torch.arange(len(queries), device=nearest.device)).double().mean().item()


@torch.no_grad()
def view_retrieval(
    backbone: nn.Module,
    images: ImageFolder,
    bad: BadImages,
    kinds: Sequence[CropKind],
    *,
    seed: int,
    num_workers: int = 1,
) -> tuple[float, int]:
    """Recall at 1, in percent, of retrieving an image's second crop by its first, and the number of images (<= 256).

    kinds: of the two crops.

    The crops depend only on the seed, so that values of different epochs are comparable.
    """
    device = next(backbone.parameters()).device
    chosen = images.subset(range(0, len(images), max(1, len(images) // RETRIEVAL_IMAGES))[:RETRIEVAL_IMAGES])
    steps = -(-len(chosen) // BATCH)
    batch = len(chosen) // steps
    loader = CropLoader(
        chosen,
        kinds,
        batch_size=batch,
        seed=seed,
        start_step=0,
        total_steps=steps,
        num_workers=num_workers,
        device=device,
        scale=images.scale,
    )
    was_training = backbone.training
    backbone.eval()
    views: tuple[list[Tensor], list[Tensor]] = ([], [])
    for crops, unreadable in loader:
        bad.add(unreadable)
        for view, crop in zip(views, crops, strict=True):
            view.append(F.normalize(backbone(crop).float(), dim=1))
    backbone.train(was_training)
    queries, candidates = map(torch.cat, views)
    return recall_at_1(queries, candidates), len(queries)
