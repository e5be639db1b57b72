"""Images of other channels and depths than 8-bit RGB: TIFF, PNG, .npy and DICOM as they are."""

import importlib
import io
from collections.abc import Callable
from contextlib import suppress
from types import ModuleType

import numpy as np
from PIL import Image, ImageOps

from dino_train.common.views import with_channels

_KEPT = (np.uint8, np.uint16, np.float32)
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_BITS, _ORIENTATION, _SAMPLES, _FORMAT = 258, 274, 277, 339  # tags of TIFF
_MIN_IS_WHITE, _PILLOWS = 0, (3, 5, 6)  # palette, CMYK and YCbCr, which Pillow converts


# What an orientation of TIFF and EXIF asks for.
_UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: np.fliplr,
    3: lambda values: np.rot90(values, 2),
    4: np.flipud,
    5: lambda values: values.swapaxes(0, 1),
    6: lambda values: np.rot90(values, -1),
    7: lambda values: np.rot90(values, 2).swapaxes(0, 1),
    8: np.rot90,
}


class NeedsPackage(ValueError):
    """A library that is not installed reads the file."""


def open_8_bit(data: bytes) -> Image.Image | None:
    """A file of 8-bit gray, palette, RGB or CMYK, opened by Pillow; None if it has other values. Almost any exception
    may be raised."""
    if data.startswith(b"\x93NUMPY") or data[128:132] == b"DICM":
        return None
    if data.startswith(b"\x89PNG") and data[24:25] == b"\x10":
        return None
    try:
        image = Image.open(io.BytesIO(data))
        tags = image.tag_v2 if data[:4] in _TIFF else {}  # type: ignore[attr-defined]
        deep = max(tags.get(_BITS, (1,))) > 8 or tags.get(_SAMPLES, 1) > 4 or set(tags.get(_FORMAT, (1,))) != {1}
    except Exception:
        if data[:4] in _TIFF:  # tifffile knows more of them
            return None
        raise
    return None if deep else image


def decode_deep(data: bytes, channels: int) -> np.ndarray:
    """Values of an image file: uint8, uint16 or float32 [H, W, channels], as the file has them.

    Gray becomes RGB by repetition, RGB gray by its luma, and a fourth channel beyond RGB is left out; other numbers of
    channels are an error. Integers of more than 16 bits, signed ones and float64 become float32. Almost any exception
    may be raised.
    """
    with np.errstate(all="ignore"):  # values beyond float32 are infinite, which is allowed for
        values = with_channels(read_values(data, channels), channels)
        if values.dtype == bool:
            return np.ascontiguousarray(values) * np.uint8(255)
        return np.ascontiguousarray(values, None if values.dtype in _KEPT else np.float32)


def read_values(data: bytes, channels: int | None = None) -> np.ndarray:
    """Values of an image file [H, W, C] of its own dtype. channels: those expected, which tell [C, H, W] of an .npy
    file from [H, W, C]; without them the shorter axis of at most 16 is C."""
    if not data:
        raise ValueError("empty file")
    if data.startswith(b"\x93NUMPY"):
        values = _numpy(data, channels)
    elif data[128:132] == b"DICM":
        values = _dicom(data)
    elif data[:4] in _TIFF:
        values = _tiff(data, tifffile) if (tifffile := _optional("tifffile")) else _small_tiff(data)
    elif data.startswith(b"\x89PNG") and data[24:26] in (b"\x10\2", b"\x10\4", b"\x10\6"):  # Pillow keeps 8 of 16 bits
        values = _require("imagecodecs", "a PNG of several channels of 16 bits").png_decode(data)
    else:
        values = _pillow(data)
    if not values.size:
        raise ValueError(f"it has no pixels, shape {list(values.shape)}")
    if values.dtype.kind not in "buif":
        raise ValueError(f"expected real numbers, got {values.dtype}")
    return values if values.ndim == 3 else values[..., None]


def _numpy(data: bytes, channels: int | None) -> np.ndarray:
    values = np.load(io.BytesIO(data), allow_pickle=False)
    if values.ndim not in (2, 3):
        raise ValueError(f"expected numbers [H, W] or [H, W, C], got {values.dtype} {list(values.shape)}")
    if values.ndim == 3:
        first, _, last = values.shape
        if (last != channels and first == channels) if channels else (first <= 16 < last):
            return values.transpose(1, 2, 0)
    return values


def _pillow(data: bytes) -> np.ndarray:
    image: Image.Image = Image.open(io.BytesIO(data))
    image.load()
    with suppress(Exception):  # damaged EXIF does not make the image unreadable
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode not in ("1", "L", "LA", "F", "RGB", "RGBA") and not image.mode.startswith("I"):
        image = image.convert("RGB")
    return np.asarray(image)


def _small_tiff(data: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(data))
    bits = image.tag_v2.get(_BITS, ())  # type: ignore[attr-defined]
    if getattr(image, "is_animated", False) or (len(bits) > 1 and max(bits) > 8):
        raise NeedsPackage(
            "a TIFF of several pages, or of several channels of more than 8 bits, needs a package: pip install tifffile"
        )
    return _pillow(data)


def _tiff(data: bytes, tifffile: ModuleType) -> np.ndarray:
    """Bands and pages of one size become channels. What is alone and of 8 bits is left to Pillow, which knows more
    compressions and colors."""
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        places = set[int]()
        for page in file.pages:  # each names the next one; tifffile would follow a circle for ever
            if page.offset in places:
                raise ValueError("damaged (its pages form a circle)")
            places.add(page.offset)
        series = file.series[0]
        page = series.keyframe
        photometric, tag = int(page.photometric), page.tags.get(_ORIENTATION)
        usual = page.samplesperpixel <= 4 and 0 not in page.extrasamples  # no fourth band but alpha
        of_8_bits = np.max(page.bitspersample) <= 8 and page.sampleformat == 1
        if photometric in _PILLOWS or (len(series.pages) == 1 and usual and of_8_bits):
            return _pillow(data)
        try:
            values = series.asarray()
        except ImportError as error:  # a compression
            raise NeedsPackage(f"{error}: pip install imagecodecs") from error
        except ValueError as error:
            if "imagecodecs" in str(error):
                raise NeedsPackage(str(error)) from error
            raise
        sides = [series.axes.index(axis) for axis in "YX"]
    rest = [axis for axis in range(values.ndim) if axis not in sides]
    values = values.transpose(*sides, *rest).reshape(*(values.shape[axis] for axis in sides), -1)
    values = _UPRIGHT.get(int(getattr(tag, "value", 1)), np.asarray)(values)
    if photometric == _MIN_IS_WHITE and values.dtype.kind == "u":
        values = np.iinfo(values.dtype).max - values
    return values


def _dicom(data: bytes) -> np.ndarray:
    """In the unit that the file says (Hounsfield, for one); of MONOCHROME1 the negative, so that white is high."""
    pydicom = _require("pydicom", "DICOM")
    file = pydicom.dcmread(io.BytesIO(data))
    if int(file.get("NumberOfFrames") or 1) > 1:
        raise ValueError(f"it has {file.NumberOfFrames} frames: save each as an image")
    values = importlib.import_module("pydicom.pixels").apply_modality_lut(file.pixel_array, file)
    return -values.astype(np.float32) if file.get("PhotometricInterpretation") == "MONOCHROME1" else values


def _optional(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def _require(name: str, what: str) -> ModuleType:
    module = _optional(name)
    if module is None:
        raise NeedsPackage(f"{what} needs a package to be read: pip install {name}")
    return module
