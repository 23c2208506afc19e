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
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from hsl_node.federation.canonical import canonical_json
from hsl_node.host.durable import Step
from hsl_node.train.data.digests import in_parallel
from hsl_node.train.data.files import drop_old, replacing, used
from hsl_node.train.data.images import decode, decode_array
from hsl_node.train.data.pixels import UnreadableImage
from hsl_node.train.data.preprocessing import Preprocessing
from hsl_node.train.data.sources import Item
from hsl_node.train.progress import Progress

Array = NDArray[Any]

HEADER_BYTES = 4096  # a page, so that the pixels start on one
CHUNK_BYTES = 4 * 1024 * 1024


class Unreadable(Exception):
    """Some images cannot be decoded: position -> reason. Internal to this package; dataset.py words it."""

    def __init__(self, reasons: dict[int, str]) -> None:
        super().__init__(f"{len(reasons)} images")
        self.reasons = reasons


def key_of(preprocessing: Preprocessing, digests: Sequence[str]) -> str:
    """The whole preprocessing and the images' digests, in order, name a cache file."""
    head = canonical_json(preprocessing.to_json())
    return hashlib.sha256(head + b"\n" + "\n".join(digests).encode("ascii")).hexdigest()


def open_images(
    items: Sequence[Item], digests: Sequence[str], preprocessing: Preprocessing, folder: Path, progress: Progress
) -> Array:
    """The decoded images, in the order of `items`: (N, S, S) or (N, S, S, 3) uint8, a read-only memory map.

    Raises:
        Unreadable: some images cannot be decoded; no cache is kept.
        LocalStateError: the disk is full.
    """
    key = key_of(preprocessing, digests)
    path = folder / f"{key[:32]}.images"
    images = _open(path, key)
    if images is None:
        with replacing(path, Step.TRAINER_IMAGES) as file:
            _build(file, items, preprocessing, key, progress)
        images = _open(path, key)
        if images is None:
            raise AssertionError(f"a cache file just written cannot be read: {path.name}")
        drop_old(folder, path.suffix)
    used(path)
    return images


def decode_all(items: Sequence[Item], preprocessing: Preprocessing, progress: Progress) -> Iterator[Array]:
    """On all cores, in order.

    Raises:
        Unreadable: at the end, where some cannot be decoded; they are passed over.
    """

    def decoded(item: Item, pixels: Array | None) -> Array:
        return decode(item.path, preprocessing) if pixels is None else decode_array(pixels, preprocessing)

    reasons: dict[int, str] = {}
    for n, image in enumerate(in_parallel(decoded, items)):
        if isinstance(image, UnreadableImage):
            reasons[n] = image.message
        else:
            yield image
        progress(n + 1, len(items))
    if reasons:
        raise Unreadable(reasons)


def as_colour(image: Array) -> Array:
    """(S, S) grey -> (S, S, 3); one in colour stays as it is."""
    return np.repeat(image[..., None], 3, axis=-1) if image.ndim == 2 else image


def _build(file: BinaryIO, items: Sequence[Item], preprocessing: Preprocessing, key: str, progress: Progress) -> None:
    """Plain writes, no memory map: on a full disk a write fails, where a map would kill the process."""
    shape = [len(items), preprocessing.image_size, preprocessing.image_size]
    if not _written(file, decode_all(items, preprocessing, progress), colour=False):
        _written(file, decode_all(items, preprocessing, progress), colour=True)
        shape.append(3)
    file.seek(HEADER_BYTES)
    header = canonical_json({"key": key, "shape": shape, "crc32": _checksum(file)})
    file.seek(0)
    file.write(header + b" " * (HEADER_BYTES - 1 - len(header)) + b"\n")


def _written(file: BinaryIO, images: Iterator[Array], colour: bool) -> bool:
    """Write all pixels; False at the first image in colour where there is to be none: then all are decoded again."""
    file.seek(HEADER_BYTES)
    for image in images:
        if image.ndim == 3 and not colour:
            return False
        file.write((as_colour(image) if colour else image).tobytes())
    return True


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
