"""DINO pretraining on `dino_kernels`: `pretrain` a `PretrainConfig`; `load_backbone` reads the trained backbones."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dino_kernels import __version__
    from dino_train.config.pretrain import PretrainConfig
    from dino_train.engine.train import pretrain
    from dino_train.models.weights import load_backbone

__all__ = ["PretrainConfig", "__version__", "load_backbone", "pretrain"]
_PLACES = {
    "PretrainConfig": "dino_train.config.pretrain",
    "__version__": "dino_kernels",
    "load_backbone": "dino_train.models.weights",
    "pretrain": "dino_train.engine.train",
}


def __getattr__(name: str) -> Any:
    """All import torch, which takes seconds: on first use only."""
    if name in _PLACES:
        return getattr(importlib.import_module(_PLACES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
