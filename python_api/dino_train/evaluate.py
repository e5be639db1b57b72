"""How good the features are: weighted k-NN classification, and retrieval of another view of an image."""

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino_kernels import CropKind
from dino_train import parallel
from dino_train.data import ImageFolder
from dino_train.loader import BadImages, CropLoader, eval_loader

KNN_TEMPERATURE = 0.07  # eval_knn.py:218
RETRIEVAL_IMAGES = 256  # enough to tell 1 % from 3 %, few enough for every epoch


@torch.no_grad()
def extract_features(
    backbone: nn.Module, images: ImageFolder, bad: BadImages, size: int, *, batch_size: int = 128, num_workers: int = 1
) -> tuple[Tensor, Tensor]:
    """L2-normalized features [n, C] float32 and labels [n] of the readable images, on the backbone's device.

    Several ranks share the images and all get all features.

    Images are resized, center-cropped to `size` pixels and normalized (eval_knn.py:36-41); what cannot be read is
    added to `bad`.
    """
    device = next(backbone.parameters()).device
    features, labels = [], []
    was_training = backbone.training
    backbone.eval()
    share = images.subset(range(parallel.rank(), len(images), parallel.size()))
    for pixels, batch_labels, _, unreadable in eval_loader(share, size, batch_size, num_workers):
        bad.add(unreadable)
        if len(pixels):
            features.append(F.normalize(backbone(pixels.to(device)).float(), dim=1))
            labels.append(batch_labels.to(device))
    backbone.train(was_training)
    # A rank may have got no readable image, but must take part.
    all_features = parallel.gather(torch.cat(features) if features else torch.empty(0, 0, device=device))
    all_labels = parallel.gather(torch.cat(labels) if labels else torch.empty(0, dtype=torch.int64, device=device))
    if not len(all_features):
        raise ValueError(f"none of {len(images)} images could be read")
    return all_features, all_labels


def knn_classify(train_features: Tensor, train_labels: Tensor, features: Tensor, *, k: int, classes: int) -> Tensor:
    """Scores [n, classes] of weighted k-NN voting (eval_knn.py:125-185; Wu et al. 2018).

    score_c = sum over the k nearest training features of class c of exp(cosine / 0.07).

    Args:
        train_features: [m, C], rows of norm 1.
        train_labels: [m] int64, 0 to classes - 1.
        features: [n, C], rows of norm 1.
        k: neighbors, cut to m where there are fewer.
        classes: number of classes.
    """
    scores = []
    for rows in features.split(512):  # keeps the similarity matrix small
        similarity, nearest = (rows @ train_features.T).topk(min(k, len(train_features)), dim=1)
        votes = torch.zeros(len(rows), classes, device=rows.device)
        scores.append(votes.scatter_add_(1, train_labels[nearest], (similarity / KNN_TEMPERATURE).exp()))
    return torch.cat(scores)


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
    """Top-1 accuracy in percent by k: {"knn10": 33.1, ...}. `bad` keeps the unreadable images of train and test.

    Raises:
        ValueError: the images lie in no class folders, or none can be read.
    """
    if train.labels is None or test.labels is None:
        raise ValueError("k-NN needs labels: put each class's images in a folder of its own")
    train_bad, test_bad = bad or (BadImages(len(train), 0), BadImages(len(test), 0))
    train_features, train_labels = extract_features(backbone, train, train_bad, size, num_workers=num_workers)
    test_features, test_labels = extract_features(backbone, test, test_bad, size, num_workers=num_workers)
    result = {}
    for k in ks:
        scores = knn_classify(train_features, train_labels, test_features, k=k, classes=len(train.classes))
        result[f"knn{k}"] = 100 * (scores.argmax(dim=1) == test_labels).double().mean().item()
    return result


def recall_at_1(queries: Tensor, candidates: Tensor) -> float:
    """Percent of rows whose most similar candidate (cosine; rows of norm 1) is the one of the same index."""
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
) -> float:
    """Recall at 1, in percent, of finding an image's second crop by its first among <= 256 images; kinds: of the two.

    The crops depend on the seed alone, so that values of different epochs compare.
    """
    device = next(backbone.parameters()).device
    chosen = images.subset(range(0, len(images), max(1, len(images) // RETRIEVAL_IMAGES))[:RETRIEVAL_IMAGES])
    batch = min(64, len(chosen))
    loader = CropLoader(
        chosen,
        kinds,
        batch_size=batch,
        seed=seed,
        start_step=0,
        total_steps=len(chosen) // batch,
        num_workers=num_workers,
        device=device,
    )
    was_training = backbone.training
    backbone.eval()
    views: tuple[list[Tensor], list[Tensor]] = ([], [])
    for crops, unreadable in loader:
        bad.add(unreadable)
        for view, crop in zip(views, crops, strict=True):
            view.append(F.normalize(backbone(crop).float(), dim=1))
    backbone.train(was_training)
    return recall_at_1(torch.cat(views[0]), torch.cat(views[1]))
