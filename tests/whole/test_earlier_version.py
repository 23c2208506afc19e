"""What an earlier version wrote, and peers that still run it: a federation is upgraded node by node, in mid-run.

Of that version: real daemons with their own stand-in trainer, and commands. It comes out of this repository's history.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from cluster import WAIT_S, Cluster, Tree
from every_phase import has
from sources import REPOSITORY

from hsl_node.admin import backup, verify
from hsl_node.federation import config, identity, node_toml
from hsl_node.federation.plan import Plan
from hsl_node.host.layout import Layout

# The commit with which manifest 3, journal 3 and federation file 2 were complete. Versions before are refused in words.
EARLIER = "8c7338aa5944a39781fe1b2daef6c78fab9bcbfd"
START_EARLIER = """
import sys
from pathlib import Path
from hsl_node.host import event_log
from hsl_node.node import launch
state = Path(sys.argv[1])
event_log.setup(state)
sys.exit(launch.run(state, sys.argv[2:]))
"""
PLAN = Plan(method="fedavg", fusion="mean", rounds=3, epochs_per_round=2, plateau_rounds=100)
NAMES = ("ash", "birch", "cedar")


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    git = ["git", "-C", str(REPOSITORY)]
    if shutil.which("git") is None or subprocess.run([*git, "cat-file", "-e", EARLIER], capture_output=True).returncode:
        pytest.skip(f"the earlier version, commit {EARLIER[:7]}, is not in the history here")
    folder = tmp_path_factory.mktemp("earlier")
    wanted = ["hsl_node", "benchmarks/stand_in_trainer.py"]
    archive = subprocess.run([*git, "archive", EARLIER, *wanted], capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(folder, filter="data")
    return Tree(folder, START_EARLIER)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """The digests of a run of this version alone."""
    with Cluster(tmp_path_factory.mktemp("undisturbed"), NAMES, PLAN) as cluster:
        cluster.start_all()
        cluster.wait_finished()
        return cluster.fused("ash")


def command(tree: Tree, *arguments: str | Path) -> str:
    """`hsl-node` of that version; gives what it prints."""
    return subprocess.run(
        [sys.executable, "-m", "hsl_node", *map(str, arguments)],
        cwd=tree.folder,
        env={**os.environ, **tree.environment},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=WAIT_S,
    ).stdout


def require_all_verified(state: Path, rounds: int) -> None:
    found = verify.examine(state)
    assert (found.defects, found.lost) == ([], [])
    assert len(found.rounds) == rounds and found.documents > 0


def test_a_run_goes_on_with_the_same_bytes_while_one_node_after_the_other_is_upgraded(
    tmp_path: Path, earlier: Tree, undisturbed: dict[int, str]
) -> None:
    """The first is stopped while it trains, the second killed a round later; the third stays as it is to the end."""
    with Cluster(tmp_path, NAMES, PLAN) as cluster:
        cluster.trees = dict.fromkeys(NAMES, earlier)
        cluster.hold("birch", 2)
        cluster.start_all()
        cluster.wait_until("birch", lambda s: has(s, 2, "ash", "cedar"), "trains round 2, has the others'")
        assert cluster.stop("birch") == 0
        require_all_verified(cluster.layout("birch").state, rounds=3)

        del cluster.trees["birch"]
        cluster.hold("ash", 3)
        cluster.release("birch")
        cluster.start("birch")
        cluster.wait_until("ash", lambda s: has(s, 3, "birch", "cedar"), "trains round 3, has the others'")
        cluster.kill("ash")
        require_all_verified(cluster.layout("ash").state, rounds=4)

        del cluster.trees["ash"]
        cluster.release("ash")
        cluster.start("ash")
        cluster.wait_finished()
        assert [cluster.fused(n) for n in NAMES] == [undisturbed] * 3
        for name in NAMES:
            cluster.stop(name)
            require_all_verified(cluster.layout(name).state, rounds=5)


def test_a_node_of_a_lost_disk_comes_back_from_an_earlier_versions_backup_among_peers_of_that_version(
    tmp_path: Path, earlier: Tree, undisturbed: dict[int, str]
) -> None:
    """The backup is a round old: what the node has signed since, its peers tell and give back."""
    with Cluster(tmp_path, NAMES, PLAN) as cluster:
        cluster.trees = dict.fromkeys(NAMES, earlier)
        cluster.hold("birch", 2)
        cluster.start_all()
        state = cluster.layout("birch").state
        cluster.wait_until("birch", lambda s: has(s, 2, "ash", "cedar"), "trains round 2, has the others'")
        command(earlier, "--state", state, "backup", tmp_path / "birch.tar")
        cluster.hold("birch", 3)
        cluster.wait_until("birch", lambda s: has(s, 3, "ash", "cedar"), "trains round 3, has the others'")
        cluster.kill("birch")
        shutil.rmtree(state)

        backup.restore(state, tmp_path / "birch.tar")
        require_all_verified(state, rounds=3)
        del cluster.trees["birch"]
        cluster.release("birch")
        cluster.start("birch")
        cluster.wait_finished()
        assert [cluster.fused(n) for n in NAMES] == [undisturbed] * 3


def test_cards_settings_and_federation_file_of_an_earlier_version_are_read_as_it_reads_them(
    tmp_path: Path, earlier: Tree
) -> None:
    cards = []
    for name in NAMES[:2]:
        state = tmp_path / name
        text = command(earlier, "--state", state, "init", "--name", name, "--address", f"{name}.example.org:8922")
        card = config.load_card(state / f"{name}.card")
        assert config.card_text(card) == text == (state / f"{name}.card").read_text()
        assert card.key == identity.load(Layout(state).key).public
        assert node_toml.load_node(state).name == name
        cards += ["--card", state / f"{name}.card"]
    file = tmp_path / "federation.toml"
    settings = (
        "--set",
        "method=fedavg",
        "--set",
        "classes=benign,malignant",
        "--set",
        "fusion=mean",
        "--set",
        "rounds=7",
    )
    command(earlier, "federation", "create", "--name", "grove", *cards, *settings, "--out", file)
    theirs = json.loads(command(earlier, "federation", "show", file, "--json"))
    ours = config.read_federation(file)
    assert ours.digest == theirs["digest"]
    assert config.federation_text(ours) == file.read_text()
