"""The hospital's images as training sees them: `open_dataset`. Source -> digests -> decoded cache -> splits.

    sources.py   folder, table, .npz -> items            splits.py, ledger.py   who trains, validates, tests
    digests.py   sha256 per image, remembered            images.py, cache.py    decoded once, mapped into memory

No message of this file holds an image's path or a patient: it may end up in a log. check.py names files, for the
operator's own terminal.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hsl_node.errors import DataError
from hsl_node.federation.node_toml import DataConfig
from hsl_node.federation.plan import Plan
from hsl_node.host import durable
from hsl_node.train.data.cache import Recipe, Unreadable, open_images
from hsl_node.train.data.digests import Digested, Progress, digest_items
from hsl_node.train.data.images import Window
from hsl_node.train.data.ledger import read_ledger, write_ledger
from hsl_node.train.data.sources import (
    SPLIT_NAMES,
    TEST,
    TRAIN,
    Item,
    Source,
    first_few,
    labels_of,
    npz_array,
    read_source,
)
from hsl_node.train.data.splits import Assignment, Image, SplitConflict, assign

Array = NDArray[Any]


@dataclass(frozen=True)
class Dataset:
    """What training, scoring and reports may see of the images. N images of S × S px."""

    images: Array  # (N, S, S) grey or (N, S, S, 3) colour, uint8, read-only memory map
    labels: Array  # (N,) int64, index into plan.classes
    split: Array  # (N,) int8: 0 train, 1 validation, 2 test
    ids: tuple[str, ...]  # sha256 of each source image; never a path, never a patient
    warnings: tuple[str, ...] = ()  # for the operator: nothing stops, but results will be limited


@dataclass(frozen=True)
class Gathered:
    """The chosen items of a source with label and digest; what cannot be read stands apart."""

    source: Source
    items: tuple[Item, ...]
    labels: tuple[int, ...]
    digests: tuple[Digested, ...]
    unreadable: tuple[tuple[Item, str], ...]  # item, reason

    def without(self, reasons: dict[int, str]) -> Gathered:
        """Set items aside that turned out to be undecodable."""
        keep = [n for n in range(len(self.items)) if n not in reasons]
        return Gathered(
            self.source,
            tuple(self.items[n] for n in keep),
            tuple(self.labels[n] for n in keep),
            tuple(self.digests[n] for n in keep),
            self.unreadable + tuple((self.items[n], reason) for n, reason in reasons.items()),
        )


def open_dataset(
    data: DataConfig, plan: Plan, *, cache: Path, ledger: Path, progress: Progress | None = None
) -> Dataset:
    """Open this hospital's images, decoded and split.

    `progress` hears (done, total) once over all images for what must be read, and once for what must be decoded.

    Raises:
        DataError: a label that is no class, an image that cannot be read, a class or a split that lacks images.
        LocalStateError: the disk is full, or the split ledger is damaged.
    """
    try:
        gathered = gather(data, plan, cache, progress)
        if gathered.unreadable:
            raise unreadable_error(gathered)
        images = decoded(gathered, data, plan, cache, progress)
    except Unreadable as exc:
        raise unreadable_error(gathered.without(exc.reasons)) from None
    finally:
        npz_array.cache_clear()
    memory = read_ledger(ledger)
    assignment = split(gathered, plan, memory.page(plan))
    problems, warnings = judge(gathered.labels, assignment, plan)
    if problems:
        raise DataError("\n".join(problems), remedy=_TOO_FEW)
    updated = memory.with_page(plan, assignment.keys)
    if updated != memory:
        write_ledger(ledger, updated)
    else:
        durable.accept(ledger)
    return dataset_of(gathered, images, assignment, tuple(warnings))


# ---------------------------------------------------------------- the steps, shared with check.py and anchor.py

_TOO_FEW = (
    "every class needs images of at least three patients; add images, widen data.filter, or map labels with"
    " data.labels in node.toml (`hsl-node data check` shows the counts)"
)


def gather(data: DataConfig, plan: Plan, cache: Path, progress: Progress | None = None) -> Gathered:
    """List, label and digest the images."""
    source = read_source(data)
    return gather_labelled(source, labels_of(source, plan.classes, data.labels), cache, progress)


def gather_labelled(
    source: Source, labels: Sequence[int | None], cache: Path | None, progress: Progress | None = None
) -> Gathered:
    """Digest the items that have a label."""
    chosen = [(item, label) for item, label in zip(source.items, labels, strict=True) if label is not None]
    items = tuple(item for item, _ in chosen)
    index = cache / f"{hashlib.sha256(bytes(source.path.absolute())).hexdigest()[:16]}.index" if cache else None
    digests, failed = digest_items(items, index, progress)
    readable = [n for n in range(len(items)) if n not in failed]
    return Gathered(
        source,
        tuple(items[n] for n in readable),
        tuple(chosen[n][1] for n in readable),
        tuple(d for d in digests if d is not None),
        tuple((items[n], reason) for n, reason in failed.items()),
    )


def decoded(gathered: Gathered, data: DataConfig, plan: Plan, cache: Path, progress: Progress | None = None) -> Array:
    """The pixels, from the cache or decoded now. Raises Unreadable."""
    ids = [d.sha256 for d in gathered.digests]
    return open_images(gathered.items, ids, Recipe(plan.image_size, window_of(data)), cache, progress)


def window_of(data: DataConfig) -> Window | None:
    """The operator's own window for DICOM and 16-bit images, if node.toml sets one."""
    if (data.window_center is None) != (data.window_width is None):
        raise DataError(
            "data.window_center and data.window_width belong together", remedy="set both in node.toml, or neither"
        )
    if data.window_center is None or data.window_width is None:
        return None
    return Window(data.window_center, data.window_width)


def split(
    gathered: Gathered, plan: Plan, known: Mapping[str, int], name: Callable[[Item], str] = lambda item: item.where
) -> Assignment:
    """Assign every image a side. `name` words an image in an error; the default is safe to log."""
    images = [
        Image(digest.sha256, label, digest.key, item.split)
        for item, label, digest in zip(gathered.items, gathered.labels, gathered.digests, strict=True)
    ]
    try:
        return assign(images, plan.split_percent, plan.seed, known)
    except SplitConflict as exc:
        named = first_few([name(gathered.items[n]) for n in exc.images])
        raise DataError(f"{', '.join(named)}: {exc.message}", remedy=exc.remedy) from None


def dataset_of(gathered: Gathered, images: Array, assignment: Assignment, warnings: tuple[str, ...]) -> Dataset:
    return Dataset(
        images=images,
        labels=np.array(gathered.labels, dtype=np.int64),
        split=np.array(assignment.split, dtype=np.int8),
        ids=tuple(d.sha256 for d in gathered.digests),
        warnings=warnings,
    )


def unreadable_error(gathered: Gathered) -> DataError:
    """How many images cannot be read, where in a table they stand, and why; no path."""
    lines = first_few([f"{item.where}: {reason}" for item, reason in gathered.unreadable])
    return DataError(
        f"{len(gathered.unreadable)} of {len(gathered.items) + len(gathered.unreadable)} images cannot be read\n"
        + "\n".join(lines),
        remedy="`hsl-node data check` names the files: replace them, or list them in data.exclude in node.toml",
    )


def judge(labels: Sequence[int], assignment: Assignment, plan: Plan) -> tuple[list[str], list[str]]:
    """What makes training impossible, and what merely limits it."""
    count = np.zeros((len(plan.classes), len(SPLIT_NAMES)), dtype=int)
    np.add.at(count, (np.array(labels, dtype=int), np.array(assignment.split, dtype=int)), 1)
    groups = [len({g for g, n in zip(assignment.group, labels, strict=True) if n == c}) for c in range(len(count))]
    problems, warnings = [], []
    for c, name in enumerate(plan.classes):
        counts = ", ".join(f"{SPLIT_NAMES[s]} {count[c, s]}" for s in range(len(SPLIT_NAMES)))
        facts = f"{count[c].sum()} images of {groups[c]} patients: {counts}"
        if count[c].sum() == 0:
            problems.append(f"class {name!r} has no images")
        elif count[c, TRAIN] == 0:
            problems.append(f"class {name!r} has no image to train on ({facts})")
        else:
            for s in range(1, len(SPLIT_NAMES)):
                if count[c, s] == 0 and s != TEST and np.count_nonzero(count[:, s]) < 2:
                    problems.append(f"the {SPLIT_NAMES[s]} split lacks class {name!r} ({facts})")
                elif count[c, s] == 0:
                    warnings.append(f"the {SPLIT_NAMES[s]} split lacks class {name!r} ({facts})")
    present = np.flatnonzero(count[:, TEST])
    if len(present) < 2 and not problems:
        what = f"one class only ({plan.classes[present[0]]!r})" if len(present) else "no images"
        warnings.append(f"the test split holds {what}: its AUC will be undefined")
    if assignment.joined:
        warnings.append(
            f"{assignment.joined} groups of patients share an identical image and were kept on one side each"
        )
    return problems, warnings
