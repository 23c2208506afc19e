"""The hospital's images as training sees them: `open_dataset`. Source -> digests -> decoded cache -> splits.

    sources.py   folder, table, .npz -> items            splits.py, ledger.py   who trains, validates, tests
    digests.py   sha256 per image, remembered            images.py, cache.py    decoded once, mapped into memory

No message of this file holds an image's path or a patient: it may end up in a log. check.py names files, for the
operator's own terminal.
"""

from __future__ import annotations

import hashlib
from collections import Counter
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
from hsl_node.train.data.cache import Unreadable, open_images
from hsl_node.train.data.digests import digest_items
from hsl_node.train.data.ledger import read_ledger, title_of, write_ledger
from hsl_node.train.data.pixels import UnreadableImage
from hsl_node.train.data.preprocessing import Preprocessing, Window
from hsl_node.train.data.sources import (
    NODE_TOML,
    SPLIT_NAMES,
    TEST,
    TRAIN,
    Asked,
    Item,
    Source,
    first_few,
    labels_of,
    read_source,
)
from hsl_node.train.data.splits import Assignment, Image, SplitConflict, assign
from hsl_node.train.progress import Progress, unheard

Array = NDArray[Any]


@dataclass(frozen=True)
class Dataset:
    """What training, scoring and reports may see of the images. N images of S × S px."""

    images: Array  # (N, S, S) grey or (N, S, S, 3) colour, uint8, read-only memory map
    labels: Array  # (N,) int64, index into plan.classes
    split: Array  # (N,) int8: 0 train, 1 validation, 2 test
    ids: tuple[str, ...]  # sha256 of each source image; never a path, never a patient
    patients: tuple[str | None, ...] = ()  # the pseudonym of each image's patient; None: unknown. In no log or bundle
    warnings: tuple[str, ...] = ()  # for the operator: nothing stops, but results will be limited


@dataclass(frozen=True)
class Gathered:
    """The chosen items of a source, and what is known of their images; what cannot be read stands apart."""

    source: Source
    items: tuple[Item, ...]
    images: tuple[Image, ...]  # of each item
    unreadable: tuple[tuple[Item, str], ...]  # item, reason

    def without(self, reasons: dict[int, str]) -> Gathered:
        """Set items aside that turned out to be undecodable."""
        keep = [n for n in range(len(self.items)) if n not in reasons]
        return Gathered(
            self.source,
            tuple(self.items[n] for n in keep),
            tuple(self.images[n] for n in keep),
            self.unreadable + tuple((self.items[n], reason) for n, reason in reasons.items()),
        )


def open_dataset(data: DataConfig, plan: Plan, *, cache: Path, ledger: Path, progress: Progress = unheard) -> Dataset:
    """Open this hospital's images, decoded and split.

    `progress` hears (done, total) once over all images for what must be read, and once for what must be decoded.

    Raises:
        DataError: a label that is no class, an image that cannot be read, a class or a split that lacks images.
        LocalStateError: the disk is full, or the split ledger is damaged.
    """
    gathered, pixels = read_images(data, plan, cache, progress, tells_all=False)
    if gathered.unreadable:
        raise unreadable_error(gathered)
    pages, title = read_ledger(ledger), title_of(plan)
    known = pages.get(title, {})
    assignment = split(gathered, plan, known)
    problems, warnings = judge(gathered.images, assignment, plan)
    if problems:
        raise DataError("\n".join(problems), remedy=_TOO_FEW)
    assert pixels is not None  # no images are a problem
    if assignment.keys.items() <= known.items():
        durable.accept(ledger)
    else:  # who is gone stays: their images may come back
        write_ledger(ledger, {**pages, title: {**known, **assignment.keys}})
    return dataset_of(gathered, pixels, assignment, tuple(warnings))


# ---------------------------------------------------------------- the steps, shared with check.py and anchor.py

_TOO_FEW = (
    "every class needs images of at least three patients; add images, widen data.filter, or map labels with"
    " data.labels in node.toml (`hsl-node data check` shows the counts)"
)


def read_images(
    data: DataConfig, plan: Plan, cache: Path, progress: Progress, *, tells_all: bool, asked: Asked = NODE_TOML
) -> tuple[Gathered, Array | None]:
    """List, label, digest and decode the images; the pixels, from the cache or decoded now, None where there are none.

    Once more without those that cannot be decoded, so that all of them are told at once. Unless it `tells_all`, none is
    decoded where one cannot even be opened: that takes hours, for a set that has to change.
    """
    gathered, preprocessing = gather(data, plan, cache, progress, asked), Preprocessing.of(plan, window_of(data))
    while gathered.items and (tells_all or not gathered.unreadable):
        try:
            ids = [image.sha256 for image in gathered.images]
            return gathered, open_images(gathered.items, ids, preprocessing, cache, progress)
        except Unreadable as exc:
            gathered = gathered.without(exc.reasons)
    return gathered, None


def gather(data: DataConfig, plan: Plan, cache: Path, progress: Progress, asked: Asked = NODE_TOML) -> Gathered:
    """List, label and digest the images."""
    source = read_source(data, asked)
    return gather_labelled(source, labels_of(source, plan.classes, data.labels), cache, progress)


def gather_labelled(source: Source, labels: Sequence[int | None], cache: Path | None, progress: Progress) -> Gathered:
    """Digest the items that have a label."""
    chosen = [(item, label) for item, label in zip(source.items, labels, strict=True) if label is not None]
    index = cache / f"{hashlib.sha256(bytes(source.path.absolute())).hexdigest()[:16]}.index" if cache else None
    items, images, unreadable = [], [], []
    for (item, label), found in zip(chosen, digest_items([i for i, _ in chosen], index, progress), strict=True):
        if isinstance(found, UnreadableImage):
            unreadable.append((item, found.message))
        else:
            sha256, key = found
            items.append(item)
            images.append(Image(sha256, label, key, item.split))
    return Gathered(source, tuple(items), tuple(images), tuple(unreadable))


def window_of(data: DataConfig) -> Window | None:
    """The operator's own window for DICOM and 16-bit images, if node.toml sets one."""
    if (data.window_center is None) != (data.window_width is None):
        raise DataError(
            "data.window_center and data.window_width belong together", remedy="set both in node.toml, or neither"
        )
    if data.window_center is None or data.window_width is None:
        return None
    return Window(center=data.window_center, width=data.window_width)


def split(
    gathered: Gathered, plan: Plan, known: Mapping[str, int], name: Callable[[Item], str] = lambda item: item.where
) -> Assignment:
    """Assign every image a side. `name` words an image in an error; the default is safe to log."""
    try:
        return assign(gathered.images, plan.split_percent, plan.seed, known)
    except SplitConflict as exc:
        named = first_few([name(gathered.items[n]) for n in exc.images])
        raise DataError(f"{', '.join(named)}: {exc.message}", remedy=exc.remedy) from None


def dataset_of(gathered: Gathered, pixels: Array, assignment: Assignment, warnings: tuple[str, ...]) -> Dataset:
    return Dataset(
        images=pixels,
        labels=np.array([image.label for image in gathered.images], dtype=np.int64),
        split=np.array(assignment.split, dtype=np.int8),
        ids=tuple(image.sha256 for image in gathered.images),
        patients=tuple(None if image.key == image.sha256 else image.key for image in gathered.images),
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


def counted(images: Sequence[Image], assignment: Assignment, plan: Plan) -> Array:
    """Images per class and split."""
    count = np.zeros((len(plan.classes), len(SPLIT_NAMES)), dtype=int)
    np.add.at(count, ([image.label for image in images], list(assignment.split)), 1)
    return count


def judge(images: Sequence[Image], assignment: Assignment, plan: Plan) -> tuple[list[str], list[str]]:
    """What makes training impossible, and what merely limits it."""
    count = counted(images, assignment, plan)
    patients = Counter(label for _, label in {(g, i.label) for g, i in zip(assignment.group, images, strict=True)})
    problems, warnings = [], []
    for c, name in enumerate(plan.classes):
        counts = ", ".join(f"{SPLIT_NAMES[s]} {count[c, s]}" for s in range(len(SPLIT_NAMES)))
        facts = f"{count[c].sum()} images of {patients[c]} patients: {counts}"
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
