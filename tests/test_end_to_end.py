"""The whole thing, small: real daemons, real trainers (torch), real SFTP; images on disk, an anchor set, two rounds."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
from cluster import Cluster
from PIL import Image

from hsl_node.config import AnchorCard, Plan
from hsl_node.sync.journal import Journal
from hsl_node.sync.store import Layout
from hsl_node.train import anchor as anchors

CANARY = "Erika-Mustermann"
NAMES = ("ash", "birch", "cedar")
PLAN = Plan(
    classes=("dark", "bright"), rounds=2, epochs_per_round=2, image_size=16, batch_size=8, backbone="tiny", experts=3,
    plateau_rounds=100,
)  # fmt: skip


@pytest.fixture(scope="module")
def hospital(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder per class, 30 small images each, easy to tell apart. Folder and files bear a patient's name."""
    folder = tmp_path_factory.mktemp(CANARY)
    rng = np.random.default_rng(3)
    for label, level in (("dark", 90), ("bright", 150)):
        (folder / label).mkdir()
        for i in range(30):
            image = rng.normal(level, 30, (20, 20)).clip(0, 255).astype(np.uint8)
            Image.fromarray(image).save(folder / label / f"{CANARY}-{i}.png")
    return folder


def cluster_of(root: Path, images: Path) -> Cluster:
    made = anchors.digits_standin(PLAN.image_size, n=20)
    path = root / "anchor.safetensors"
    fingerprint = anchors.save(made, path)
    card = AnchorCard(name=made.name, fingerprint=fingerprint, images=len(made.labels), image_size=PLAN.image_size)
    return Cluster(
        root / "nodes",
        NAMES,
        PLAN,
        trainer=None,
        anchor=card,
        node={"anchor": str(path), "data": {"path": str(images)}, "train": {"threads": 1, "device": "cpu"}},
    )


@pytest.fixture(scope="module")
def states(hospital: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The state directories that a run leaves in which nothing goes wrong."""
    with cluster_of(tmp_path_factory.mktemp("undisturbed"), hospital) as cluster:
        cluster.start_all()
        cluster.wait_finished()
        cluster.wait_until("ash", lambda s: s["best"] is not None, "last fusion validated")
        assert CANARY not in json.dumps([cluster.status(n) for n in NAMES])
        return [cluster.layout(n).state for n in NAMES]


@pytest.fixture(scope="module")
def undisturbed(states: list[Path]) -> dict[int, str]:
    digests = [fused(state) for state in states]
    assert all(d == digests[0] for d in digests)
    return digests[0]


def fused(state: Path) -> dict[int, str]:
    journal = Journal.read_only(Layout(state).journal)
    try:
        return {r["round"]: r["sha256"] for r in journal.rows("fused")}
    finally:
        journal.close()


def test_three_hospitals_train_hsl_and_hold_the_same_model(undisturbed: dict[int, str]) -> None:
    assert sorted(undisturbed) == [0, 1, 2]
    assert len(set(undisturbed.values())) == 3, "training changed nothing"


def test_threat_19_a_patients_name_is_in_nothing_that_is_logged_kept_or_sent(states: list[Path]) -> None:
    """Only node.toml has it, where the administrator wrote the path of the images."""
    for state in states:
        files = [p for p in state.rglob("*") if p.is_file() and p.name != "node.toml"]
        assert CANARY in (state / "node.toml").read_text()
        assert {"hsl-node.log", "journal.sqlite3", "output.txt"} <= {p.name for p in files}
        assert [p for p in files if CANARY in p.name or CANARY.encode() in p.read_bytes()] == []


def test_threat_22_a_daemon_killed_in_mid_epoch_ends_with_the_same_bytes(
    tmp_path: Path, hospital: Path, undisturbed: dict[int, str]
) -> None:
    with cluster_of(tmp_path, hospital) as cluster:
        cluster.start_all()
        trainer = cluster.wait_until(
            "birch", lambda s: s["trainer"]["state"] == "working" and s["round"] == 1, "training"
        )
        cluster.kill("birch")
        _wait_gone(trainer["trainer"]["pid"])
        cluster.start("birch")
        journal_path = cluster.layout("birch").journal
        cluster.wait_until("birch", lambda s: _epochs(journal_path) == 1, "one epoch of two done")
        cluster.kill("birch")
        cluster.start("birch")
        cluster.wait_finished()
        assert [cluster.fused(n) for n in NAMES] == [undisturbed] * 3


def _epochs(path: Path) -> int:
    journal = Journal.read_only(path)
    try:
        return len(journal.rows("epochs"))
    finally:
        journal.close()


def _wait_gone(pid: int) -> None:
    """The trainer leaves when its daemon is gone."""
    end = time.monotonic() + 60
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < end, "the trainer outlived its daemon"
        time.sleep(0.05)
