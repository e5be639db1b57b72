"""What the values of images mean, and ImageNet's mean and standard deviation."""

from collections.abc import Sequence

from dino_kernels import PixelScale

# Per RGB channel, for pixels in [0, 1] (main_dino.py:428)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def pixel_scale(
    channels: int = 3, value_range: Sequence[float] = (), mean: Sequence[float] = (), std: Sequence[float] = ()
) -> PixelScale:
    """The scale of settings: value_range is black and white of all channels, or of each one after the other; mean and
    std, of values in 0 .. 1, are of all channels or of each. Empty: 0 and 255; those of ImageNet for three channels,
    else 0.5 and 0.25.

    Raises:
        ValueError: a number of values that does not fit the channels, or as `PixelScale`.
    """
    bounds = _each(value_range or (0.0, 255.0), 2 * channels, "value_range", 2)
    if channels == 3 and not mean and not std:
        mean, std = IMAGENET_MEAN, IMAGENET_STD
    means, deviations = _each(mean or (0.5,), channels, "mean"), _each(std or (0.25,), channels, "std")
    return PixelScale(bounds[::2], bounds[1::2], means, deviations)


def _each(values: Sequence[float], count: int, name: str, together: int = 1) -> tuple[float, ...]:
    if len(values) not in (together, count):
        raise ValueError(f"{name} must have {together} or {count} values for these channels, got {len(values)}")
    return tuple(float(value) for value in values) * (count // len(values))
