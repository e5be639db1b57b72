"""The numbers that protocols report, as functions of scores, ranks and masks."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor


def label_ranks(scores: Tensor, labels: Tensor) -> Tensor:
    """Place of each row's label among the classes by falling score, from 1: int64 [n].

    A label that shares its score with others is ranked after them: a class without a vote is not predicted. NaN is
    last.

    Args:
        scores: [n, classes]. labels: [n] int64, 0 to classes - 1.
    """
    return scores.shape[1] - (scores < scores.gather(1, labels[:, None])).sum(dim=1)


def accuracy(ranks: Tensor) -> dict[str, float]:
    """Percent of `label_ranks` that are 1 ("top1") or at most 5 ("top5", which is 100 with up to five classes)."""
    return {f"top{k}": 100 * int((ranks <= k).sum()) / len(ranks) for k in (1, 5)}


def average_precision(ranks: Sequence[int] | np.ndarray, positives: int) -> float:
    """Area under the precision-recall curve by trapezoids, as the Oxford buildings' evaluation has it (`utils.py:703`).

    AP = 1/P sum_j (p(r_j) + p(r_j + 1)) / 2, with p(r) the precision among the first r results and p(0) = 1.

    Args:
        ranks: increasing places r_j, from 0, at which positive images were retrieved.
        positives: how many there are, P >= 1; those that were not retrieved count 0.
    """
    ranks = np.asarray(ranks, dtype=np.float64)
    found = np.arange(len(ranks))
    before = np.where(ranks == 0, 1.0, found / np.maximum(ranks, 1))
    return float(((before + (found + 1) / (ranks + 1)) / 2).sum() / positives)


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two bool arrays of one shape, in [0, 1]; 1 where both are empty."""
    union = np.count_nonzero(a | b)
    return np.count_nonzero(a & b) / union if union else 1.0


def mean_average_precision(
    ranks: np.ndarray, positives: Sequence[np.ndarray], passed: Sequence[np.ndarray], ks: Sequence[int]
) -> dict[str, float]:
    """mAP and mean precision at k in percent, over the queries that have positives (`utils.py:735`).

    The precision of a query at k is taken at its last positive, if that comes before k.

    Args:
        ranks: [queries, n], rows of the database in the order in which they were retrieved.
        positives: of each query, its rows.
        passed: of each query, rows that are taken out of its ranks, neither right nor wrong, where not positive too.
        ks: numbers of first results.

    Returns:
        {"mAP": 43.1, "mP@1": 80.0, ...}, empty where no query has a positive.
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
