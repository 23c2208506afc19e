"""Images decoded once into one file, which training maps into memory. Keyed by content: new images, a new file.

Layout: one page of JSON (shape, key, CRC-32 of the pixels), then N × S × S [× 3] bytes. Written whole or not at all;
a torn, truncated or altered file is noticed when it is opened, and made again.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from hsl_node.federation.canonical import canonical_json
from hsl_node.host.durable import Step
from hsl_node.train.data.digests import Progress, in_parallel
from hsl_node.train.data.files import drop_old, replacing, used
from hsl_node.train.data.images import DECODING_VERSION, UnreadableImage, Window, decode_array, decode_image
from hsl_node.train.data.sources import Item, npz_array

Array = NDArray[Any]

HEADER_BYTES = 4096  # a page, so that the pixels start on one
CHUNK_BYTES = 4 * 1024 * 1024


class Unreadable(Exception):
    """Some images cannot be decoded: position -> reason. Internal to this package; dataset.py words it."""

    def __init__(self, reasons: dict[int, str]) -> None:
        super().__init__(f"{len(reasons)} images")
        self.reasons = reasons


@dataclass(frozen=True)
class Recipe:
    """How images become pixels. With the images' digests, in order, it names the cache file."""

    size: int  # px
    window: Window | None = None

    def key(self, digests: Sequence[str]) -> str:
        window = [self.window.center, self.window.width] if self.window else None
        head = canonical_json({"decoding": DECODING_VERSION, "size": self.size, "window": window})
        return hashlib.sha256(head + b"\n" + "\n".join(digests).encode("ascii")).hexdigest()


def open_images(
    items: Sequence[Item], digests: Sequence[str], recipe: Recipe, folder: Path, progress: Progress | None = None
) -> Array:
    """The decoded images, in the order of `items`: (N, S, S) or (N, S, S, 3) uint8, a read-only memory map.

    Raises:
        Unreadable: some images cannot be decoded; no cache is kept.
        LocalStateError: the disk is full.
    """
    key = recipe.key(digests)
    path = folder / f"{key[:32]}.images"
    images = _open(path, key)
    if images is None:
        with replacing(path, Step.TRAINER_IMAGES) as file:
            _build(file, items, recipe, key, progress)
        images = _open(path, key)
        if images is None:
            raise AssertionError(f"a cache file just written cannot be read: {path.name}")
        drop_old(folder, path.suffix)
    used(path)
    return images


def decode_all(items: Sequence[Item], recipe: Recipe, progress: Progress | None = None) -> Iterator[Array]:
    """On all cores, in order.

    Raises:
        Unreadable: at the end, where some cannot be decoded; they are passed over.
    """

    def decode(item: Item) -> Array:
        if item.row:
            return decode_array(npz_array(item.path, item.row[0])[item.row[1]], recipe.size)
        return decode_image(item.path, recipe.size, recipe.window)

    reasons: dict[int, str] = {}
    for n, image in enumerate(in_parallel(decode, items)):
        if isinstance(image, UnreadableImage):
            reasons[n] = image.message
        else:
            yield image
        if progress:
            progress(n + 1, len(items))
    if reasons:
        raise Unreadable(reasons)


def as_colour(images: Array) -> Array:
    """(..., S, S) grey -> (..., S, S, 3)."""
    return np.repeat(images[..., None], 3, axis=-1)


def _build(file: BinaryIO, items: Sequence[Item], recipe: Recipe, key: str, progress: Progress | None) -> None:
    """Plain writes, no memory map: on a full disk a write fails, where a map would kill the process."""
    file.write(bytes(HEADER_BYTES))
    colour = False
    for written, image in enumerate(decode_all(items, recipe, progress)):
        if image.ndim == 3 and not colour:
            colour = True
            _recolour(file, written * recipe.size**2)
        file.write(as_colour(image).tobytes() if colour and image.ndim == 2 else image.tobytes())
    shape = [len(items), recipe.size, recipe.size] + ([3] if colour else [])
    file.seek(HEADER_BYTES)
    header = canonical_json({"key": key, "shape": shape, "crc32": _checksum(file)})
    file.seek(0)
    file.write(header + b" " * (HEADER_BYTES - 1 - len(header)) + b"\n")


def _recolour(file: BinaryIO, grey_bytes: int) -> None:
    """The first colour image turns what is written so far into colour, in place, from the end."""
    end = grey_bytes
    while end > 0:
        start = max(0, end - CHUNK_BYTES)
        file.seek(HEADER_BYTES + start)
        chunk = np.frombuffer(file.read(end - start), dtype=np.uint8)
        file.seek(HEADER_BYTES + 3 * start)
        file.write(as_colour(chunk).tobytes())
        end = start
    file.seek(HEADER_BYTES + 3 * grey_bytes)


def _open(path: Path, key: str) -> Array | None:
    """The images of a whole and unaltered file; None where it is missing or damaged."""
    try:
        with open(path, "rb") as file:
            header = json.loads(file.read(HEADER_BYTES))
            shape = tuple(header["shape"])
            if header["key"] != key or os.fstat(file.fileno()).st_size != HEADER_BYTES + math.prod(shape):
                return None
            if _checksum(file) != header["crc32"]:
                return None
            return np.memmap(file, dtype=np.uint8, mode="r", offset=HEADER_BYTES, shape=shape)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _checksum(file: BinaryIO) -> int:
    """CRC-32 from here to the end: about 1 GB/s, and it draws the file into memory, where training wants it."""
    value = 0
    while chunk := file.read(CHUNK_BYTES):
        value = zlib.crc32(chunk, value)
    return value
