"""sha256 of every source image, and its hashed owner. Read once: unchanged files are remembered.

The memory is a small private file that holds hashes only: no path, no patient.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from numpy.typing import NDArray
from PIL import Image

from hsl_node.federation.canonical import canonical_json
from hsl_node.host.cores import available_cores
from hsl_node.host.durable import Step
from hsl_node.train.data.arrays import npz_array
from hsl_node.train.data.files import drop_old, replacing, used
from hsl_node.train.data.images import content_of
from hsl_node.train.data.patients import NOBODY, Owner, file_owner
from hsl_node.train.data.pixels import UnreadableImage
from hsl_node.train.data.sources import Item
from hsl_node.train.progress import Progress

Array = NDArray[Any]
_Out = TypeVar("_Out")

INDEX_VERSION = 3
BATCH = 64  # images in flight at a time: bounds the memory, and is enough to keep every core busy


@dataclass(frozen=True)
class Digest:
    """What one look at an image's bytes tells without decoding it."""

    sha256: str
    owner: Owner = NOBODY
    side: int = 0  # px, the shorter one; 0: not known


def digest_items(items: Sequence[Item], index: Path | None, progress: Progress) -> list[Digest | UnreadableImage]:
    """Of each item its sha256, and whose it is as far as the file says so.

    `index`, one for each data set, remembers (path, size, time of change) -> the digest of what is there now, so that a
    second call reads no image.
    """
    remembered = _read_index(index) if index else {}
    stamps = [_stamp(item) for item in items]
    found: dict[int, Digest | UnreadableImage] = {
        n: remembered[stamp] for n, stamp in enumerate(stamps) if stamp in remembered
    }
    fresh = [n for n in range(len(items)) if n not in found]
    for n, result in zip(fresh, in_parallel(_digest, [items[n] for n in fresh]), strict=True):
        found[n] = result
        progress(len(found), len(items))
    if index:
        if fresh:
            _write_index(index, {stamps[n]: one for n, one in found.items() if isinstance(one, Digest)})
        used(index)
    return [found[n] for n in range(len(items))]


def are_remembered(items: Sequence[Item], index: Path) -> bool:
    """Whether `digest_items` would read no image."""
    remembered = _read_index(index)
    return all(_stamp(item) in remembered for item in items)


def in_parallel(work: Callable[[Item, Array | None], _Out], items: Sequence[Item]) -> Iterator[_Out | UnreadableImage]:
    """`work` over all items and their pixels, on all cores, results in order.

    Pixels: of an .npz file, whose arrays are read once for all items; else None, and `work` reads the image file.
    Hashing and decoding release the interpreter's lock.
    """
    arrays = {array: npz_array(*array) for array in dict.fromkeys((i.path, i.row[0]) for i in items if i.row)}

    def guarded(item: Item) -> _Out | UnreadableImage:
        try:
            return work(item, arrays[item.path, item.row[0]][item.row[1]] if item.row else None)
        except UnreadableImage as exc:
            return exc

    with ThreadPoolExecutor(available_cores()) as pool:
        for start in range(0, len(items), BATCH):
            yield from pool.map(guarded, items[start : start + BATCH])


def _digest(item: Item, pixels: Array | None) -> Digest:
    if pixels is not None:
        head = f"{pixels.dtype.str} {pixels.shape}\n".encode("ascii")
        return Digest(hashlib.sha256(head + pixels.tobytes()).hexdigest(), side=min(pixels.shape[:2], default=0))
    content = content_of(item.path)
    return Digest(hashlib.sha256(content).hexdigest(), file_owner(content), _side(content))


def _side(content: bytes) -> int:
    """Of a picture; whether it is one at all is found out when it is decoded."""
    try:
        with Image.open(io.BytesIO(content)) as picture:
            return min(picture.size)
    except Exception:  # Pillow has no common error of damaged files
        return 0


def _stamp(item: Item) -> str:
    try:
        status = item.path.stat()
        identity: tuple[object, ...] = (str(item.path), status.st_size, status.st_mtime_ns, item.row)
    except OSError:
        identity = (str(item.path), "absent")
    return hashlib.sha256(repr(identity).encode("utf-8", "surrogateescape")).hexdigest()[:32]


def _read_index(path: Path) -> dict[str, Digest]:
    """A damaged or missing index costs time, nothing else."""
    try:
        content = json.loads(path.read_bytes())
        if content["version"] != INDEX_VERSION:
            return {}
        return {
            str(stamp): Digest(str(sha256), Owner(tuple(map(str, patient)), str(study), str(once)), int(side))
            for stamp, (sha256, patient, study, once, side) in content["files"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _write_index(path: Path, found: dict[str, Digest]) -> None:
    files = {
        stamp: [d.sha256, list(d.owner.patient), d.owner.study, d.owner.once, d.side] for stamp, d in found.items()
    }
    with replacing(path, Step.TRAINER_DIGESTS) as file:
        file.write(canonical_json({"version": INDEX_VERSION, "files": files}))
    drop_old(path.parent, path.suffix)
