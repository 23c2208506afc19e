"""What makes training impossible, and what to doubt of images, labels and patients: `start` and `data check` ask here.

No message names an image's path or a patient, but for what `name` makes of an item: it may end up in a log.
"""

from __future__ import annotations

import hashlib
import json
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hsl_node.federation.node_toml import DataConfig
from hsl_node.federation.plan import Plan
from hsl_node.train.data.gathering import Gathered
from hsl_node.train.data.patients import names_somebody, spelling
from hsl_node.train.data.sources import NODE_TOML, SPLIT_NAMES, TEST, TRAIN, Item, first_few
from hsl_node.train.data.splits import Assignment, Image

Array = NDArray[Any]

FEW = 3  # images of a class in a split: fewer say little, and one patient decides
MANY, MANY_TIMES, MANY_SHARE = 10, 5, 0.05  # images of one patient: so many, times the usual, of all: a placeholder?
NEARLY_ALL = 0.8  # of the patients have a number in their identifier
_MASK = re.compile(
    r"(^|[_. -])(masks?|seg|segmentations?|annotations?|annotated|overlays?|contours?)(?=[_. \d-]|$)", re.I
)
_FILLER = re.compile(r"0|9{2,}")
TINY_PX = 16  # a thumbnail or an icon; the smallest public sets have 28

TOO_FEW = (
    "every class needs images of at least three patients; add images, widen data.filter, or map labels with"
    " data.labels in node.toml (`hsl-node data check` shows the counts)"
)
TWO_LABELS = (
    "find out which label is right, and correct the other row or remove the other file; or leave them out with"
    " data.exclude (`hsl-node data check` names the files)"
)
ALONE = "so two images of one patient may lie in training and in test"


@dataclass(frozen=True)
class Problem:
    text: str
    remedy: str


@dataclass(frozen=True)
class Findings:
    problems: tuple[Problem, ...]
    warnings: tuple[str, ...]

    @property
    def remedy(self) -> str:
        return "; ".join(dict.fromkeys(problem.remedy for problem in self.problems))


def examine(
    data: DataConfig,
    gathered: Gathered,
    pixels: Array | None,
    assignment: Assignment,
    plan: Plan,
    name: Callable[[Item], str] = lambda item: item.where,
    listed: Callable[[Iterable[str]], list[str]] = first_few,
) -> Findings:
    """Everything to say of images that could be read. `pixels` None: of their bytes alone."""
    problems, warnings = judge(gathered.images, assignment, plan)
    return Findings(
        tuple(_two_labels(gathered, pixels, plan, name, listed) + [Problem(text, TOO_FEW) for text in problems]),
        tuple(
            [
                *gathered.source.doubts,
                *warnings,
                *_patients(data, gathered),
                *_masks(data, gathered),
                *_pictures(gathered, pixels),
            ]
        ),
    )


def judge(images: Sequence[Image], assignment: Assignment, plan: Plan) -> tuple[list[str], list[str]]:
    """Of the counts: what makes training impossible, and what merely limits it."""
    count = counted(images, assignment, plan)
    patients = Counter(label for _, label in {(g, i.label) for g, i in zip(assignment.group, images, strict=True)})
    problems: list[str] = []
    warnings: list[str] = []
    for c, name in enumerate(plan.classes):
        counts = ", ".join(f"{SPLIT_NAMES[s]} {count[c, s]}" for s in range(len(SPLIT_NAMES)))
        facts = f"{count[c].sum()} images of {patients[c]} patients: {counts}"
        if count[c].sum() == 0 and may_lack_a_class([bool(n) for n in count.sum(axis=1)]):
            warnings.append(f"class {name!r} has no images here: AUC and its like are means over the other classes")
        elif count[c].sum() == 0:
            problems.append(f"class {name!r} has no images")
        elif count[c, TRAIN] == 0:
            problems.append(f"class {name!r} has no image to train on ({facts})")
        else:
            lacks = [s for s in range(1, len(SPLIT_NAMES)) if count[c, s] == 0]
            for s in lacks:
                known = problems if s != TEST and np.count_nonzero(count[:, s]) < 2 else warnings
                means = ": AUC there is the mean over the others" if np.count_nonzero(count[:, s]) > 1 else ""
                known.append(f"the {SPLIT_NAMES[s]} split lacks class {name!r} ({facts}){means}")
            if not lacks and count[c].min() < FEW:
                warnings.append(f"class {name!r} has few images: below {FEW} in a split, figures say little ({facts})")
    present = np.flatnonzero(count[:, TEST])
    if len(present) < 2 and not problems:
        what = f"one class only ({plan.classes[present[0]]!r})" if len(present) else "no images"
        warnings.append(f"the test split holds {what}: its AUC will be undefined")
    if assignment.joined:
        warnings.append(
            f"{assignment.joined} groups of patients share an identical image and were kept on one side each"
        )
    return problems, warnings


def may_lack_a_class(present: Sequence[bool]) -> bool:
    """Which classes there are images of. With two there is something to tell apart; the third is learnt from others."""
    return sum(present) > 1


def counted(images: Sequence[Image], assignment: Assignment, plan: Plan) -> Array:
    """Images per class and split."""
    count = np.zeros((len(plan.classes), len(SPLIT_NAMES)), dtype=int)
    np.add.at(count, ([image.label for image in images], list(assignment.split)), 1)
    return count


# ---------------------------------------------------------------- labels


def _two_labels(
    gathered: Gathered,
    pixels: Array | None,
    plan: Plan,
    name: Callable[[Item], str],
    listed: Callable[[Iterable[str]], list[str]],
) -> list[Problem]:
    """One image under two labels: the same bytes, or other bytes that decode to the same picture."""
    same: dict[str, list[int]] = defaultdict(list)
    for n, image in enumerate(gathered.images):
        square = pixels[n] if pixels is not None and not _is_flat(pixels[n]) else None
        same[image.sha256 if square is None else f"{hashlib.sha256(square).hexdigest()} decoded"].append(n)
    found = [those for those in same.values() if len({gathered.images[n].label for n in those}) > 1]
    if not found:
        return []

    def told(n: int) -> str:
        return f"{name(gathered.items[n])} {plan.classes[gathered.images[n].label]!r}"

    lines = listed(" = ".join(listed(told(n) for n in those)) for those in sorted(found))
    return [Problem(f"{len(found)} images are there under two labels: {'; '.join(lines)}", TWO_LABELS)]


# ---------------------------------------------------------------- patients


def _patients(data: DataConfig, gathered: Gathered) -> list[str]:
    images, items, total = gathered.images, gathered.items, len(gathered.images)
    by = Counter(image.grouped_by for image in images)
    doubts = []
    if by["image"]:
        unnamed = [item for item, image in zip(items, images, strict=True) if image.grouped_by == "image"]
        words = Counter(item.patient or "empty" for item in unnamed)
        said = ", ".join(first_few(f"{word!r} {n}" if word != "empty" else f"empty {n}" for word, n in words.items()))
        said = f" ({said})" if set(words) - {"empty"} or by["image"] < total else ""
        whole = f"no patient is known{said}: every image counts as a patient of its own"
        part = f"{by['image']} of {total} images name no patient{said} and count as a patient each"
        doubts.append(f"{whole if by['image'] == total else part}, {ALONE}; {_remedy(data, gathered)}")
    if by["study"]:
        doubts.append(
            f"{by['study']} of {total} images name no patient and are grouped by their DICOM study: two studies of one"
            " patient may lie in training and in test"
        )
    of_study: dict[str, set[str]] = defaultdict(set)
    for image in images:
        if image.study and image.grouped_by == "patient":
            of_study[image.study].add(image.key)
    if shared := [keys for keys in of_study.values() if len(keys) > 1]:
        doubts.append(
            f"{len(set().union(*shared))} patients share {len(shared)} StudyInstanceUID and were kept on one side for"
            " each: if one was written into all files when they were made anonymous, name the patients in a table"
        )
    return doubts + _odd_patients(gathered)


def _remedy(data: DataConfig, gathered: Gathered) -> str:
    likely, path = gathered.source.likely_patient, gathered.source.path
    if likely:
        line = NODE_TOML.columns({**data.columns, "patient": likely})
        return f"if column {likely!r} names the patients: {line}"
    tables = sorted(p.name for p in path.glob("*.csv")) if path.is_dir() else []
    if any(item.patient for item in gathered.items):
        return "fill in the patient column of the table"
    return "use a table with a patient column" + (f" ({tables[0]}?)" if tables else "")


def _odd_patients(gathered: Gathered) -> list[str]:
    """Identifiers that may be none, or may be of one patient."""
    images, total = gathered.images, len(gathered.images)
    doubts = []
    counts = Counter(image.key for image in images if image.grouped_by == "patient")
    usual = statistics.median(counts.values()) if len(counts) > 1 else 0
    if counts and len(counts) != 2:  # of two each may have half
        key, most = counts.most_common(1)[0]
        if most >= max(MANY, MANY_TIMES * usual, MANY_SHARE * total):
            first = next(i.where for i, image in zip(gathered.items, images, strict=True) if image.key == key)
            doubts.append(
                f"one patient has {most} of {total} images"
                + (f", half of the others at most {usual:g}" if len(counts) > 1 else "")
                + ": does the identifier stand for an unknown patient, or did a spreadsheet round it (1.2E+11)?"
                f" The first of these images: {first}"
            )
    doubts += _placeholders(gathered, counts, usual)
    spelt: dict[str, set[str]] = defaultdict(set)
    by_file: dict[str, set[str]] = defaultdict(set)
    for item, image, digest in zip(gathered.items, images, gathered.digests, strict=True):
        if names_somebody(item.patient):
            spelt[image.key].add(item.patient or "")
            if digest.owner.patient:
                by_file[digest.owner.patient[0]].add(image.key)
    if several := sum(len(words) > 1 for words in spelt.values()):
        doubts.append(f"{several} patients are spelt in several ways (as 7, 7.0 and 007) and count as one each")
    if len(by_file) > 1 and (torn := [keys for keys in by_file.values() if len(keys) > 1]):
        doubts.append(
            f"{len(set().union(*torn))} patients of the table are {len(torn)} by the PatientID of their DICOM files:"
            f" is its patient column the right one? If not, {ALONE}"
        )
    return doubts


def _placeholders(gathered: Gathered, counts: Counter[str], usual: float) -> list[str]:
    """Patients of a table called otherwise than nearly all: a word among numbers; 0 or 9999 with many images."""
    words: dict[str, tuple[str, str]] = {}
    for item, image in zip(gathered.items, gathered.images, strict=True):
        if names_somebody(item.patient):
            words.setdefault(image.key, (spelling(item.patient or ""), item.where))
    numbered = sum(any(c.isdigit() for c in word) for word, _ in words.values())
    odd = {
        key: where
        for key, (word, where) in words.items()
        if (numbered >= NEARLY_ALL * len(words) and not any(c.isdigit() for c in word))
        or (_FILLER.fullmatch(word) and counts[key] > 2 * usual)
    }
    if not odd:
        return []
    return [
        f"{sum(counts[key] for key in odd)} of {len(gathered.images)} images are of {len(odd)} patients called unlike"
        " the others (a word among numbers; 0 or 9999 with many images): if these stand for unknown patients, empty"
        f" their cells in the table. The first: {', '.join(first_few(odd.values()))}"
    ]


# ---------------------------------------------------------------- pictures


def _masks(data: DataConfig, gathered: Gathered) -> list[str]:
    """Files called so beside others that are not: outlines and overlays of the images, which train as images."""
    called = [found for item in gathered.items if not item.row and (found := _MASK.search(item.path.stem))]
    if not called or len(called) == len(gathered.items):
        return []
    patterns = sorted({f"{'*' if found[1] else ''}{found[0]}*" for found in called})
    return [
        f"{len(called)} of {len(gathered.items)} images are called mask or the like, and train as images. To leave them"
        f" out: exclude = {json.dumps([*data.exclude, *patterns], ensure_ascii=False)} under [data] in node.toml"
    ]


def _pictures(gathered: Gathered, pixels: Array | None) -> list[str]:
    tiny = sum(0 < digest.side < TINY_PX for digest in gathered.digests)
    flat = sum(_is_flat(image) for image in pixels) if pixels is not None else 0
    total = len(gathered.images)
    return [f"{tiny} of {total} images are smaller than {TINY_PX} px: thumbnails?"] * bool(tiny) + [
        f"{flat} of {total} images are of one colour all over: nothing can be learned from them"
    ] * bool(flat)


def _is_flat(image: Array) -> bool:
    return bool((image == image.reshape(-1, *image.shape[2:])[0]).all())
