"""Options that several commands share."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dino_train.common.device import pick_device
from dino_train.models.weights import ALL_ARCHS, Trained, load_trained


def require_least(options: object, **least: int) -> None:
    """ValueError if one of these options, unless None, is below the number given here."""
    for name, number in least.items():
        value = getattr(options, name)
        if value is not None and value < number:
            raise ValueError(f"{name} must be at least {number}, got {value}")


@dataclass(kw_only=True)
class WeightsOptions:
    """Where a trained backbone comes from."""

    checkpoint: Path
    """A run's folder, a checkpoint, or a file of published weights."""
    arch: Literal[ALL_ARCHS] | None = None  # type: ignore[valid-type]
    """Backbone that the weights must be of. Default: what they are of."""
    patch_size: int | None = None
    """Side of a ViT's patch, in pixels, that the weights must be of. Default: what they are of."""
    net: Literal["auto", "teacher", "student"] = "auto"
    """Which of the two networks. auto: the one that the method evaluates, the teacher of DINO and iBOT, else the
    student."""
    allow_partial: bool = False
    """Load the weights that match and warn of the others, in place of an error."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU if there is one."""

    def load(self) -> Trained:
        return load_trained(
            self.checkpoint,
            arch=self.arch,
            patch_size=self.patch_size,
            net=self.net,
            allow_partial=self.allow_partial,
            device=pick_device(self.device),
        )
