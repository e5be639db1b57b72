"""How good a backbone is: one file a protocol, each with its command `dino-train evaluate <protocol>`.

`protocol` has what the commands share, `features` the extraction and its cache, `metrics` the numbers.
"""

from .knn import knn_accuracy, view_retrieval

__all__ = ["knn_accuracy", "view_retrieval"]
