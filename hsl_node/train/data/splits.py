"""Who is trained on, who validates, who tests: 60/10/30, stratified by label, grouped by patient. Pure.

A group is what must stay on one side: a patient, or an image without one, joined with whoever owns the very same image
or the same study. The order of the groups follows a hash of (seed, group), so neither file names nor their order decide
anything, and groups that have a place already keep it (`known`, see ledger.py): images added later move no patient.
Each image is known by its content as well, so it keeps its place when its patient is spelt otherwise, or lost.
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
    key: str  # hashed patient; hashed study where the patient is unknown; else the sha256 itself
    fixed: int | None = None  # the source's own split
    spellings: tuple[str, ...] = ()  # further pseudonyms of the patient, by which a ledger may know it
    study: str = ""  # hashed: images of one study are of one patient

    @property
    def grouped_by(self) -> str:
        return "image" if self.key == self.sha256 else "study" if self.key == self.study else "patient"

    @property
    def patient(self) -> str | None:
        """Its patient's pseudonym, or its study's; None: it stands alone."""
        return None if self.key == self.sha256 else self.key

    def places(self, known: Mapping[str, int]) -> set[int]:
        """The sides on which a ledger has this image, or its patient."""
        return {known[k] for k in (self.sha256, self.key, *self.spellings) if k in known}


@dataclass(frozen=True)
class Assignment:
    split: tuple[int, ...]  # per image
    group: tuple[int, ...]  # per image, counted from 0
    keys: dict[str, int]  # key, and sha256, of each image -> split, for the ledger
    joined: int  # groups that hold more than one patient, because these share an image


class SplitConflict(DataError):
    """Images that must be on one side are on two. `groups`: their positions, for whoever knows their names."""

    def __init__(self, message: str, *, groups: Sequence[tuple[int, ...]], remedy: str) -> None:
        images = sum(len(group) for group in groups)
        super().__init__(f"{message} ({images} images in {len(groups)} groups)", remedy=remedy)
        self.groups = tuple(groups)

    @property
    def images(self) -> tuple[int, ...]:
        return tuple(position for group in self.groups for position in group)


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
    cut, apart = [], []  # by the source's own split; by the ledger
    for number, positions in members.items():
        inside = [images[p] for p in positions]
        allowed, places = _placed(inside, pool, known or {})
        if len({m.fixed for m in inside} - {None}) > 1:
            cut.append(tuple(positions))
        elif len(places) > 1:
            apart.append(tuple(positions))
        label = min({m.label for m in inside}, key=lambda n: (frequency[n], -n))
        rank = hashlib.sha256(f"{seed}:{min(m.key for m in inside)}".encode("ascii")).hexdigest()
        strata[label, allowed].append(_Group(number, rank, len(inside), next(iter(places), None)))
    _require_one_side(cut, apart)
    place: dict[int, int] = {}
    for (_, allowed), groups in strata.items():
        place |= _fill(sorted(groups, key=lambda g: g.rank), allowed, percent)
    return Assignment(
        split=tuple(place[n] for n in group),
        group=group,
        keys={key: place[n] for n, image in zip(group, images, strict=True) for key in (image.key, image.sha256)},
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


def _require_one_side(cut: Sequence[tuple[int, ...]], apart: Sequence[tuple[int, ...]]) -> None:
    """Raises: SplitConflict: of all groups that the source's split, or the ledger, has on two sides."""
    if cut:
        raise SplitConflict(
            "the given split puts images of one patient, or one and the same image, on two sides",
            groups=cut,
            remedy='correct it, or let the node split: columns = { split = "" } under [data] in node.toml; or leave one'
            " side of each out with data.exclude",
        )
    if apart:
        raise SplitConflict(
            "images that belong together (one patient, one study, or the very same image) are already on different"
            " sides, where they were put before anybody knew that",
            groups=apart,
            remedy="undo what has changed in patients or columns since (without patients: columns = "
            '{ patient = "" } under [data] in node.toml), or list the files in data.exclude (`hsl-node data check`'
            " names them). Before another run: move splits.json away, and the node splits anew",
        )


def _placed(
    members: Sequence[Image], pool: tuple[int, ...], known: Mapping[str, int]
) -> tuple[tuple[int, ...], set[int]]:
    """The splits a group may go to, and those that it is in already."""
    fixed = next((m.fixed for m in members if m.fixed is not None), None)
    allowed = tuple(range(SPLITS)) if fixed is None else pool if fixed == 0 else (fixed,)
    if len(allowed) == 1:
        return allowed, set(allowed)
    return allowed, set().union(*(m.places(known) for m in members)) & set(allowed)


def _train_pool(images: Sequence[Image]) -> tuple[int, ...]:
    """Where images go that the source calls "train": there, or also to validation, if it names none at all."""
    given = {image.fixed for image in images}
    return (0, 1) if 0 in given and not given & {1, None} else (0,)


def _groups(images: Sequence[Image]) -> tuple[tuple[int, ...], int]:
    """Group number per image: same key, sha256 or study = same group. And how many join keys that share an image."""
    parent: dict[str, str] = {}

    def root(node: str) -> str:
        parent.setdefault(node, node)
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for image in images:
        parent[root("image " + image.sha256)] = root("key " + image.key)
        if image.study:
            parent[root("study " + image.study)] = root("key " + image.key)
    numbers: dict[str, int] = {}
    group = tuple(numbers.setdefault(root("key " + image.key), len(numbers)) for image in images)
    owners: dict[str, set[str]] = defaultdict(set)
    for image in images:
        owners[image.sha256].add(image.key)
    return group, len({n for n, image in zip(group, images, strict=True) if len(owners[image.sha256]) > 1})
