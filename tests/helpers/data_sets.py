"""Small data sets out of a folder, as the trainer opens and `data check` reads them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from hsl_node.federation.node_toml import DataConfig
from hsl_node.federation.plan import Plan
from hsl_node.train.data.check import DataReport, check
from hsl_node.train.data.dataset import Dataset, open_dataset

PLAN = Plan(classes=("benign", "malignant"), image_size=16)
TRAIN, VALIDATION, TEST = 0, 1, 2


def opened(tmp_path: Path, data: DataConfig, plan: Plan = PLAN, **more: Any) -> Dataset:
    return open_dataset(data, plan, cache=tmp_path / "cache", ledger=tmp_path / "splits.json", **more)


def checked(tmp_path: Path, data: DataConfig, plan: Plan = PLAN) -> DataReport:
    return check(data, plan, cache=tmp_path / "cache", ledger=tmp_path / "splits.json")


def table_rows(count: int = 12) -> list[dict[str, str]]:
    """Two images per patient, half of the patients malignant."""
    words = ("benign", "malignant")
    return [{"path": f"img/{n}.png", "label": words[n // 2 % 2], "patient": f"pt{n // 2}"} for n in range(count)]


def per_class(dataset: Dataset) -> list[list[int]]:
    """Images per class and split."""
    return [[int(((dataset.labels == c) & (dataset.split == s)).sum()) for s in range(3)] for c in range(2)]


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
