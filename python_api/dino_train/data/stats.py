"""What a set of images holds: depth, range, mean and deviation of its channels, sizes, damage and duplicates."""

import io
import logging
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np
from PIL import Image

from dino_kernels import PixelScale
from dino_train.common.scale import pixel_scale, ranges_of
from dino_train.common.views import as_picture, levels_of
from dino_train.data.decode import UnreadableImage, decoded
from dino_train.data.deep import NeedsPackage, decode_deep, open_8_bit, read_values
from dino_train.data.folder import DataError, ImageFolder
from dino_train.data.threads import in_order

GRID, VALUES = 64, 20_000_000  # pixels a side of an image that are taken, and values in all at most
LOOKED_AT = 16  # images whose dtype and channels are found before
SAMPLE = 256  # images that a run measures by itself
# Ends of the range: outliers, such as metal in X-rays, are beyond.
PERCENTILES = (0.1, 99.9)
FEW_LEVELS = 32

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stats:
    """Of a set of images.

    value_range: low and high of each channel, one after the other; robust to outliers and without a value that stands
    for missing data. mean, std: of each channel within that range, as fractions of it. levels: fewest different values
    of a channel. nodata: of each channel, the value left out, or None. duplicates: groups of names that look the same.
    """

    channels: int
    value_range: tuple[float, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    minimum: tuple[float, ...]
    maximum: tuple[float, ...]
    nodata: tuple[float | None, ...]
    levels: int
    dtypes: dict[str, int]
    images: int
    smallest: tuple[int, int]
    largest: tuple[int, int]
    unreadable: dict[str, str]
    duplicates: list[list[str]]

    @property
    def scale(self) -> PixelScale:
        return PixelScale(self.value_range[::2], self.value_range[1::2], self.mean, self.std)

    def lines(self) -> list[str]:
        """To be read."""
        height, width = self.smallest
        sizes = f"{width} x {height}"
        if self.smallest != self.largest:
            sizes += f" to {self.largest[1]} x {self.largest[0]}"
        lines = [f"{self.images} images of {sizes} pixels, {self.channels} channels, {', '.join(self.dtypes)}"]
        scale = self.scale
        for c in range(self.channels):
            missing = "" if self.nodata[c] is None else f", missing data {self.nodata[c]:g}"
            lines.append(
                f"channel {c}: {self.minimum[c]:g} to {self.maximum[c]:g}, scaled from {scale.low[c]:g} to "
                f"{scale.high[c]:g}, mean {self.mean[c]:.3f}, deviation {self.std[c]:.3f}{missing}"
            )
        if self.levels < FEW_LEVELS:
            lines.append(f"only {self.levels} different values in a channel: were they made of fewer bits?")
        named = [f"{name} ({why})" for name, why in self.unreadable.items()]
        lines.append(_counted(named, "unreadable"))
        lines.append(_counted([" = ".join(group) for group in self.duplicates], "groups that look the same"))
        return lines

    def plain(self) -> dict[str, Any]:
        return asdict(self)


def _counted(found: list[str], what: str) -> str:
    return f"{len(found)} {what}" + (": " + ", ".join(found[:3]) + (", ..." if len(found) > 3 else "") if found else "")


@dataclass
class _Seen:
    """Of one image: some of its values [n, C], dtype, (height, width) and a hash of what it looks like."""

    values: np.ndarray
    dtype: str
    size: tuple[int, int]
    look: bytes


def _spaced(images: ImageFolder, most: int) -> list[int]:
    """Indices of `most` images, evenly spaced, or of all."""
    return np.linspace(0, len(images) - 1, min(most, len(images))).round().astype(int).tolist()


def is_deep(images: ImageFolder) -> bool:
    """Whether some of the images, 16 evenly spaced, have other values than 8 bits. Logs how many of them have more
    pages or channels than RGB has."""
    deep, more = False, Counter[str]()
    some = _spaced(images, LOOKED_AT)
    for i in some:
        if images.names[i].lower().endswith((".jpg", ".jpeg", ".bmp")):
            continue
        try:
            data = images.read(i)
            image = open_8_bit(data)
            more["several pages or frames, of which the first is used"] += getattr(image, "is_animated", False)
            values = read_values(data)
        except NeedsPackage as error:
            if image is None:
                raise DataError(f"{images.path}: {images.names[i]}: {error}") from error
            continue
        except Exception:  # reported when it is to be trained on
            continue
        deep |= values.dtype not in (np.uint8, bool)
        if (found := values.shape[2]) == 4 and not _alpha(data):
            more["a fourth channel, which is left out (pretrain --channels 4 takes it)"] += 1
        elif found > 4:
            more[f"{found} channels (pretrain --channels {found} takes them)"] += 1
    for what, count in (+more).items():
        logger.warning("%s: of %d images looked at, %d have %s", images.path, len(some), count, what)
    return deep


def _alpha(data: bytes) -> bool:
    with suppress(Exception):
        return Image.open(io.BytesIO(data)).mode == "RGBA"
    return False


def channels_of(images: ImageFolder) -> int:
    """Of most of 16 evenly spaced images, without alpha; 3 if some are RGB and most are gray."""
    counts = Counter[int]()
    for i in _spaced(images, LOOKED_AT):
        try:
            values = read_values(images.read(i))
        except Exception:  # reported by `measure`
            continue
        found = values.shape[2]
        counts[found - (values.dtype in (np.uint8, bool) and found in (2, 4))] += 1
    most = counts.most_common(1)[0][0] if counts else 3
    return 3 if most == 1 and 3 in counts else most


def measure(
    images: ImageFolder,
    channels: int,
    num_workers: int,
    indices: Sequence[int] | None = None,
    *,
    value_range: Sequence[float] = (),
    looks: bool = True,
) -> Stats:
    """Read the images at `indices`, or all.

    value_range: known in advance. looks: find what looks the same.

    Raises:
        DataError: none can be read.
    """

    order = range(len(images)) if indices is None else indices
    side = max(4, min(GRID, int((VALUES / (len(order) * channels)) ** 0.5)))

    def see(i: int) -> _Seen | UnreadableImage:
        try:
            name = images.prefix + images.names[i]
            values = decoded(name, lambda: images.read(i), partial(decode_deep, channels=channels))
        except UnreadableImage as error:
            return error
        rows, columns = (np.linspace(0, n - 1, min(n, side)).astype(int) for n in values.shape[:2])
        some = values[rows][:, columns].reshape(-1, channels).astype(np.float32)
        return _Seen(some, str(values.dtype), values.shape[:2], _look(values, some) if looks else b"")

    found = list(zip(order, in_order(see, order, threads=num_workers, ahead=4 * num_workers), strict=True))
    seen = [(images.names[i], one) for i, one in found if isinstance(one, _Seen)]
    bad = [one for _, one in found if isinstance(one, UnreadableImage)]
    if not seen:
        raise DataError(f"none of {len(found)} images in {images.path} could be read, the first: {bad[0]}")
    values = np.concatenate([one.values for _, one in seen])
    dtypes = Counter(one.dtype for _, one in seen)
    bits = set(dtypes) <= {"uint8"}
    ranges = [_range(values[:, c], bits) for c in range(channels)]
    if value_range:
        known = pixel_scale(channels, value_range)
        ranges = [(low, high, None) for low, high in zip(known.low, known.high, strict=True)]
    finite = np.where(np.isfinite(values), values, np.nan)
    finite[:, np.isnan(finite).all(0)] = 0
    sizes = [one.size for _, one in seen]
    alike = [[name for name, _ in group] for look, group in groupby(sorted(seen, key=_by_look), key=_by_look) if look]
    stats = Stats(
        channels=channels,
        value_range=tuple(bound for low, high, _ in ranges for bound in (low, high)),
        mean=(0.5,) * channels,
        std=(1.0,) * channels,
        minimum=tuple(np.nanmin(finite, axis=0).tolist()),
        maximum=tuple(np.nanmax(finite, axis=0).tolist()),
        nodata=tuple(nodata for _, _, nodata in ranges),
        levels=min(len(np.unique(values[:, c])) for c in range(channels)),
        dtypes=dict(dtypes),
        images=len(seen),
        smallest=min(sizes, key=np.prod),
        largest=max(sizes, key=np.prod),
        unreadable={error.name: error.reason for error in bad},
        duplicates=[sorted(group) for group in alike if len(group) > 1],
    )
    fractions = levels_of(values, stats.scale).astype(np.float64) / 255
    mean, std = fractions.mean(0), np.maximum(fractions.std(0), 1e-3)
    return replace(stats, mean=tuple(mean.round(6).tolist()), std=tuple(std.round(6).tolist()))


def _range(values: np.ndarray, bits: bool) -> tuple[float, float, float | None]:
    """Low and high of a channel, and a value that stands for missing data: one at an end, of more than a thousandth of
    the pixels, that is further from the others than these are from each other."""
    if bits:
        return 0.0, 255.0, None
    values = np.sort(values[np.isfinite(values)])
    if not len(values):
        return 0.0, 1.0, None
    nodata = None
    for end in (values[0], values[-1]):
        others = values[values != end]
        if 1000 * (len(values) - len(others)) < len(values) or len(others) < 2:
            continue
        low, high = np.percentile(others, PERCENTILES)
        if low < high and min(abs(end - low), abs(end - high)) > high - low:
            nodata, values = float(end), others
    low, high = (float(bound) for bound in np.percentile(values, PERCENTILES))
    return low, high if np.float32(high) > np.float32(low) else low + max(1.0, 1e-3 * abs(low)), nodata


def _look(values: np.ndarray, some: np.ndarray) -> bytes:
    """A hash of brightness differences on a grid of 16 x 16, equal for copies in another size or compression; empty of
    an image without any."""
    finite = some[np.isfinite(some)]
    if not len(finite) or finite.min() == finite.max():
        return b""
    scale = pixel_scale(values.shape[2], (float(finite.min()), float(finite.max())))
    gray = np.asarray(as_picture(levels_of(values, scale)).convert("L").resize((17, 16)))
    return np.packbits(gray[:, 1:] > gray[:, :-1]).tobytes()


def _by_look(item: tuple[str, _Seen]) -> bytes:
    return item[1].look


def suited(images: ImageFolder, scale: PixelScale, num_workers: int) -> PixelScale:
    """The scale of a backbone, or for 8-bit RGB and images of more bits one with their own range, which is said."""
    if not scale.is_8_bit_rgb:
        if max(scale.high) > 255 and not is_deep(images):
            logger.warning("%s: images of 8 bits, and the network knows values up to %g", images.path, max(scale.high))
        return scale
    stats = sampled(images, scale.channels, num_workers)
    return PixelScale(stats.scale.low, stats.scale.high, scale.mean, scale.std) if stats else scale


def sampled(images: ImageFolder, channels: int, num_workers: int, value_range: Sequence[float] = ()) -> Stats | None:
    """`measure` of some images, evenly spaced, and a log of the range found; None if they are 8-bit RGB."""
    if channels == 3 and not is_deep(images):
        return None
    some = _spaced(images, SAMPLE)
    stats = measure(images, channels, num_workers, some, value_range=value_range, looks=False)
    missing = {value for value in stats.nodata if value is not None}
    logger.warning(
        "%s: values of %s, by %d of the images scaled from %s%s (dino-train stats measures all)",
        images.path,
        " and ".join(stats.dtypes),
        len(some),
        ranges_of(stats.scale),
        f", without {', '.join(f'{value:g}' for value in sorted(missing))} as missing data" if missing else "",
    )
    if len(stats.dtypes) > 1:
        logger.warning("%s: the range is one of all types: those of fewer bits may be nearly black", images.path)
    if stats.levels < FEW_LEVELS:
        logger.warning(
            "%s: only %d different values: were the images converted to fewer bits?", images.path, stats.levels
        )
    return stats
