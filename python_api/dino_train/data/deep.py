"""Images of other channels and depths than 8-bit RGB: TIFF, PNG, .npy and DICOM as they are."""

import importlib
import io
import logging
from contextlib import suppress
from types import ModuleType

import numpy as np
from PIL import Image, ImageOps

from dino_kernels import PixelScale
from dino_train.common.views import View, levels_of
from dino_train.data.decode import decode

_LUMA = np.array([0.299, 0.587, 0.114])
_KEPT = (np.uint8, np.uint16, np.float32)


def load_view(data: bytes, scale: PixelScale) -> View:
    """What evaluations see of an image file."""
    if scale.is_8_bit_rgb:
        return Image.fromarray(decode(data))
    return levels_of(decode_deep(data, scale.channels), scale)


def decode_deep(data: bytes, channels: int) -> np.ndarray:
    """Values of an image file: uint8, uint16 or float32 [H, W, channels], as the file has them.

    Gray becomes RGB by repetition, RGB gray by its luma, and a fourth channel beyond RGB is left out; other numbers of
    channels are an error. Integers of more than 16 bits, signed ones and float64 become float32. Almost any exception
    may be raised.
    """
    values = _with_channels(read_values(data), channels)
    if values.dtype == bool:
        return np.ascontiguousarray(values) * np.uint8(255)
    return np.ascontiguousarray(values, None if values.dtype in _KEPT else np.float32)


def read_values(data: bytes) -> np.ndarray:
    """Values of an image file [H, W, C] of its own dtype, or [C, H, W] of an .npy file that holds that."""
    if not data:
        raise ValueError("empty file")
    if data.startswith(b"\x93NUMPY"):
        values = np.load(io.BytesIO(data), allow_pickle=False)
        if values.ndim not in (2, 3) or values.dtype.kind not in "buif":
            raise ValueError(f"expected numbers [H, W] or [H, W, C], got {values.dtype} {list(values.shape)}")
        return values if values.ndim == 3 else values[..., None]
    if data[128:132] == b"DICM":
        return _dicom(data)
    if data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+") and (tifffile := _optional("tifffile")):
        return _tiff(data, tifffile)
    if data.startswith(b"\x89PNG") and data[24] == 16 and data[25] in (2, 4, 6):  # Pillow keeps 8 of the 16 bits
        return _require("imagecodecs", "a PNG of several channels of 16 bits").png_decode(data)
    image: Image.Image = Image.open(io.BytesIO(data))
    image.load()
    with suppress(Exception):  # damaged EXIF does not make the image unreadable
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode not in ("1", "L", "F", "RGB", "RGBA") and not image.mode.startswith("I"):
        image = image.convert("RGB")
    values = np.asarray(image)
    return values if values.ndim == 3 else values[..., None]


def _tiff(data: bytes, tifffile: ModuleType) -> np.ndarray:
    """Bands and pages of one size become channels."""
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what matters is raised
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        series = file.series[0]
        try:
            values = series.asarray()
        except ImportError as error:  # a compression that needs imagecodecs
            raise ValueError(f"{error}: pip install imagecodecs") from error
        sides = [series.axes.index(axis) for axis in "YX"]
    rest = [axis for axis in range(values.ndim) if axis not in sides]
    return values.transpose(*sides, *rest).reshape(*(values.shape[axis] for axis in sides), -1)


def _dicom(data: bytes) -> np.ndarray:
    """In the unit that the file says (Hounsfield, for one); of MONOCHROME1 the negative, so that white is high."""
    pydicom = _require("pydicom", "DICOM")
    file = pydicom.dcmread(io.BytesIO(data))
    values = importlib.import_module("pydicom.pixels").apply_modality_lut(file.pixel_array, file)
    values = -values.astype(np.float32) if file.get("PhotometricInterpretation") == "MONOCHROME1" else values
    return values if values.ndim == 3 else values[..., None]


def _with_channels(values: np.ndarray, channels: int) -> np.ndarray:
    found = values.shape[2]
    if found == channels:
        return values
    if values.shape[0] == channels:  # an .npy file of [C, H, W]
        return values.transpose(1, 2, 0)
    if found == 1 and channels == 3:
        return values.repeat(3, 2)
    if found == 2 and channels in (1, 3):  # gray and alpha
        return values[..., :1].repeat(channels, 2)
    if found == 4 and channels == 3:
        return values[..., :3]
    if found in (3, 4) and channels == 1:
        luma = values[..., :3] @ _LUMA
        return (np.rint(luma) if values.dtype.kind in "ui" else luma).astype(values.dtype)[..., None]
    raise ValueError(f"the image has {found} channels, expected {channels} (--channels)")


def _optional(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def _require(name: str, what: str) -> ModuleType:
    module = _optional(name)
    if module is None:
        raise ValueError(f"{what} needs a package to be read: pip install {name}")
    return module
