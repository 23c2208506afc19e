"""The hospital's images as training sees them: `open_dataset`. Source -> digests -> decoded cache -> splits.

    sources.py    what a source is             listing.py     folders.py, tables.py, arrays.py -> a source
    labels.py     its words -> classes         patients.py    who an image belongs to
    digests.py    sha256, remembered           images.py, cache.py    decoded once, mapped into memory
    splits.py, ledger.py    who trains, validates, tests       doubts.py    what is wrong, or may be

No message of this file holds an image's path or a patient: it may end up in a log. check.py names files, for the
operator's own terminal.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hsl_node.errors import DataError
from hsl_node.federation.node_toml import DataConfig
from hsl_node.federation.plan import Plan
from hsl_node.host import durable
from hsl_node.train.data.digests import are_remembered
from hsl_node.train.data.doubts import TOO_FEW, examine, may_lack_a_class
from hsl_node.train.data.gathering import Gathered, gather, index_of, read_images, unreadable_error
from hsl_node.train.data.labels import labels_of
from hsl_node.train.data.ledger import Begun, begun_with, read_begun, read_ledger, since, title_of, write_ledger
from hsl_node.train.data.listing import read_source
from hsl_node.train.data.sources import SPLIT_NAMES, Item, first_few
from hsl_node.train.data.splits import Assignment, Image, SplitConflict, assign
from hsl_node.train.progress import Progress, unheard

Array = NDArray[Any]


@dataclass(frozen=True)
class SplitSummary:
    """How the images were split, for every page that shows a figure of them."""

    by: str  # "patient", "study" or "image", where that is said of all; else "mixed"
    named: dict[str, int]  # patient, study, image -> images that are grouped by it
    images: dict[str, int]  # split -> images
    groups: dict[str, int]  # split -> patients; an image, or a study, of an unknown patient counts as one


@dataclass(frozen=True)
class Dataset:
    """What training, scoring and reports may see of the images. N images of S × S px."""

    images: Array  # (N, S, S) grey or (N, S, S, 3) colour, uint8, read-only memory map
    labels: Array  # (N,) int64, index into plan.classes
    split: Array  # (N,) int8: 0 train, 1 validation, 2 test
    ids: tuple[str, ...]  # sha256 of each source image; never a path, never a patient
    patients: tuple[str | None, ...] = ()  # the pseudonym of each image's patient; None: unknown. In no log or bundle
    warnings: tuple[str, ...] = ()  # for the operator: nothing stops, but results will be limited
    group: Array = field(default_factory=lambda: np.empty(0, dtype=np.int64))  # (N,): who must stay on one side
    summary: SplitSummary | None = None


def open_dataset(
    data: DataConfig, plan: Plan, *, cache: Path, ledger: Path, run: str = "", progress: Progress = unheard
) -> Dataset:
    """Open this hospital's images, decoded and split.

    `run`: the digest of the federation, whose first call here is remembered as what that run began with. `progress`
    hears (done, total) once over all images for what must be read, and once for what must be decoded.

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
    found = examine(data, gathered, pixels, assignment, plan)
    if found.problems:
        raise DataError("\n".join(problem.text for problem in found.problems), remedy=found.remedy)
    assert pixels is not None  # no images are a problem
    begun, here = read_begun(ledger), digests_of(gathered.images, plan)
    starts = bool(run) and (begun is None or begun.run != run)
    warnings = [*found.warnings, *changed_since(begun, run, here)]
    if assignment.keys.items() <= known.items() and not starts:
        durable.accept(ledger)
    else:  # who is gone stays: their images may come back
        began = begun_with(run, here) if starts else begun
        write_ledger(ledger, {**pages, title: {**known, **assignment.keys}}, began)
    return dataset_of(gathered, pixels, assignment, tuple(warnings))


def foresee(data: DataConfig, plan: Plan, *, cache: Path, ledger: Path) -> str:
    """What a start would refuse, as far as it can be told without reading an image that is not known yet.

    Nothing is written. Gives what was looked at, in words.

    Raises:
        DataError, LocalStateError: as `open_dataset` does.
    """
    source = read_source(data)
    labels = labels_of(source, plan.classes, data.labels)
    facts = f"{sum(label is not None for label in labels)} of {source.read} {source.unit} have a class of the plan"
    chosen = [item for item, label in zip(source.items, labels, strict=True) if label is not None]
    if not are_remembered(chosen, index_of(source, cache)):
        lacks = [name for c, name in enumerate(plan.classes) if c not in labels]
        if lacks and not may_lack_a_class([c in labels for c in range(len(plan.classes))]):
            raise DataError(f"class {', '.join(map(repr, lacks))} has no images", remedy=TOO_FEW)
        return f"{facts} (`hsl-node data check` reads the images)"
    gathered = gather(data, plan, cache, unheard)
    assignment = split(gathered, plan, read_ledger(ledger).get(title_of(plan), {}))
    found = examine(data, gathered, None, assignment, plan)
    if found.problems:
        raise DataError("\n".join(problem.text for problem in found.problems), remedy=found.remedy)
    return f"{facts}, split by {summary_of(gathered.images, assignment).by}"


def split(
    gathered: Gathered,
    plan: Plan,
    known: Mapping[str, int],
    name: Callable[[Item], str] = lambda item: item.where,
    listed: Callable[[Iterable[str]], list[str]] = first_few,
) -> Assignment:
    """Assign every image a side. `name` words an image in an error; the default is safe to log."""
    try:
        assignment = assign(gathered.images, plan.split_percent, plan.seed, known)
    except SplitConflict as exc:
        groups = listed(", ".join(listed(name(gathered.items[n]) for n in group)) for group in exc.groups)
        raise DataError("\n".join(groups) + f": {exc.message}", remedy=exc.remedy) from None
    require_unmoved(gathered.images, assignment, known)
    return assignment


def require_unmoved(images: Sequence[Image], assignment: Assignment, known: Mapping[str, int]) -> None:
    """Whatever has changed in node.toml or in the table: no image that has a side leaves it.

    Raises:
        DataError: how many images would go from where to where.
    """
    moves: Counter[tuple[int, int]] = Counter()
    for image, side in zip(images, assignment.split, strict=True):
        before = {known[image.sha256]} if image.sha256 in known else image.places(known)
        if before and side not in before:
            moves[before.pop(), side] += 1
    if moves:
        listed = [
            f"{n} images from {SPLIT_NAMES[old]} to {SPLIT_NAMES[new]}" for (old, new), n in sorted(moves.items())
        ]
        raise DataError(
            "the split that the source gives now is not the one that this node began with: it would move "
            + ", ".join(listed),
            remedy="undo what has changed in node.toml, in the table or in the folders since. Before another run: move"
            " splits.json in the state directory away, and the split is made anew",
        )


def summary_of(images: Sequence[Image], assignment: Assignment) -> SplitSummary:
    named = Counter(image.grouped_by for image in images)
    groups = Counter(side for _, side in set(zip(assignment.group, assignment.split, strict=True)))
    sides = Counter(assignment.split)
    return SplitSummary(
        by=next(iter(named)) if len(named) == 1 else "mixed",
        named={kind: named[kind] for kind in ("patient", "study", "image")},
        images={name: sides[s] for s, name in enumerate(SPLIT_NAMES)},
        groups={name: groups[s] for s, name in enumerate(SPLIT_NAMES)},
    )


def dataset_of(gathered: Gathered, pixels: Array, assignment: Assignment, warnings: tuple[str, ...]) -> Dataset:
    return Dataset(
        images=pixels,
        labels=np.array([image.label for image in gathered.images], dtype=np.int64),
        split=np.array(assignment.split, dtype=np.int8),
        ids=tuple(image.sha256 for image in gathered.images),
        patients=tuple(image.patient for image in gathered.images),
        warnings=warnings,
        group=np.array(assignment.group, dtype=np.int64),
        summary=summary_of(gathered.images, assignment),
    )


def changed_since(begun: Begun | None, run: str, digests: Mapping[str, list[str]]) -> list[str]:
    """A warning where images of this run are gone, or have another label, since it began."""
    changed = since(begun, run, digests)
    return [f"since the run began: {changed}"] if changed else []


def digests_of(images: Sequence[Image], plan: Plan) -> dict[str, list[str]]:
    """Class -> sha256 of its images."""
    return {name: [image.sha256 for image in images if image.label == c] for c, name in enumerate(plan.classes)}
