"""One image file -> one small uint8 square, as training sees it. PNG, JPEG, TIFF, BMP and DICOM.

The whole image is squeezed into the square, as the HSL paper does ("resized to 224 × 224"): the aspect ratio is not
kept and nothing is cut off. Shrinking is antialiased. Shapes: (S, S) grey, (S, S, 3) colour; S in px.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from hsl_node.errors import DataError

Array = NDArray[Any]

DECODING_VERSION = 1  # part of every cache's key: raise it when the same file would give other pixels
COLOUR_MIN_SPREAD = 8  # grey levels; JPEG rounding leaves less between the channels of a grey picture stored as RGB
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".dcm", ".dicom"})
_DICOM_MAGIC_AT, _DICOM_MAGIC = 128, b"DICM"

logging.getLogger("pydicom").addHandler(logging.NullHandler())
logging.getLogger("pydicom").propagate = False  # its warnings quote values of the file: names, dates


@dataclass(frozen=True)
class Window:
    """Which grey values become black and white, instead of the file's own choice. Only for more than 8 bits."""

    center: float
    width: float
    shape: str = "LINEAR"  # or SIGMOID, LINEAR_EXACT (DICOM PS3.3, C.11.2.1.2)


class UnreadableImage(DataError):
    """One file cannot be decoded. The message names no file: whoever knows the path adds it for the operator."""


def decode_image(path: Path, size: int, window: Window | None = None) -> Array:
    """One image as it is in the cache: (S, S) grey or (S, S, 3) colour, uint8.

    Raises:
        UnreadableImage: missing, damaged, or of a kind we cannot read.
    """
    return decode_bytes(content_of(path), size, window)


def content_of(path: Path) -> bytes:
    """Raises: UnreadableImage."""
    try:
        return path.read_bytes()
    except OSError as exc:
        raise UnreadableImage(f"cannot be opened: {exc.strerror}") from None


def decode_bytes(content: bytes, size: int, window: Window | None = None) -> Array:
    """As `decode_image`, from the file's content."""
    with _unreadable():
        pixels = _dicom_pixels(content, window) if is_dicom(content) else _picture_pixels(content, window)
        return to_square(pixels, size)


def decode_array(pixels: Array, size: int) -> Array:
    """As `decode_image`, from an array (H, W), (H, W, 1) or (H, W, 3) of an .npz file."""
    with _unreadable():
        if pixels.ndim == 3 and pixels.shape[2] == 1:
            pixels = pixels[:, :, 0]
        return to_square(_as_bytes(pixels, None), size)


def is_dicom(content: bytes) -> bool:
    return content[_DICOM_MAGIC_AT : _DICOM_MAGIC_AT + 4] == _DICOM_MAGIC


def looks_like_dicom(path: Path) -> bool:
    """A file without a suffix counts as an image where it carries the DICOM mark."""
    with open(path, "rb") as file:
        return is_dicom(file.read(_DICOM_MAGIC_AT + 4)) and path.name != "DICOMDIR"


def dicom_patient(content: bytes) -> str | None:
    """The PatientID of a DICOM file, or None. For hashing only: never shown, logged or stored."""
    if not is_dicom(content):
        return None
    with _unreadable():
        pydicom = _pydicom()
        header = pydicom.dcmread(io.BytesIO(content), specific_tags=["PatientID"], stop_before_pixels=True)
        return str(header.get("PatientID", "") or "").strip() or None


def to_square(pixels: Array, size: int) -> Array:
    """(H, W[, 3]) uint8 -> (S, S[, 3]) uint8. Colour whose channels agree everywhere becomes grey."""
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] != 3):
        raise ValueError(f"an image of shape {pixels.shape} and type {pixels.dtype}")
    if min(pixels.shape) == 0:
        raise ValueError("an empty image")
    if pixels.ndim == 3 and _spread(pixels) < COLOUR_MIN_SPREAD:
        pixels = np.ascontiguousarray(pixels[:, :, 1])
    if pixels.shape[:2] == (size, size):
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BILINEAR))


def _spread(pixels: Array) -> int:
    """Largest difference between the channels of one pixel. By channel: `np.ptp` takes 16 times as long."""
    red, green, blue = pixels[:, :, 0], pixels[:, :, 1], pixels[:, :, 2]
    high = np.maximum(np.maximum(red, green), blue)
    return int((high - np.minimum(np.minimum(red, green), blue)).max())


# ---------------------------------------------------------------- pictures


def _picture_pixels(content: bytes, window: Window | None) -> Array:
    image: Image.Image = Image.open(io.BytesIO(content), formats=("PNG", "JPEG", "TIFF", "BMP"))
    frames = getattr(image, "n_frames", 1)
    if frames > 1:
        image.seek(frames // 2)
    image.load()
    if image.format == "JPEG":
        image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _as_bytes(np.asarray(image), window)
    if image.mode in ("1", "L", "LA"):
        return np.asarray(image.convert("L"))
    return np.asarray(image.convert("RGB"))


# ---------------------------------------------------------------- DICOM


def _dicom_pixels(content: bytes, window: Window | None) -> Array:
    """The middle frame, through rescale and window (DICOM PS3.3, C.11.1 and C.11.2), as grey or RGB bytes."""
    pydicom = _pydicom()
    from pydicom.pixels.processing import apply_color_lut, apply_modality_lut
    from pydicom.pixels.utils import pixel_array

    header = pydicom.dcmread(io.BytesIO(content))
    frames = int(header.get("NumberOfFrames", 1) or 1)
    raw: Array = pixel_array(header, index=frames // 2)  # YBR comes back as RGB
    photometric = str(header.PhotometricInterpretation)
    if photometric == "PALETTE COLOR":
        return _as_bytes(apply_color_lut(raw, header), None)
    if raw.ndim == 3:
        return _as_bytes(raw, None)
    window = window or _own_window(header)
    values = apply_modality_lut(raw, header)
    if window is not None:
        grey = _windowed(values, window)
    else:
        padding = header.get("PixelPaddingValue")
        grey = _full_range(values, values[raw != padding] if padding is not None else values)
    return 255 - grey if photometric == "MONOCHROME1" else grey


def _own_window(header: Any) -> Window | None:
    """The first window of the file, if it has one."""
    values = (header.get(tag) for tag in ("WindowCenter", "WindowWidth"))
    try:
        center, width = (float(v[0] if hasattr(v, "append") else v) for v in values)
    except (TypeError, ValueError):  # not there, or empty
        return None
    return Window(center, width, str(header.get("VOILUTFunction") or "LINEAR")) if width > 0 else None


def _windowed(values: Array, window: Window) -> Array:
    """Grey values through a window -> 0..255, rounded to the nearest."""
    x = values.astype(np.float64)
    if window.shape == "SIGMOID":
        unit = 1.0 / (1.0 + np.exp(np.clip(-4.0 * (x - window.center) / window.width, -700.0, 700.0)))
    else:
        exact = window.shape == "LINEAR_EXACT" or window.width < 1  # LINEAR counts whole grey values: width - 1 steps
        center, width = (window.center, window.width) if exact else (window.center - 0.5, window.width - 1)
        low = center - width / 2
        unit = (x - low) / width if width else (x > low).astype(np.float64)
    return (np.clip(unit, 0.0, 1.0) * 255 + 0.5).astype(np.uint8)


def _pydicom() -> Any:
    """pydicom, imported where the first DICOM file turns up: it takes 0.3 s."""
    import pydicom

    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE  # odd values are no reason to refuse
    return pydicom


# ---------------------------------------------------------------- grey values


def _as_bytes(pixels: Array, window: Window | None) -> Array:
    """Any number type -> uint8. Wider than 8 bits: through the window, else the image's own range becomes 0..255."""
    if pixels.dtype == np.uint8:
        return np.ascontiguousarray(pixels)
    if pixels.dtype == np.bool_:
        return pixels.astype(np.uint8) * 255
    if pixels.dtype.kind not in "iuf":
        raise ValueError(f"pixels of type {pixels.dtype}")
    return _windowed(pixels, window) if window else _full_range(pixels, pixels)


def _full_range(values: Array, counted: Array) -> Array:
    """Stretch: the smallest and largest of `counted` become 0 and 255; a flat image becomes black."""
    counted = counted if counted.size else values
    low, high = float(counted.min()), float(counted.max())
    if not np.isfinite([low, high]).all():
        raise ValueError("NaN or infinity among the pixels")
    unit = (values.astype(np.float64) - low) / (high - low if high > low else 1.0)
    return (np.clip(unit, 0.0, 1.0) * 255 + 0.5).astype(np.uint8)


@contextmanager
def _unreadable() -> Iterator[None]:
    """Decoders fail in many ways on damaged files, and their words may quote the file: only the kind is kept."""
    try:
        yield
    except UnreadableImage:
        raise
    except UnidentifiedImageError:
        raise UnreadableImage("is no PNG, JPEG, TIFF, BMP or DICOM image, or is damaged") from None
    except Image.DecompressionBombError:
        raise UnreadableImage("has more pixels than Pillow reads safely") from None
    except Exception as exc:
        if isinstance(exc, RuntimeError) and ("decod" in str(exc) or "decompress" in str(exc)):
            raise UnreadableImage(
                "is compressed in a way that needs another decoder (convert it, e.g. with `dcmdjpeg` or `gdcmconv`)"
            ) from None
        raise UnreadableImage(f"cannot be decoded ({type(exc).__name__})") from None
