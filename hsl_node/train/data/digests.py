"""sha256 of every source image, and the hashed patient of a DICOM file. Read once: unchanged files are remembered.

The memory is a small private file that holds hashes only: no path, no patient.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from hsl_node.federation.canonical import canonical_json
from hsl_node.host.durable import Step
from hsl_node.train.data.files import drop_old, replacing, used
from hsl_node.train.data.images import UnreadableImage, dicom_patient
from hsl_node.train.data.sources import Item, npz_array
from hsl_node.train.data.splits import patient_key

Progress = Callable[[int, int], None]  # (images done, images in total)
_Out = TypeVar("_Out")

INDEX_VERSION = 1
BATCH = 64  # images in flight at a time: bounds the memory, and is enough to keep every core busy


@dataclass(frozen=True)
class Digested:
    sha256: str
    key: str  # groups the images of one patient: hashed patient, or the sha256 itself


def digest_items(
    items: Sequence[Item], index: Path | None, progress: Progress | None = None
) -> tuple[list[Digested | None], dict[int, str]]:
    """Digest every item; None and a reason (by position) where a file cannot be read.

    `index`, one for each data set, remembers (path, size, time of change) -> sha256 of what is there now, so that a
    second call reads no image.
    """
    remembered = _read_index(index) if index else {}
    stamps = [_stamp(item) for item in items]
    found: dict[str, tuple[str, str]] = {}  # stamp -> sha256, hashed patient of the file or ""
    failed: dict[int, str] = {}
    fresh = []
    for n, stamp in enumerate(stamps):
        if stamp in remembered:
            found[stamp] = remembered[stamp]
        else:
            fresh.append(n)
    done = len(items) - len(fresh)
    for n, result in zip(fresh, in_parallel(_digest, [items[n] for n in fresh]), strict=True):
        if isinstance(result, UnreadableImage):
            failed[n] = result.message
        else:
            found[stamps[n]] = result
        done += 1
        if progress:
            progress(done, len(items))
    if fresh and index:
        _write_index(index, found)
    if index:
        used(index)
    digests = [None if n in failed else _digested(item, *found[stamps[n]]) for n, item in enumerate(items)]
    return digests, failed


def in_parallel(work: Callable[[Item], _Out], items: Sequence[Item]) -> Iterator[_Out | UnreadableImage]:
    """`work` over all items on all cores, results in order. Hashing and decoding release the interpreter's lock."""

    def guarded(item: Item) -> _Out | UnreadableImage:
        try:
            return work(item)
        except UnreadableImage as exc:
            return exc

    for array in dict.fromkeys((item.path, item.row[0]) for item in items if item.row):
        npz_array(*array)  # once, before the threads ask for it
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for start in range(0, len(items), BATCH):
            yield from pool.map(guarded, items[start : start + BATCH])


def _digest(item: Item) -> tuple[str, str]:
    if item.row:
        pixels = np.ascontiguousarray(npz_array(item.path, item.row[0])[item.row[1]])
        head = f"{pixels.dtype.str} {pixels.shape}\n".encode("ascii")
        return hashlib.sha256(head + pixels.tobytes()).hexdigest(), ""
    try:
        content = item.path.read_bytes()
    except OSError as exc:
        raise UnreadableImage(f"cannot be opened: {exc.strerror}") from None
    patient = dicom_patient(content)
    return hashlib.sha256(content).hexdigest(), patient_key(patient) if patient else ""


def _digested(item: Item, sha256: str, file_patient: str) -> Digested:
    """A table's own patient column decides; then the PatientID of a DICOM file; then each image stands alone."""
    return Digested(sha256, patient_key(item.patient) if item.patient else file_patient or sha256)


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
