"""`hsl-node data check`: what is there, who trains and who tests, what is wrong. For the operator's own terminal.

The only place that names image files. Print the report; never log it or send it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from hsl_node.federation.node_toml import DataConfig
from hsl_node.federation.plan import Plan
from hsl_node.train.data import outlines
from hsl_node.train.data.dataset import Dataset, Gathered, counted, dataset_of, judge, read_images, split, window_of
from hsl_node.train.data.duplicates import near_duplicates
from hsl_node.train.data.ledger import read_ledger, title_of
from hsl_node.train.data.preprocessing import Preprocessing
from hsl_node.train.data.sources import SPLIT_NAMES, first_few
from hsl_node.train.data.splits import Assignment
from hsl_node.train.progress import Progress, unheard


@dataclass(frozen=True)
class DataReport:
    """What `data check` found. `problems` would stop the node, `warnings` would not."""

    images: int  # readable ones that carry a class of the plan
    patients: int  # groups: patients, or single images where no patient is known
    grouped: bool  # False: no patients known, every image counts as one
    counts: dict[str, dict[str, int]]  # class -> split -> images
    patient_counts: dict[str, int]  # split -> patients
    sites: dict[str, int]  # site column -> images
    channels: int  # 1 grey, 3 colour
    preprocessing: str  # what is done to each image, in words
    problems: tuple[str, ...]
    warnings: tuple[str, ...]
    unreadable: tuple[tuple[str, str], ...] = field(repr=False)  # file, reason
    duplicates: tuple[tuple[str, ...], ...] = field(repr=False)  # files with the very same content
    near_duplicates: tuple[tuple[str, str], ...] = field(repr=False)  # files on two sides that show the same picture
    dataset: Dataset | None = field(repr=False, default=None)  # None: nothing readable

    @property
    def ok(self) -> bool:
        return not self.problems

    def as_json(self) -> dict[str, Any]:
        """Everything but the pixels, file names included: for `--json` on the operator's terminal."""
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "dataset"}
        unreadable = [{"file": file, "reason": reason} for file, reason in self.unreadable]
        return {"schema": "hsl-data-report-1", "ok": self.ok, **found, "unreadable": unreadable}


def check(data: DataConfig, plan: Plan, *, cache: Path, ledger: Path, progress: Progress = unheard) -> DataReport:
    """Look at everything `open_dataset` would use, and go on where it would stop. The split ledger is not changed.

    Raises:
        DataError: the source itself cannot be used (no such folder, a missing column, a label that is no class, a
            patient on two sides).
    """
    gathered, pixels = read_images(data, plan, cache, progress, tells_all=True)
    assignment = split(gathered, plan, read_ledger(ledger).get(title_of(plan), {}), gathered.source.name)
    problems, warnings = judge(gathered.images, assignment, plan)
    if gathered.unreadable:
        problems.insert(0, f"{len(gathered.unreadable)} images cannot be read")
    names = [gathered.source.name(item) for item in gathered.items]
    groups, sides = np.array(assignment.group, dtype=np.int64), np.array(assignment.split, dtype=np.int8)
    near = near_duplicates(pixels, sides, groups) if pixels is not None else []
    twins = _duplicates(gathered, names)
    grouped = any(image.key != image.sha256 for image in gathered.images)
    warnings += _remarks(data, gathered, near, twins, grouped) + outlines.remarks(gathered.items, plan, progress)
    return DataReport(
        images=len(gathered.items),
        patients=len(set(assignment.group)),
        grouped=grouped,
        counts={
            name: dict(zip(SPLIT_NAMES, row.tolist(), strict=True))
            for name, row in zip(plan.classes, counted(gathered.images, assignment, plan), strict=True)
        },
        patient_counts=_patients(assignment),
        sites=dict(sorted(Counter(i.site for i in gathered.items if i.site).items())),
        channels=3 if pixels is not None and pixels.ndim == 4 else 1,
        preprocessing=Preprocessing.of(plan, window_of(data)).words(),
        problems=tuple(problems),
        warnings=tuple(warnings),
        unreadable=tuple((gathered.source.name(item), reason) for item, reason in gathered.unreadable),
        duplicates=twins,
        near_duplicates=tuple((names[i], names[j]) for i, j in near),
        dataset=dataset_of(gathered, pixels, assignment, ()) if pixels is not None else None,
    )


def _remarks(
    data: DataConfig, gathered: Gathered, near: Sequence[object], twins: Sequence[object], grouped: bool
) -> list[str]:
    remarks = []
    if near:
        remarks.append(
            f"{len(near)} pairs of images of different patients look the same but lie in different splits:"
            " test results may come out too good"
        )
    if twins:
        remarks.append(f"{len(twins)} images are there more than once")
    if not grouped:
        tables = sorted(p.name for p in data.path.glob("*.csv")) if data.path and data.path.is_dir() else []
        remarks.append(
            "no patient is known: every image counts as a patient of its own, so two images of one patient may lie"
            " in training and in test; use a table with a patient column" + (f" ({tables[0]}?)" if tables else "")
        )
    if gathered.source.skipped:
        remarks.append(f"{gathered.source.skipped} files of the folder are no images and were passed over")
    if gathered.source.unmatched:
        remarks.append(f"data.exclude: no image is called {', '.join(first_few(gathered.source.unmatched))}")
    return remarks


def _duplicates(gathered: Gathered, names: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    same: dict[str, list[str]] = defaultdict(list)
    for image, name in zip(gathered.images, names, strict=True):
        same[image.sha256].append(name)
    return tuple(tuple(files) for files in same.values() if len(files) > 1)


def _patients(assignment: Assignment) -> dict[str, int]:
    sides = Counter(side for _, side in set(zip(assignment.group, assignment.split, strict=True)))
    return {name: sides[s] for s, name in enumerate(SPLIT_NAMES)}
