"""The anchor set: the one public task that all peers train beside their own. Built once, the same file everywhere.

One canonical safetensors file: `card` (JSON: name, classes), `images`, `labels`, all U8. The same images, classes, n
and seed give the same bytes; the file's sha256 is its fingerprint, which the federation and every manifest name.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hsl_node.errors import DataError, FederationMismatch, PeerDataError
from hsl_node.federation.canonical import canonical_json
from hsl_node.federation.config import AnchorCard
from hsl_node.federation.names import Digest
from hsl_node.federation.node_toml import DataConfig
from hsl_node.federation.strings import plain_name
from hsl_node.host import wrong_paths
from hsl_node.train.data.cache import Unreadable, as_colour, decode_all
from hsl_node.train.data.gathering import Gathered, gather_labelled, unreadable_error, window_of
from hsl_node.train.data.labels import labels_of, same_letters
from hsl_node.train.data.listing import read_source
from hsl_node.train.data.pixels import to_square
from hsl_node.train.data.preprocessing import Preprocessing
from hsl_node.train.data.sources import ANCHOR_BUILD
from hsl_node.train.progress import Progress, unheard
from hsl_node.weights.checkpoint_file import Schema, read_schema, write_weights
from hsl_node.weights.whole import sha256_of

Array = NDArray[Any]

ANCHOR_VERSION = 1
DIGITS_NAME = "stand-in: scikit-learn digits, 3 against 8 (not medical)"
DIGITS = (3, 8)  # alike enough that telling them apart takes more than brightness
DIGITS_MAX = 16  # brightest value in scikit-learn's scans


@dataclass(frozen=True)
class AnchorSet:
    """Two classes, 1:1. N images of S × S px, in the order of a hash: neither sorted by class nor by file."""

    name: str
    classes: tuple[str, str]
    images: Array  # (N, S, S) grey or (N, S, S, 3) colour, uint8
    labels: Array  # (N,) int64, 0 or 1

    @property
    def image_size(self) -> int:
        return int(self.images.shape[1])


def build(
    data: DataConfig,
    *,
    name: str,
    classes: tuple[str, str],
    image_size: int,
    n: int | None = None,
    seed: int = 1,
    progress: Progress = unheard,
) -> AnchorSet:
    """Choose n images of each class and decode them; n = None: as many as the rarer class has.

    The choice follows a hash of (seed, image): file names, order and further classes of the source do not matter. An
    image that is there twice counts once, one that bears both labels not at all. The source's own splits are ignored.

    Raises:
        DataError: a class has fewer than n images, or a chosen image cannot be read.
    """
    try:
        plain_name(name)
    except ValueError as exc:
        raise DataError(f"the name of the anchor set: {exc}", remedy="give another one with --name") from exc
    source = read_source(data, ANCHOR_BUILD)
    labels = labels_of(source, classes, data.labels, select=True)
    for label, wanted in enumerate(classes):
        if label not in labels:
            words = sorted({item.label for item in source.items})
            raise DataError(
                f"no image is labelled {wanted!r}{same_letters(wanted, words)}",
                remedy=f"give two labels of this source with --classes: {', '.join(words[:20])}",
            )
    gathered = gather_labelled(source, labels, None, progress)
    if gathered.unreadable:
        raise unreadable_error(gathered)
    found = [image.label for image in gathered.images]
    chosen = _choose([image.sha256 for image in gathered.images], found, classes, n, seed)
    preprocessing = Preprocessing(image_size=image_size, window=window_of(data))
    images = _decode(gathered, chosen, preprocessing, progress)
    return AnchorSet(name, classes, images, np.array([found[i] for i in chosen], dtype=np.int64))


def digits_standin(image_size: int, *, n: int | None = None, seed: int = 1) -> AnchorSet:
    """The set for trials and tests: scikit-learn's bundled scans of handwritten digits, 174 of each class at most.

    It shows that everything works. For real training agree on a public medical set.
    """
    from sklearn.datasets import load_digits

    bundle = load_digits()
    scans = (bundle.images * 255 / DIGITS_MAX + 0.5).astype(np.uint8)  # (1797, 8, 8)
    of_class = np.flatnonzero(np.isin(bundle.target, DIGITS))
    labels = [DIGITS.index(int(bundle.target[i])) for i in of_class]
    digests = [hashlib.sha256(scans[i].tobytes()).hexdigest() for i in of_class]
    classes = (f"digit {DIGITS[0]}", f"digit {DIGITS[1]}")
    chosen = _choose(digests, labels, classes, n, seed)
    images = np.stack([to_square(scans[of_class[i]], image_size) for i in chosen])
    return AnchorSet(DIGITS_NAME, classes, images, np.array([labels[i] for i in chosen], dtype=np.int64))


def save(anchor: AnchorSet, path: Path) -> Digest:
    """Write the canonical file durably; gives back its fingerprint."""
    card = canonical_json({"version": ANCHOR_VERSION, "name": anchor.name, "classes": list(anchor.classes)})
    tensors = {
        "card": np.frombuffer(card, dtype=np.uint8),
        "images": anchor.images,
        "labels": anchor.labels.astype(np.uint8),
    }
    try:
        return write_weights(path, tensors)
    except OSError as exc:
        raise wrong_paths.explained(exc, path=path) from exc


def load(path: Path, expected: str | None = None) -> AnchorSet:
    """Open an anchor file; the images stay on disk, mapped into memory.

    Raises:
        FederationMismatch: the file's fingerprint is not the expected one.
        DataError: no such file, or no anchor set.
    """
    actual = fingerprint(path)
    if expected is not None and actual != expected:
        raise FederationMismatch(
            f"anchor set {path.name} has fingerprint {actual}, the federation says {expected}",
            remedy="get the anchor file from whoever made the federation file; all peers need the same one",
        )
    try:
        return _parse(path, read_schema(path))
    except (PeerDataError, OSError, ValueError, KeyError, TypeError, RecursionError) as exc:
        raise DataError(
            f"{path} is not an anchor set: {exc}", remedy="make one with `hsl-node anchor build`, or get it from a peer"
        ) from exc


def fingerprint(path: Path) -> Digest:
    """sha256 of the file, streamed. Raises DataError where there is none."""
    try:
        return sha256_of(path)
    except OSError as exc:
        said = wrong_paths.explained(exc, path=path)
        remedy = f"{said.remedy}; a node's anchor file is named by `anchor` in node.toml"
        raise DataError(f"the anchor set cannot be read: {said.message}", remedy=remedy) from exc


def card_of(path: Path) -> AnchorCard:
    """What a federation file says of this anchor file."""
    anchor = load(path)
    return AnchorCard(
        name=anchor.name, fingerprint=fingerprint(path), images=len(anchor.labels), image_size=anchor.image_size
    )


def verify(path: Path, card: AnchorCard) -> AnchorSet:
    """Open the file and check it against the federation's card.

    Raises:
        FederationMismatch: another file, or the card's number or size of images is not the file's.
    """
    anchor = load(path, card.fingerprint)
    if (len(anchor.labels), anchor.image_size) != (card.images, card.image_size):
        raise FederationMismatch(
            f"anchor set {path.name} holds {len(anchor.labels)} images of {anchor.image_size} px,"
            f" the federation says {card.images} of {card.image_size} px",
            remedy="the federation file was written by hand: make it anew with `hsl-node federation create`",
        )
    return anchor


# ---------------------------------------------------------------- below


def _choose(
    digests: Sequence[str], labels: Sequence[int], classes: tuple[str, str], n: int | None, seed: int
) -> list[int]:
    """Positions of the chosen images, in hash order."""
    places: dict[str, list[int]] = defaultdict(list)
    for place, digest in enumerate(digests):
        places[digest].append(place)
    usable = (digest for digest, copies in places.items() if len({labels[p] for p in copies}) == 1)
    queue = [places[d][0] for d in sorted(usable, key=lambda d: hashlib.sha256(f"{seed}:{d}".encode("ascii")).digest())]
    of_class = [[place for place in queue if labels[place] == label] for label in range(2)]
    have = [len(those) for those in of_class]
    wanted = min(have) if n is None else n
    if not 1 <= wanted <= min(have):
        raise DataError(
            f"the anchor set needs {wanted} different images of each class, there are {have[0]} {classes[0]!r}"
            f" and {have[1]} {classes[1]!r}",
            remedy=f"ask for at most {min(have)} each, or leave the number out for as many as there are",
        )
    chosen = {*of_class[0][:wanted], *of_class[1][:wanted]}
    return [place for place in queue if place in chosen]


def _decode(gathered: Gathered, chosen: list[int], preprocessing: Preprocessing, progress: Progress) -> Array:
    try:
        images = list(decode_all([gathered.items[i] for i in chosen], preprocessing, progress))
    except Unreadable as exc:
        reasons = {chosen[place]: reason for place, reason in exc.reasons.items()}
        raise unreadable_error(gathered.without(reasons)) from None
    if any(image.ndim == 3 for image in images):
        images = [as_colour(image) for image in images]
    return np.stack(images)


def _parse(path: Path, schema: Schema) -> AnchorSet:
    specs = {spec.name: spec for spec in schema.tensors}
    if set(specs) != {"card", "images", "labels"} or any(spec.dtype != "U8" for spec in specs.values()):
        raise ValueError("other tensors than card, images, labels")
    if path.stat().st_size != schema.file_bytes:
        raise ValueError("its size is not what its header says")
    mapped = {
        name: np.memmap(path, dtype=np.uint8, mode="r", offset=spec.offset, shape=spec.shape)
        for name, spec in specs.items()
    }
    card = json.loads(mapped["card"].tobytes())
    if card["version"] != ANCHOR_VERSION:
        raise ValueError(f"version {card['version']}; this node reads version {ANCHOR_VERSION}")
    images, labels = mapped["images"], np.array(mapped["labels"], dtype=np.int64)
    if images.ndim not in (3, 4) or images.shape[1] != images.shape[2] or images.shape[3:] not in ((), (3,)):
        raise ValueError(f"images of shape {images.shape}")
    if labels.shape != images.shape[:1] or not np.array_equal(np.unique(labels), [0, 1]):
        raise ValueError("labels that do not fit the images, or not two classes")
    first, second = (plain_name(str(name)) for name in card["classes"])
    return AnchorSet(plain_name(str(card["name"])), (first, second), images, labels)
