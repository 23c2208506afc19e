"""`hsl-node data check`: what is there, who trains and who tests, what is wrong. For the operator's own terminal.

The only place that names image files. Print the report; never log it or send it.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from hsl_node.federation.node_toml import DataConfig
from hsl_node.federation.plan import Plan
from hsl_node.train.data import file_headers
from hsl_node.train.data.dataset import (
    Dataset,
    SplitSummary,
    changed_since,
    dataset_of,
    digests_of,
    split,
    summary_of,
)
from hsl_node.train.data.doubts import counted, examine
from hsl_node.train.data.duplicates import near_duplicates
from hsl_node.train.data.folders import NO_IMAGE
from hsl_node.train.data.gathering import Gathered, read_images, window_of
from hsl_node.train.data.ledger import Since, read_begun, read_ledger, since, title_of
from hsl_node.train.data.preprocessing import Preprocessing
from hsl_node.train.data.sources import NODE_TOML, SPLIT_NAMES, first_few
from hsl_node.train.progress import Progress, unheard

ON_THIS_TERMINAL = replace(NODE_TOML, names_files=True)

LINE_MAX = 20  # file names in a line to copy; who has more writes a pattern


@dataclass(frozen=True)
class DataReport:
    """What `data check` found. `problems` would stop the node, `warnings` would not."""

    images: int  # readable ones that carry a class of the plan
    patients: int  # groups: patients, or single images where no patient is known
    grouped: bool  # False: no patients known, every image counts as one
    summary: SplitSummary
    account: dict[str, int]  # what became of every row or file: "used", or why it is not; their sum is what was read
    unit: str  # rows, files or images: what `account` counts
    taken: dict[str, dict[str, int]]  # column of the filter -> value -> rows
    excluded: dict[str, int] = field(repr=False)  # entry of data.exclude -> images
    counts: dict[str, dict[str, int]]  # class -> split -> images
    patient_counts: dict[str, int]  # split -> patients
    sites: dict[str, int]  # site column -> images
    channels: int  # 1 grey, 3 colour
    preprocessing: str  # what is done to each image, in words
    problems: tuple[str, ...]
    remedy: str  # for the problems
    warnings: tuple[str, ...]
    since: Since | None  # against what the run began with; None: no run began here
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
        known = {"summary": asdict(self.summary), "since": asdict(self.since) if self.since else None}
        return {"schema": "hsl-data-report-1", "ok": self.ok, **found, **known, "unreadable": unreadable}


def check(
    data: DataConfig, plan: Plan, *, cache: Path, ledger: Path, run: str = "", progress: Progress = unheard
) -> DataReport:
    """Look at everything `open_dataset` would use, and go on where it would stop. The split ledger is not changed.

    `run`: the digest of the federation, to compare with what its run began with.

    Raises:
        DataError: the source itself cannot be used (no such folder, a missing column, a label that is no class, a
            patient on two sides).
    """
    gathered, pixels = read_images(data, plan, cache, progress, tells_all=True, asked=ON_THIS_TERMINAL)
    name = gathered.source.name
    assignment = split(gathered, plan, read_ledger(ledger).get(title_of(plan), {}), name, list)
    found = examine(data, gathered, pixels, assignment, plan, name, list)
    problems = [problem.text for problem in found.problems]
    remedy = found.remedy if gathered.items else ""
    if gathered.unreadable:
        problems.insert(0, f"{len(gathered.unreadable)} images cannot be read")
        listed = [json.dumps(name(item), ensure_ascii=False) for item, _ in gathered.unreadable]
        line = f"exclude = [{', '.join([*listed[:LINE_MAX], *(['...'] if len(listed) > LINE_MAX else [])])}]"
        own = f"replace or convert the unreadable files, or leave them out: {line} under [data] in node.toml"
        remedy = f"{remedy}; {own}" if remedy else own
    names = [name(item) for item in gathered.items]
    groups, sides = np.array(assignment.group, dtype=np.int64), np.array(assignment.split, dtype=np.int8)
    near = near_duplicates(pixels, sides, groups) if pixels is not None else []
    twins = _duplicates(gathered, names)
    begun, here = read_begun(ledger), digests_of(gathered.images, plan)
    summary = summary_of(gathered.images, assignment)
    return DataReport(
        images=len(gathered.items),
        patients=len(set(assignment.group)),
        grouped=summary.named["image"] < len(gathered.images),
        summary=summary,
        account=account_of(gathered),
        unit=gathered.source.unit,
        taken={column: dict(values) for column, values in gathered.source.taken.items()},
        excluded=dict(gathered.source.excluded),
        counts={
            name: dict(zip(SPLIT_NAMES, row.tolist(), strict=True))
            for name, row in zip(plan.classes, counted(gathered.images, assignment, plan), strict=True)
        },
        patient_counts=summary.groups,
        sites=dict(sorted(Counter(i.site for i in gathered.items if i.site).items())),
        channels=3 if pixels is not None and pixels.ndim == 4 else 1,
        preprocessing=Preprocessing.of(plan, window_of(data)).words(),
        problems=tuple(problems),
        remedy=remedy,
        warnings=(
            *found.warnings,
            *changed_since(begun, run, here),
            *_remarks(gathered, near, twins),
            *file_headers.remarks(gathered.items, plan, progress),
        ),
        since=since(begun, run, here),
        unreadable=tuple((name(item), reason) for item, reason in gathered.unreadable),
        duplicates=twins,
        near_duplicates=tuple((names[i], names[j]) for i, j in near),
        dataset=dataset_of(gathered, pixels, assignment, ()) if pixels is not None else None,
    )


def account_of(gathered: Gathered) -> dict[str, int]:
    """What became of every row, file or image that was read: the sum is their number."""
    return {
        "used": len(gathered.items),
        **gathered.source.left,
        **{f'label {label!r} = "" in data.labels': count for label, count in gathered.unwanted.items()},
        **({"cannot be read": len(gathered.unreadable)} if gathered.unreadable else {}),
    }


def _remarks(gathered: Gathered, near: Sequence[object], twins: Sequence[object]) -> list[str]:
    remarks = []
    if near:
        remarks.append(
            f"{len(near)} pairs of images of different patients look the same but lie in different splits:"
            " test results may come out too good"
        )
    if twins:
        remarks.append(f"{len(twins)} images are there more than once")
    if passed := gathered.source.left.get(NO_IMAGE):
        remarks.append(f"{passed} files of the folder are no images and were passed over")
    if gathered.source.unmatched:
        remarks.append(f"data.exclude: no image is called {', '.join(first_few(gathered.source.unmatched))}")
    return remarks


def _duplicates(gathered: Gathered, names: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    same: dict[str, list[str]] = defaultdict(list)
    for image, name in zip(gathered.images, names, strict=True):
        same[image.sha256].append(name)
    return tuple(tuple(files) for files in same.values() if len(files) > 1)
