"""Real daemons as processes, real keys, real SFTP on loopback; the trainer is a stand-in without torch.

With the real trainer: test_end_to_end.py.
"""

from __future__ import annotations

import itertools
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster, final_digests, peer
from every_phase import falls_in_every_phase

from hsl_node.errors import NotRunning
from hsl_node.federation.config import AnchorCard
from hsl_node.federation.plan import Plan
from hsl_node.sync.store.journal import Journal

PLAN = Plan(method="fedavg", fusion="mean", rounds=3, epochs_per_round=2, plateau_rounds=100)


NAMES = ("ash", "birch", "cedar")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """The digests of a run in which nothing goes wrong. They depend on names, plan and seed alone, not on keys."""
    with Cluster(tmp_path_factory.mktemp("undisturbed"), NAMES, PLAN) as cluster:
        cluster.start_all()
        cluster.wait_finished()
        return final_digests(cluster)


def test_three_daemons_finish_all_rounds_with_the_same_bytes(tmp_path: Path, undisturbed: dict[int, str]) -> None:
    assert sorted(undisturbed) == [0, 1, 2, 3]
    assert len(set(undisturbed.values())) == 4


def test_a_daemon_keeps_its_files_to_itself_whatever_umask_it_was_started_with(tmp_path: Path) -> None:
    """Its trainer too. Receipts alone are for whoever reaches that folder: an SFTP server's accounts, or nobody."""
    with Cluster(tmp_path, NAMES[:2], PLAN, prelude="import os; os.umask(0)") as cluster:
        state = cluster.layout("ash").state
        for path in (state, cluster.layout("birch").state):
            (path / "log" / "output.txt").touch()
        before = set(state.rglob("*"))
        cluster.start_all()
        cluster.wait_until("ash", lambda s: s["round"] == 2, "round 1 fused")
        cluster.stop("ash")
        modes = {str(p.relative_to(state)): p.lstat().st_mode & 0o077 for p in state.rglob("*") if p not in before}
        assert {"fused/r000000.safetensors", "fused/r000001.safetensors", "journal.sqlite3"} <= modes.keys()
        assert not [name for name, others in modes.items() if others and not name.endswith(".receipt")]


# birch runs an hsl-node whose manifests are of the next version, as they will be one day.
NEXT_VERSION = """
import importlib.util, sys
spec = importlib.util.find_spec("hsl_node.sync.manifest")
if sys.argv[1].endswith("birch"):
    source = open(spec.origin).read()
    assert source.count("Literal[3] = 3") == 1
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    exec(compile(source.replace("Literal[3] = 3", "Literal[4] = 4"), spec.origin, "exec"), module.__dict__)
"""


def test_another_manifest_version_is_told_at_both_sites_before_anything_is_trained(tmp_path: Path) -> None:
    with Cluster(tmp_path, NAMES[:2], PLAN, prelude=NEXT_VERSION) as cluster:
        cluster.start_all()
        for me, other, ours, theirs in (("ash", "birch", 3, 4), ("birch", "ash", 4, 3)):
            there = f"{other} runs another hsl-node version than {me}: manifest version {theirs}, at {me} {ours}"
            here = f"{me} runs another hsl-node version than {other}: manifest version {ours}, at {other} {theirs}"
            same = "install the same hsl-node version at both sites"

            def told(status: dict[str, Any], code: str) -> str:
                return "; ".join(f"{w['text']} | {w['fix']}" for w in status["warnings"] if w["code"] == code)

            cluster.wait_until(me, lambda s: told(s, f"setup {other}") == f"{there} | {same}", "refuses")  # noqa: B023
            status = cluster.wait_until(me, lambda s: told(s, f"refused by {other}"), "is told")  # noqa: B023
            assert f"{here}; {same}" in told(status, f"refused by {other}")
            assert (status["phase"], status["round"]) == ("agree", 0)


def test_every_exchange_leaves_manifest_and_receipt_in_the_journal(tmp_path: Path) -> None:
    with Cluster(tmp_path, NAMES[:2], PLAN) as cluster:
        cluster.finish_in_step("ash", "birch")
        assert cluster.stop("ash") == 0
        with Journal.read_only(cluster.layout("ash").journal) as journal:
            manifests = {(m["round"], m["peer"]) for m in journal.rows("manifests")}
            receipts = {(r["round"], r["receiver"], r["code"]) for r in journal.rows("receipts")}
    assert manifests == set(itertools.product(range(5), ("ash", "birch")))
    assert receipts == {(r, "birch", "accepted") for r in range(5)}


@pytest.mark.sample(3)
@pytest.mark.parametrize("victim", NAMES)
def test_threat_22_kill_9_in_every_phase_ends_with_the_same_bytes(
    tmp_path: Path, undisturbed: dict[int, str], victim: str
) -> None:
    """One peer is killed and restarted again and again, each time in another round or phase."""
    with Cluster(tmp_path, NAMES, PLAN) as cluster:
        killed = falls_in_every_phase(cluster, victim)
        assert len(killed) == 9 and {phase for _, phase in killed} == {"agree", "train", "collect", "fuse"}
        assert final_digests(cluster) == undisturbed


def test_waiting_names_the_missing_peer_and_goes_on_when_it_comes(tmp_path: Path, undisturbed: dict[int, str]) -> None:
    with Cluster(tmp_path, NAMES, PLAN) as cluster:
        cluster.start("ash")
        cluster.start("birch")
        status = cluster.wait_until("ash", lambda s: s["waiting_for"] == ["cedar"], "waiting for cedar alone")
        cedar = next(p for p in status["peers"] if p["name"] == "cedar")
        assert status["waiting_since"] is not None
        cluster.wait_until("ash", lambda s: bool(peer(s, "cedar")["sent"]["last_error"]), "says why")
        assert not cedar["connected"]
        cluster.start("cedar")
        cluster.wait_finished()
        assert final_digests(cluster) == undisturbed


def test_sigterm_leaves_cleanly_and_the_next_start_goes_on(tmp_path: Path, undisturbed: dict[int, str]) -> None:
    with Cluster(tmp_path, NAMES, PLAN) as cluster:
        cluster.hold("birch", 2)
        cluster.start_all()
        cluster.wait_until("birch", lambda s: s["round"] == 2 and s["phase"] == "train", "training round 2")
        assert cluster.stop("birch") == 0
        with pytest.raises(NotRunning):
            cluster.status("birch")
        cluster.release("birch")
        cluster.start("birch")
        cluster.wait_finished()
        assert final_digests(cluster) == undisturbed


def test_threat_26_second_daemon_on_the_same_state_exits_11_and_harms_nothing(tmp_path: Path) -> None:
    with Cluster(tmp_path, NAMES[:2], PLAN) as cluster:
        cluster.start_all()
        cluster.wait_until("ash", lambda s: s["round"] is not None, "running")
        second = subprocess.run(
            [sys.executable, "-m", "hsl_node.cli", "--state", str(cluster.layout("ash").state), "start"],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert second.returncode == 11
        assert f"`hsl-node --state {cluster.layout('ash').state} stop`" in second.stderr
        cluster.wait_finished()


def test_a_port_in_use_ends_the_start_and_is_named(tmp_path: Path) -> None:
    with Cluster(tmp_path, NAMES[:2], PLAN) as cluster, socket.socket() as squatter:
        squatter.bind(("127.0.0.1", cluster.ports["ash"]))
        squatter.listen()
        process = cluster.start("ash")
        assert process.wait(60) == 15
        assert str(cluster.ports["ash"]) in cluster.output("ash")
        assert not cluster.layout("ash").fused(0).exists(), "the trainer was started before the port was looked at"


def test_threat_28_wrong_anchor_file_stops_before_anything_is_sent(tmp_path: Path) -> None:
    card = AnchorCard(name="reference", fingerprint="a" * 64, images=10, image_size=32)
    with Cluster(tmp_path, NAMES[:2], PLAN, anchor=card) as cluster:
        cluster.layout("ash").anchor.write_bytes(b"another anchor set")
        assert cluster.start("ash").wait(60) == 17
        assert "anchor" in cluster.output("ash")


def test_threat_28_other_initial_weights_are_named_on_both_sides_and_no_round_starts(tmp_path: Path) -> None:
    """The plan is the same, the model that a peer starts from is not: nobody trains, both say why."""
    with Cluster(tmp_path, NAMES[:2], PLAN) as cluster:
        cluster.start("ash")
        other = cluster.trainer
        cluster.trainer = ["--bytes", "200000", "--tensors", "12", "--seed", "99"]
        cluster.start("birch")
        cluster.trainer = other
        for name, peer in (("ash", "birch"), ("birch", "ash")):
            says = lambda w, p=peer: p in w["text"] and "initial weights differ" in w["text"]  # noqa: E731
            status = cluster.wait_until(name, lambda s, f=says: any(map(f, s["warnings"])), "says why")  # type: ignore[misc]
            assert status["round"] == 0
