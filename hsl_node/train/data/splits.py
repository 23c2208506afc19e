"""Who is trained on, who validates, who tests: 60/10/30, stratified by label, grouped by patient. Pure.

A group is what must stay on one side: a patient, or an image without one, joined with whoever owns the very same image.
The order of the groups follows a hash of (seed, group), so neither file names nor their order decide anything, and
groups that have a place already keep it (`known`, see ledger.py): images added later move no patient.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hsl_node.errors import DataError

SPLITS = 3  # train, validation, test


@dataclass(frozen=True)
class Image:
    """What a split needs to know of one image."""

    sha256: str
    label: int
    key: str  # hashed patient, or the sha256 itself where the patient is unknown
    fixed: int | None = None  # the source's own split


@dataclass(frozen=True)
class Assignment:
    split: tuple[int, ...]  # per image
    group: tuple[int, ...]  # per image, counted from 0
    keys: dict[str, int]  # key -> split, for the ledger
    joined: int  # groups that hold more than one patient, because these share an image


class SplitConflict(DataError):
    """Some images must be on one side but are on two. `images`: their positions, for whoever knows their names."""

    def __init__(self, message: str, *, images: tuple[int, ...], remedy: str) -> None:
        super().__init__(message, remedy=remedy)
        self.images = images


@dataclass(frozen=True)
class _Group:
    number: int
    rank: str  # hex hash: its place in the queue
    size: int  # images
    place: int | None  # where it is already


def patient_key(patient: str) -> str:
    """The pseudonym of a patient, to recognise it by. No secret: who can list the identifiers can find it out again.

    So `splits.json` is kept like the images: mode 0600, in this node's own backups, never sent, in no log or bundle.
    """
    return hashlib.sha256(b"hsl-node patient\0" + patient.encode("utf-8")).hexdigest()


def assign(
    images: Sequence[Image], percent: tuple[int, int, int], seed: int, known: Mapping[str, int] | None = None
) -> Assignment:
    """Give every image a split.

    In each stratum (same label; of a patient with several labels the rarest counts), groups without a place go, in
    hash order, to the split that lacks most images of its share. A stratum of three groups or more reaches every split.
    Where the source fixes train and test but no validation, the validation part is taken out of its train part.

    Raises:
        SplitConflict: the source's split, or what is known, puts one group on two sides.
    """
    group, joined = _groups(images)
    members: dict[int, list[int]] = defaultdict(list)
    for position, number in enumerate(group):
        members[number].append(position)
    pool = _train_pool(images)
    frequency = Counter(image.label for image in images)
    strata: dict[tuple[int, tuple[int, ...]], list[_Group]] = defaultdict(list)  # by label, and splits it may go to
    for number, positions in members.items():
        inside = [images[p] for p in positions]
        allowed, already = _placed(inside, pool, known or {}, tuple(positions))
        label = min({m.label for m in inside}, key=lambda n: (frequency[n], -n))
        rank = hashlib.sha256(f"{seed}:{min(m.key for m in inside)}".encode("ascii")).hexdigest()
        strata[label, allowed].append(_Group(number, rank, len(inside), already))
    place: dict[int, int] = {}
    for (_, allowed), groups in strata.items():
        place |= _fill(sorted(groups, key=lambda g: g.rank), allowed, percent)
    return Assignment(
        split=tuple(place[n] for n in group),
        group=group,
        keys={image.key: place[n] for n, image in zip(group, images, strict=True)},
        joined=joined,
    )


def _fill(groups: Sequence[_Group], allowed: tuple[int, ...], percent: tuple[int, int, int]) -> dict[int, int]:
    """Group number -> split, for the groups of one stratum in their order."""
    total, whole = sum(g.size for g in groups), sum(percent[s] for s in allowed)
    lacks = {s: total * percent[s] / whole for s in allowed}  # images
    place = {g.number: g.place for g in groups if g.place is not None}
    for group in groups:
        if group.place is not None:
            lacks[group.place] -= group.size
    empty, waiting = set(allowed) - set(place.values()), [g for g in groups if g.place is None]
    for done, group in enumerate(waiting):
        last_chance = len(groups) >= len(allowed) and len(waiting) - done <= len(empty)
        split = max(sorted(empty if last_chance else allowed), key=lambda s: lacks[s])  # of equals the first: train
        lacks[split] -= group.size
        empty.discard(split)
        place[group.number] = split
    return place


def _placed(
    members: Sequence[Image], pool: tuple[int, ...], known: Mapping[str, int], positions: tuple[int, ...]
) -> tuple[tuple[int, ...], int | None]:
    """The splits a group may go to, and the one it is in already."""
    fixed = {m.fixed for m in members if m.fixed is not None}
    if len(fixed) > 1:
        raise SplitConflict(
            "the given split puts images of one patient, or one and the same image, on two sides",
            images=positions,
            remedy='correct it, or let the node split: columns = { split = "" } in node.toml',
        )
    allowed = tuple(range(SPLITS))
    if fixed:
        only = fixed.pop()
        allowed = pool if only == 0 else (only,)
    if len(allowed) == 1:
        return allowed, allowed[0]
    places = {known[m.key] for m in members if m.key in known} & set(allowed)
    if len(places) > 1:
        raise SplitConflict(
            "the very same image belongs to patients who are already on different sides",
            images=positions,
            remedy="correct the patient, or list one of the files in data.exclude (`hsl-node data check` names them)",
        )
    return allowed, places.pop() if places else None


def _train_pool(images: Sequence[Image]) -> tuple[int, ...]:
    """Where images go that the source calls "train": there, or also to validation, if it names none at all."""
    given = {image.fixed for image in images}
    return (0, 1) if 0 in given and not given & {1, None} else (0,)


def _groups(images: Sequence[Image]) -> tuple[tuple[int, ...], int]:
    """Group number per image: same key or same sha256 = same group. And how many groups join several keys."""
    parent: dict[str, str] = {}

    def root(node: str) -> str:
        parent.setdefault(node, node)
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for image in images:
        parent[root("image " + image.sha256)] = root("key " + image.key)
    numbers: dict[str, int] = {}
    group = tuple(numbers.setdefault(root("key " + image.key), len(numbers)) for image in images)
    keys: dict[int, set[str]] = defaultdict(set)
    for number, image in zip(group, images, strict=True):
        keys[number].add(image.key)
    return group, sum(len(k) > 1 for k in keys.values())
