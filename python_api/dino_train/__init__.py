"""DINO pretraining on `dino_kernels`; `load_backbone` reads the trained backbones."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dino_kernels import __version__
    from dino_train.models.weights import load_backbone

__all__ = ["__version__", "load_backbone"]


def __getattr__(name: str) -> Any:
    """Both import torch, which takes seconds: on first use only."""
    if name == "__version__":
        from dino_kernels import __version__

        return __version__
    if name == "load_backbone":
        from dino_train.models.weights import load_backbone

        return load_backbone
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
