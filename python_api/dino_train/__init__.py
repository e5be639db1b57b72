"""Pretraining with DINO on `dino_kernels`, and what became of it: `load_backbone`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dino_train.models.weights import load_backbone

__all__ = ["load_backbone"]


def __getattr__(name: str) -> Any:
    if name != "load_backbone":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from dino_train.models.weights import load_backbone  # torch, and all the rest: only for who asks

    return load_backbone
