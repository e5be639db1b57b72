"""Decoding of image files, and the reason if it fails."""

import ctypes
import logging
import re
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from dino_kernels import PixelScale
from dino_train.common.views import View, levels_of
from dino_train.data.deep import decode_deep, open_8_bit

try:
    import simplejpeg
except ImportError:  # Pillow decodes the same pixels, more slowly
    simplejpeg = None

# Libraries warn without a file's name, of large images and damaged EXIF for one; what matters is raised, and reported
# with the name. libtiff, which Pillow loads, prints errors that Pillow raises too.
warnings.filterwarnings("ignore", module=r"(PIL|pydicom|numpy\.lib)\.")
for _library in ("PIL", "tifffile", "pydicom"):
    logging.getLogger(_library).setLevel(logging.CRITICAL)
with suppress(AttributeError, OSError):  # a Pillow without libtiff
    ctypes.CDLL(Image.core.__file__).TIFFSetErrorHandler(None)


T = TypeVar("T")


class UnreadableImage(ValueError):
    """One image cannot be read: its name and a reason in one line."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def decode(data: bytes) -> np.ndarray:
    """Pixels of an image file: uint8 [H, W, 3], RGB.

    The EXIF orientation is applied (the reference ignores it). Alpha is dropped, as by Pillow's convert("RGB"). Images
    of more than 8 bits are scaled from their own finite minimum..maximum to 0..255 (a set of such images is read by
    `decode_deep`). Almost any exception may be raised: see `reason`.
    """
    if jpeg_size(data):
        with suppress(ValueError):  # Pillow reports damage, or accepts the file
            return simplejpeg.decode_jpeg(data, "RGB")
    if not data:
        raise ValueError("empty file")
    image = open_8_bit(data)
    if image is None:
        values = decode_deep(data, 3)
        return values if values.dtype == np.uint8 else _to_8_bit(values)
    image.load()
    with suppress(Exception):  # damaged EXIF does not make the image unreadable
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "F" or image.mode.startswith("I"):  # convert() would clip these at 255
        image = Image.fromarray(_to_8_bit(np.asarray(image)))
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def load_view(data: bytes, scale: PixelScale) -> View:
    """What evaluations see of an image file."""
    if scale.is_8_bit_rgb:
        return Image.fromarray(decode(data))
    return levels_of(decode_deep(data, scale.channels), scale)


def decode_smaller(data: bytes, shrink: float) -> np.ndarray:
    """Decode a file that has a `jpeg_size`, also above Pillow's limit, at reduced size: each side times k / 8, with the
    smallest k in 1 .. 4 such that k / 8 >= 1 / shrink. Faster, and slightly different from a resize of the full image.
    """
    height, width = jpeg_size(data, any_size=True)  # type: ignore[misc]
    least = {"min_height": int(np.ceil(height / shrink)), "min_width": int(np.ceil(width / shrink)), "min_factor": 2}
    return simplejpeg.decode_jpeg(data, "RGB", **least)


def jpeg_size(data: bytes, any_size: bool = False) -> tuple[int, int] | None:
    """(height, width) of a JPEG that libjpeg-turbo decodes to the same bytes as Pillow. None for files that Pillow must
    decode: with EXIF, in CMYK, or unless `any_size` with more pixels than it warns of; and without simplejpeg."""
    if simplejpeg is None or not data.startswith(b"\xff\xd8") or _has_exif(data):
        return None
    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    fits = any_size or height * width <= (Image.MAX_IMAGE_PIXELS or 0)
    return (height, width) if fits and colors in ("YCbCr", "Gray") else None


def _has_exif(data: bytes) -> bool:
    """Whether a JPEG has an EXIF segment before its image data. As Pillow does, skips fill bytes before a marker."""
    at = 2
    while (at := data.find(b"\xff", at)) >= 0 and (marker := data[at + 1 : at + 2]) != b"\xda":
        if marker == b"\xe1" and data[at + 4 : at + 10] == b"Exif\0\0":
            return True
        at += 1 if marker in (b"\xff", b"\0") else 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return False


def load_file(path: Path) -> Image.Image:
    """One image file, decoded; raises UnreadableImage."""
    return Image.fromarray(decoded(str(path), path.read_bytes, decode))


def decoded(name: str, read: Callable[[], bytes], decoder: Callable[[bytes], T]) -> T:
    """What the decoder makes of the bytes that `read` returns; any exception is raised as an UnreadableImage of that
    name."""
    try:
        return decoder(read())
    except Exception as error:  # damaged files raise almost any exception: struct.error, zlib.error, ...
        raise UnreadableImage(name, reason(error)) from error


def _to_8_bit(gray: np.ndarray) -> np.ndarray:
    """Values of more than 8 bits, of any shape, to uint8."""
    gray = gray.astype(np.float64)
    finite = gray[np.isfinite(gray)]
    if not finite.size:
        raise ValueError("no finite pixel")
    low, high = finite.min(), finite.max()
    gray = np.nan_to_num(gray, nan=low, posinf=high, neginf=low)
    return np.round((gray - low) * (255 / ((high - low) or 1))).astype(np.uint8)


def limit_pixels(megapixels: float) -> None:
    """Images of more are not decoded by this process, but for JPEGs that are shrunk."""
    Image.MAX_IMAGE_PIXELS = max(1, round(megapixels * 1e6 / 2))  # it warns of these, and refuses twice as many


def reason(error: Exception) -> str:
    """Why a file could not be read or decoded, in a few words."""
    text = (str(error).splitlines() or [""])[0] or type(error).__name__
    if isinstance(error, UnidentifiedImageError):
        return "not an image that Pillow reads"
    if isinstance(error, Image.DecompressionBombError):
        pixels, limit = (int(number) / 1e6 for number in re.findall(r"\d+", text)[:2])
        return (
            f"{pixels:.4g} megapixels, at most {limit:.4g} are decoded: cut it into tiles, or shrink it by "
            "dino-train pack --max-megapixels"
        )
    if isinstance(error, MemoryError):
        return "not enough memory to decode it"
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read ({error.strerror})"
    if "truncated" in text.lower():
        return "truncated"
    return text if isinstance(error, ValueError | RuntimeError) else f"damaged ({text})"
