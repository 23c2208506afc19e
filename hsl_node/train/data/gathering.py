"""List, label, digest and decode the images: what training, `data check` and the anchor set have in common.

No message of this file holds an image's path or a patient: it may end up in a log.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from hsl_node.errors import DataError
from hsl_node.federation.node_toml import DataConfig
from hsl_node.federation.plan import Plan
from hsl_node.train.data.cache import Unreadable, open_images
from hsl_node.train.data.digests import Digest, digest_items
from hsl_node.train.data.labels import labels_of
from hsl_node.train.data.listing import read_source
from hsl_node.train.data.patients import Owner, table_owner
from hsl_node.train.data.pixels import UnreadableImage
from hsl_node.train.data.preprocessing import Preprocessing, Window
from hsl_node.train.data.sources import NODE_TOML, Asked, Item, Source, first_few
from hsl_node.train.data.splits import Image
from hsl_node.train.progress import Progress

Array = NDArray[Any]


@dataclass(frozen=True)
class Gathered:
    """The chosen items of a source, and what is known of their images; what cannot be read stands apart."""

    source: Source
    items: tuple[Item, ...]
    images: tuple[Image, ...]  # of each item
    digests: tuple[Digest, ...]  # the same
    unreadable: tuple[tuple[Item, str], ...]  # item, reason
    unwanted: Mapping[str, int]  # label that data.labels leaves out -> images

    def without(self, reasons: dict[int, str]) -> Gathered:
        """Set items aside that turned out to be undecodable."""
        keep = [n for n in range(len(self.items)) if n not in reasons]
        return replace(
            self,
            items=tuple(self.items[n] for n in keep),
            images=tuple(self.images[n] for n in keep),
            digests=tuple(self.digests[n] for n in keep),
            unreadable=self.unreadable + tuple((self.items[n], reason) for n, reason in reasons.items()),
        )


def read_images(
    data: DataConfig,
    plan: Plan,
    cache: Path,
    progress: Progress,
    *,
    tells_all: bool,
    asked: Asked = NODE_TOML,
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
    index = index_of(source, cache) if cache else None
    looked_at = digest_items([i for i, _ in chosen], index, progress)
    by_file = _owners_by_file([item for item, _ in chosen], looked_at)
    items, images, digests, unreadable = [], [], [], []
    for (item, label), found in zip(chosen, looked_at, strict=True):
        if isinstance(found, UnreadableImage):
            unreadable.append((item, found.message))
        else:
            items.append(item)
            images.append(_image(item, label, found, by_file))
            digests.append(found)
    unwanted = Counter(item.label for item, label in zip(source.items, labels, strict=True) if label is None)
    return Gathered(source, tuple(items), tuple(images), tuple(digests), tuple(unreadable), unwanted)


def index_of(source: Source, cache: Path) -> Path:
    return cache / f"{hashlib.sha256(bytes(source.path.absolute())).hexdigest()[:16]}.index"


def _owners_by_file(items: Sequence[Item], looked_at: Sequence[Digest | UnreadableImage]) -> dict[str, Owner]:
    """What DICOM files call a patient or a study -> whom the table names for one of their images."""
    return {
        word: owner
        for item, found in zip(items, looked_at, strict=True)
        if isinstance(found, Digest) and (owner := table_owner(item.patient)).patient
        for word in (*found.owner.patient[:1], found.owner.study)
        if word
    }


def _image(item: Item, label: int, found: Digest, by_file: Mapping[str, Owner]) -> Image:
    """A table's own patient column decides, also by another image of the same PatientID or study; then the patient of a
    DICOM file, then its study; else it stands alone. An earlier version's ledger knows it by the cell's own word, also
    "unknown", or by its file's PatientID."""
    owner = table_owner(item.patient)
    before = [owner.once if item.patient else found.owner.once]
    if not owner.patient:
        before += found.owner.patient
        known = [by_file[word] for word in (*found.owner.patient[:1], found.owner.study) if word in by_file]
        owner = known[0] if known else found.owner
    key, *spellings = owner.patient or (owner.study or found.sha256,)
    return Image(found.sha256, label, key, item.split, (*spellings, *filter(None, before)), owner.study)


def window_of(data: DataConfig) -> Window | None:
    """The operator's own window for DICOM and 16-bit images, if node.toml sets one."""
    if (data.window_center is None) != (data.window_width is None):
        raise DataError(
            "data.window_center and data.window_width belong together", remedy="set both in node.toml, or neither"
        )
    if data.window_center is None or data.window_width is None:
        return None
    return Window(center=data.window_center, width=data.window_width)


def unreadable_error(
    gathered: Gathered,
    name: Callable[[Item], str] = lambda item: item.where,
    remedy: str = "`hsl-node data check` names the files: replace them, or list them in data.exclude in node.toml",
) -> DataError:
    """How many images cannot be read, which, and why. `name` words an image; the default is safe to log."""
    bad, every = gathered.unreadable, len(gathered.items) + len(gathered.unreadable)
    lines = first_few(f"{name(item)}: {reason}" for item, reason in bad)
    return DataError("\n".join([f"{len(bad)} of {every} images cannot be read", *lines]), remedy=remedy)
