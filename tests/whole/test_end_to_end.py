"""The whole thing, small: real daemons, real trainers (torch), real SFTP; images on disk, an anchor set, two rounds."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from cluster import WAIT_S, Cluster
from PIL import Image

from hsl_node.federation.config import AnchorCard
from hsl_node.federation.plan import Plan
from hsl_node.host.layout import Layout
from hsl_node.sync.store.journal import Journal
from hsl_node.train.data import anchor as anchors

CANARY = "Erika-Mustermann"
NAMES = ("ash", "birch", "cedar")
# A daemon that kills itself in round 1 as its trainer says how far it is, and the next time after the first epoch.
DIES_TWICE = """
import os, signal, sys
from pathlib import Path
from hsl_node.node.training import Training
_heard = Training._heard
def heard(self, event):
    _heard(self, event)
    mark = Path(sys.argv[1]) / "log" / f"died at {event['event']}"
    if event.get("round") == 1 and event["event"] in ("progress", "epoch") and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
Training._heard = heard
"""
PLAN = Plan(
    classes=("dark", "bright"), rounds=2, epochs_per_round=2, image_size=16, batch_size=8, backbone="tiny",
    plateau_rounds=100, settings={"experts": 3},
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
        for name in NAMES:
            cluster.wait_until(name, lambda s: s["still_to_do"] is None, "last fusion validated")
        assert CANARY not in json.dumps([cluster.status(n) for n in NAMES])
        return [cluster.layout(n).state for n in NAMES]


@pytest.fixture(scope="module")
def undisturbed(states: list[Path]) -> dict[int, str]:
    digests = [fused(state) for state in states]
    assert all(d == digests[0] for d in digests)
    return digests[0]


def fused(state: Path) -> dict[int, str]:
    with Journal.read_only(Layout(state).journal) as journal:
        return {r["round"]: r["sha256"] for r in journal.rows("fused")}


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


@pytest.mark.sample(2, "real trainers killed")
def test_threat_22_a_daemon_killed_in_mid_epoch_ends_with_the_same_bytes(
    tmp_path: Path, hospital: Path, undisturbed: dict[int, str]
) -> None:
    with cluster_of(tmp_path, hospital) as cluster:
        cluster.start("ash")
        cluster.start("cedar")
        cluster.prelude = DIES_TWICE
        for died_at, epochs in (("progress", 0), ("epoch", 1)):
            assert cluster.start("birch").wait(WAIT_S) == -signal.SIGKILL, cluster.output("birch")
            log = cluster.layout("birch").state / "log"
            assert (log / f"died at {died_at}").exists()
            assert _epochs(cluster.layout("birch").journal) == epochs  # of two
            _wait_gone(_trainers(log / "hsl-node.log")[-1])
        cluster.start("birch")
        cluster.wait_finished()
        assert [cluster.fused(n) for n in NAMES] == [undisturbed] * 3


def _epochs(path: Path) -> int:
    with Journal.read_only(path) as journal:
        return len(journal.rows("epochs"))


def _trainers(log: Path) -> list[int]:
    """The processes that the daemon has started as trainers."""
    events = map(json.loads, log.read_text().splitlines())
    return [e["pid"] for e in events if e["event"] == "trainer started"]


def _wait_gone(pid: int) -> None:
    """The trainer leaves when its daemon is gone."""
    end = time.monotonic() + WAIT_S
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < end, "the trainer outlived its daemon"
        time.sleep(0.05)
