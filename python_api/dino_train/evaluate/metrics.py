"""Metrics of the protocols, as functions of scores, ranks and masks."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor


def label_ranks(scores: Tensor, labels: Tensor) -> Tensor:
    """Rank of each row's label among the classes by descending score, from 1: int64 [n].

    A label with the same score as other classes is ranked after them: a class without votes is not predicted. NaN is
    last.

    Args:
        scores: [n, classes]. labels: [n] int64, 0 to classes - 1.
    """
    return scores.shape[1] - (scores < scores.gather(1, labels[:, None])).sum(dim=1)


def accuracy(ranks: Tensor) -> dict[str, float]:
    """Percent of `label_ranks` that are 1 ("top1") or at most 5 ("top5"; always 100 with up to five classes)."""
    return {f"top{k}": 100 * int((ranks <= k).sum()) / len(ranks) for k in (1, 5)}


def average_precision(ranks: Sequence[int] | np.ndarray, positives: int) -> float:
    """Area under the precision-recall curve by the trapezoidal rule, as in the Oxford evaluation (`utils.py:703`).

    AP = 1/P sum_j (p(r_j) + p(r_j + 1)) / 2, with p(r) the precision among the first r results and p(0) = 1.

    Args:
        ranks: increasing ranks r_j, from 0, of the retrieved positive images.
        positives: number P >= 1 of all positive images; those not retrieved contribute 0.
    """
    ranks = np.asarray(ranks, dtype=np.float64)
    found = np.arange(len(ranks))
    before = np.where(ranks == 0, 1.0, found / np.maximum(ranks, 1))
    return float(((before + (found + 1) / (ranks + 1)) / 2).sum() / positives)


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two bool arrays of equal shape, in [0, 1]; 1 if both are empty."""
    union = np.count_nonzero(a | b)
    return np.count_nonzero(a & b) / union if union else 1.0


def intersection_over_union(confusion: np.ndarray) -> np.ndarray:
    """IoU of each class, n_cc / (sum_j n_cj + sum_i n_ic - n_cc): float64 [K]; NaN for classes that never occur.

    confusion: n [K, K], numbers of pixels by true (row) and predicted (column) class.
    """
    true, predicted, right = confusion.sum(1), confusion.sum(0), confusion.diagonal()
    return np.where(true > 0, right / np.maximum(true + predicted - right, 1), np.nan)


def mean_average_precision(
    ranks: np.ndarray, positives: Sequence[np.ndarray], passed: Sequence[np.ndarray], ks: Sequence[int]
) -> dict[str, float]:
    """mAP and mean precision at k in percent, over the queries that have positives (`utils.py:735`).

    If the last positive of a query has a rank below k, its precision is taken there.

    Args:
        ranks: [queries, n], rows of the database in order of retrieval.
        positives: rows of the positives of each query.
        passed: rows to ignore for each query; they are removed from its ranks unless they are positives.
        ks: numbers of first results.

    Returns:
        {"mAP": 43.1, "mP@1": 80.0, ...}, empty if no query has a positive.
    """
    found: list[list[float]] = []
    for order, right, neither in zip(ranks, positives, passed, strict=True):
        if not len(right):
            continue
        hits = np.isin(order, right)
        places = np.flatnonzero(hits[hits | ~np.isin(order, neither)])
        depths = [min(places.max() + 1, k) for k in ks]
        precisions = [np.count_nonzero(places < depth) / depth for depth in depths]
        found.append([average_precision(places, len(right)), *precisions])
    if not found:
        return {}
    return dict(zip(("mAP", *(f"mP@{k}" for k in ks)), (100 * np.mean(found, axis=0)).tolist(), strict=True))
