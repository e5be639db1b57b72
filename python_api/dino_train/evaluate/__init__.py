"""Evaluation of a backbone: one file per protocol, each with its command `dino-train evaluate <protocol>`.

`protocol` has the common options of the commands, `features` the extraction and its cache, `metrics` the metrics.
"""

from .knn import knn_accuracy, view_retrieval

__all__ = ["knn_accuracy", "view_retrieval"]
