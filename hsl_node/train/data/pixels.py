"""Pixel values of any type become bytes, and bytes a square. Shapes: (H, W) grey, (H, W, 3) colour; S in px."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from hsl_node.errors import DataError
from hsl_node.train.data.preprocessing import Window

Array = NDArray[Any]

COLOUR_MIN_SPREAD = 8  # grey levels; JPEG rounding leaves less between the channels of a grey picture stored as RGB


class UnreadableImage(DataError):
    """One file cannot be decoded. The message names no file: whoever knows the path adds it for the operator."""


def to_square(pixels: Array, size: int, fit: Literal["squeeze", "pad"] = "squeeze") -> Array:
    """(H, W[, 3]) uint8 -> (S, S[, 3]) uint8. Colour whose channels agree everywhere becomes grey.

    The whole image is squeezed into the square, as the HSL paper does ("resized to 224 × 224"), or padded with black;
    nothing is cut off. Shrinking is antialiased.
    """
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] != 3):
        raise ValueError(f"an image of shape {pixels.shape} and type {pixels.dtype}")
    if min(pixels.shape) == 0:
        raise ValueError("an empty image")
    if pixels.ndim == 3 and _spread(pixels) < COLOUR_MIN_SPREAD:
        pixels = np.ascontiguousarray(pixels[:, :, 1])
    if pixels.shape[:2] == (size, size):
        return pixels
    picture = Image.fromarray(pixels)
    if fit == "squeeze" or pixels.shape[0] == pixels.shape[1]:
        return np.asarray(picture.resize((size, size), Image.Resampling.BILINEAR))
    return np.asarray(ImageOps.pad(picture, (size, size), Image.Resampling.BILINEAR))


def as_bytes(pixels: Array, window: Window | None) -> Array:
    """Any number type -> uint8. Wider than 8 bits: through the window, else the image's own range becomes 0..255."""
    if pixels.dtype == np.uint8:
        return np.ascontiguousarray(pixels)
    if pixels.dtype == np.bool_:
        return pixels.astype(np.uint8) * 255
    if pixels.dtype.kind not in "iuf":
        raise ValueError(f"pixels of type {pixels.dtype}")
    return windowed(pixels, window) if window else full_range(pixels, pixels)


def windowed(values: Array, window: Window) -> Array:
    """Grey values through a window -> 0..255, rounded to the nearest (DICOM PS3.3, C.11.2.1.2 and C.11.2.1.3)."""
    x = _finite(values)
    if window.shape == "SIGMOID":
        unit = 1.0 / (1.0 + np.exp(np.clip(-4.0 * (x - window.center) / window.width, -700.0, 700.0)))
    else:
        exact = window.shape == "LINEAR_EXACT" or window.width < 1  # LINEAR counts whole grey values: width - 1 steps
        center, width = (window.center, window.width) if exact else (window.center - 0.5, window.width - 1)
        low = center - width / 2
        unit = (x - low) / width if width else (x > low).astype(np.float64)
    return _to_bytes(unit)


def full_range(values: Array, counted: Array) -> Array:
    """Stretch: the smallest and largest of `counted` become 0 and 255; a flat image becomes black."""
    counted = _finite(counted if counted.size else values)
    low, high = float(counted.min()), float(counted.max())
    return _to_bytes((values.astype(np.float64) - low) / (high - low if high > low else 1.0))


def _to_bytes(unit: Array) -> Array:
    return (np.clip(unit, 0.0, 1.0) * 255 + 0.5).astype(np.uint8)


def _finite(values: Array) -> Array:
    x = values.astype(np.float64)
    if not np.isfinite(x).all():
        raise UnreadableImage("holds pixels that are no number (NaN or infinity)")
    return x


def _spread(pixels: Array) -> int:
    """Largest difference between the channels of one pixel. By channel: `np.ptp` takes 16 times as long."""
    red, green, blue = pixels[:, :, 0], pixels[:, :, 1], pixels[:, :, 2]
    high = np.maximum(np.maximum(red, green), blue)
    return int((high - np.minimum(np.minimum(red, green), blue)).max())
