"""Cores by affinity and by quota: control groups as the kernel and containers show them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hsl_node.host.cores import available_cores


@pytest.fixture(autouse=True)
def sixteen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))


def cores(folder: Path, membership: str, **files: str) -> int:
    (folder / "membership").write_text(membership)
    for name, content in files.items():
        path = folder / "groups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return available_cores(folder / "membership", folder / "groups")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("400000 100000\n", 4),
        ("250000 100000\n", 2),
        ("50000 100000\n", 1),
        ("max 100000\n", 16),
        ("9900000 100000", 16),
    ],
)
def test_a_container_with_control_groups_of_version_2(tmp_path: Path, content: str, expected: int) -> None:
    assert cores(tmp_path, "0::/\n", **{"cpu.max": content}) == expected


def test_the_tightest_of_this_group_and_those_above_it_binds(tmp_path: Path) -> None:
    files = {"a/cpu.max": "300000 100000", "a/b/cpu.max": "800000 100000", "other/cpu.max": "100000 100000"}
    assert cores(tmp_path, "0::/a/b\n", **files) == 3


def test_control_groups_of_version_1(tmp_path: Path) -> None:
    membership = "9:memory:/docker/x\n8:cpu,cpuacct:/docker/x\n"
    inside = {"cpu,cpuacct/cpu.cfs_quota_us": "200000", "cpu,cpuacct/cpu.cfs_period_us": "100000"}
    assert cores(tmp_path, membership, **inside) == 2  # a container: its own group is the root that it sees


def test_a_group_of_version_1_without_a_quota(tmp_path: Path) -> None:
    files = {"cpu/user/cpu.cfs_quota_us": "-1", "cpu/user/cpu.cfs_period_us": "100000"}
    assert cores(tmp_path, "3:cpuset:/\n2:cpu:/user\n", **files) == 16


def test_without_control_groups_affinity_alone_counts(tmp_path: Path) -> None:
    assert available_cores(tmp_path / "none", tmp_path) == 16
