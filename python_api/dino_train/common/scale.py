"""What the values of images mean, and ImageNet's mean and standard deviation."""

from collections.abc import Mapping, Sequence
from typing import Any

from dino_kernels import PixelScale

# Per RGB channel, for pixels in [0, 1] (main_dino.py:428)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def require_channels(channels: int) -> None:
    """ValueError if images of so many channels are not taken."""
    if not 1 <= channels <= 16:
        raise ValueError(f"channels must be from 1 to 16, got {channels}")


def pixel_scale(
    channels: int = 3, value_range: Sequence[float] = (), mean: Sequence[float] = (), std: Sequence[float] = ()
) -> PixelScale:
    """The scale of settings: value_range is black and white of all channels, or of each one after the other; mean and
    std, of values in 0 .. 1, are of all channels or of each. Empty: 0 and 255; those of ImageNet for three channels,
    else 0.5 and 0.25.

    Raises:
        ValueError: a number of values that does not fit the channels, or as `PixelScale`.
    """
    require_channels(channels)
    bounds = _each(value_range or (0.0, 255.0), 2 * channels, "value_range", 2)
    mean = mean or (IMAGENET_MEAN if channels == 3 else (0.5,))
    std = std or (IMAGENET_STD if channels == 3 else (0.25,))
    return PixelScale(bounds[::2], bounds[1::2], _each(mean, channels, "mean"), _each(std, channels, "std"))


def ranges_of(scale: PixelScale) -> str:
    """What is black and white in each channel, in words."""
    return ", ".join(f"{low:g} to {high:g}" for low, high in zip(scale.low, scale.high, strict=True))


def scale_settings(scale: PixelScale) -> dict[str, tuple[float, ...]]:
    """The settings of which `pixel_scale` makes it; empty for that of 8-bit RGB."""
    if scale == PixelScale():
        return {}
    bounds = tuple(bound for both in zip(scale.low, scale.high, strict=True) for bound in both)
    return {"value_range": bounds, "mean": scale.mean, "std": scale.std}


def scale_of(settings: Mapping[str, Any], channels: int) -> PixelScale:
    """The scale of a checkpoint's settings."""
    return pixel_scale(channels, *(settings.get(name) or () for name in ("value_range", "mean", "std")))


def _each(values: Sequence[float], count: int, name: str, together: int = 1) -> tuple[float, ...]:
    if len(values) not in (together, count):
        raise ValueError(f"{name} must have {together} or {count} values for these channels, got {len(values)}")
    return tuple(float(value) for value in values) * (count // len(values))
