"""sha256 of every source image, and the hashed patient of a DICOM file. Read once: unchanged files are remembered.

The memory is a small private file that holds hashes only: no path, no patient.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from numpy.typing import NDArray

from hsl_node.federation.canonical import canonical_json
from hsl_node.host.durable import Step
from hsl_node.train.data.files import drop_old, replacing, used
from hsl_node.train.data.images import content_of, dicom_patient
from hsl_node.train.data.pixels import UnreadableImage
from hsl_node.train.data.sources import Item, npz_array
from hsl_node.train.data.splits import patient_key
from hsl_node.train.progress import Progress

Array = NDArray[Any]
_Out = TypeVar("_Out")

INDEX_VERSION = 1
BATCH = 64  # images in flight at a time: bounds the memory, and is enough to keep every core busy


def digest_items(
    items: Sequence[Item], index: Path | None, progress: Progress
) -> list[tuple[str, str] | UnreadableImage]:
    """Of each item its sha256, and what groups the images of one patient: the hashed patient, or the sha256 itself.

    `index`, one for each data set, remembers (path, size, time of change) -> sha256 of what is there now, so that a
    second call reads no image.
    """
    remembered = _read_index(index) if index else {}
    stamps = [_stamp(item) for item in items]
    found: dict[int, tuple[str, str] | UnreadableImage] = {
        n: remembered[stamp] for n, stamp in enumerate(stamps) if stamp in remembered
    }
    fresh = [n for n in range(len(items)) if n not in found]
    for n, result in zip(fresh, in_parallel(_digest, [items[n] for n in fresh]), strict=True):
        found[n] = result
        progress(len(found), len(items))
    if index:
        if fresh:
            _write_index(index, {stamps[n]: pair for n, pair in found.items() if isinstance(pair, tuple)})
        used(index)
    return [_with_key(item, found[n]) for n, item in enumerate(items)]


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

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for start in range(0, len(items), BATCH):
            yield from pool.map(guarded, items[start : start + BATCH])


def _digest(item: Item, pixels: Array | None) -> tuple[str, str]:
    """sha256, and the hashed patient of the file or ""."""
    if pixels is not None:
        head = f"{pixels.dtype.str} {pixels.shape}\n".encode("ascii")
        return hashlib.sha256(head + pixels.tobytes()).hexdigest(), ""
    content = content_of(item.path)
    patient = dicom_patient(content)
    return hashlib.sha256(content).hexdigest(), patient_key(patient) if patient else ""


def _with_key(item: Item, found: tuple[str, str] | UnreadableImage) -> tuple[str, str] | UnreadableImage:
    """A table's own patient column decides; then the PatientID of a DICOM file; then each image stands alone."""
    if isinstance(found, UnreadableImage):
        return found
    sha256, file_patient = found
    return sha256, patient_key(item.patient) if item.patient else file_patient or sha256


def _stamp(item: Item) -> str:
    try:
        status = item.path.stat()
        identity: tuple[object, ...] = (str(item.path), status.st_size, status.st_mtime_ns, item.row)
    except OSError:
        identity = (str(item.path), "absent")
    return hashlib.sha256(repr(identity).encode("utf-8", "surrogateescape")).hexdigest()[:32]


def _read_index(path: Path) -> dict[str, tuple[str, str]]:
    """A damaged or missing index costs time, nothing else."""
    try:
        content = json.loads(path.read_bytes())
        if content["version"] != INDEX_VERSION:
            return {}
        return {str(k): (str(sha256), str(patient)) for k, (sha256, patient) in content["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _write_index(path: Path, found: dict[str, tuple[str, str]]) -> None:
    with replacing(path, Step.TRAINER_DIGESTS) as file:
        file.write(canonical_json({"version": INDEX_VERSION, "files": found}))
    drop_old(path.parent, path.suffix)
