"""A node that lost its state, or was set back, goes on with the bytes of the undisturbed run (threat 12).

Real daemons, real SFTP; the trainer is a stand-in. The pure part: test_recovered.py; the file: test_backup.py.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from cluster import _START as START
from cluster import STAND_IN, WAIT_S, Cluster, warned
from every_phase import falls_in_every_phase, has
from lost_disk import LOST, NAMES, PLAN, lose_disk, require_same, signed
from ports import free_ports

from hsl_node.admin import backup, recover
from hsl_node.host import control
from hsl_node.host.durable import Step
from hsl_node.sync.store.journal import Journal

# A recovering node says that it is about to fetch, and waits while the file `hold` is there.
HELD = """
import asyncio, pathlib, sys
from hsl_node.node.peers.fetch import Fetch
_get = Fetch.get
async def get(*args, **named):
    state = pathlib.Path(sys.argv[1])
    (state / "fetching").touch()
    while (state / "hold").exists():
        await asyncio.sleep(0.02)
    return await _get(*args, **named)
Fetch.get = get
"""


@pytest.mark.sample(3, "lost disks")
@pytest.mark.parametrize("client", ["asyncssh", "paramiko"])
def test_threat_12_a_lost_disk_in_every_phase_ends_with_the_same_bytes(
    tmp_path: Path, undisturbed: dict[int, str], client: str
) -> None:
    with Cluster(tmp_path, NAMES, PLAN, node={"client": client}) as cluster:

        def harm(victim: str) -> None:
            lose_disk(cluster, victim)
            recover.prepare(cluster.layout(victim).state)

        assert len(falls_in_every_phase(cluster, "birch", harm)) == 9
        require_same(cluster, undisturbed)
        with Journal.read_only(cluster.layout("birch").journal) as birch:
            assert {m["round"] for m in birch.rows("manifests") if m["peer"] == "birch"} == set(range(5))


@pytest.mark.sample(3, "lost disks")
def test_threat_12_a_disk_lost_after_signing_fetches_the_checkpoint_and_brings_it_to_who_lacks_it(
    tmp_path: Path, undisturbed: dict[int, str]
) -> None:
    """birch signs round 1 and reaches ash alone; its disk goes. cedar gets the same checkpoint later."""
    with Cluster(tmp_path, NAMES, PLAN) as cluster:
        for name in ("birch", "cedar"):
            cluster.start(name)
            cluster.wait_until(name, lambda s: s["phase"] == "agree", "up")
            control.ask(cluster.layout(name).state, "pause")  # cedar dies before either has signed round 1
        cluster.start("ash")
        for name in NAMES:
            cluster.wait_until(name, lambda s: s["round"] == 1, "in round 1")
        cluster.kill("cedar")
        control.ask(cluster.layout("birch").state, "resume")
        cluster.wait_until("ash", lambda s: received(s, "birch") == "verified" and s["round"] == 1, "has birch's")
        document = signed(cluster, "birch", 1)
        cluster.kill("birch")
        lose_disk(cluster, "birch")
        recover.prepare(cluster.layout("birch").state)
        cluster.start("birch")
        status = cluster.wait_until("birch", lambda s: s["state"] == "recovering", "asking")
        assert status["waiting_for"]
        status = cluster.wait_until("birch", lambda s: s["waiting_for"] == ["cedar"], "waiting for cedar alone")
        assert any("cedar" in w["text"] and w["code"] == "recovering" for w in status["warnings"])
        cluster.start("cedar")
        cluster.wait_until("cedar", lambda s: s["round"] == 1, "up again")
        control.ask(cluster.layout("cedar").state, "resume")
        require_same(cluster, undisturbed)
        assert signed(cluster, "birch", 1) == document, "the round was signed anew"

        exported = tmp_path / "export"
        state = cluster.layout("birch").state
        subprocess.run([sys.executable, "-m", "hsl_node.cli", "--state", state, "verify", "--export", exported])
        index = (exported / "index").read_text().splitlines()
        assert {f"{p} hsl-offer@v1 recovery_{p}.offer" for p in ("ash", "cedar")} <= set(index), "what they answered"
        assert subprocess.run(["sh", exported / "check.sh"]).returncode == 0


@pytest.mark.sample(3, "lost disks")
def test_threat_12_a_node_says_recovering_until_it_has_fetched_what_it_needs(
    tmp_path: Path, undisturbed: dict[int, str]
) -> None:
    """Nobody is waited for any more; it is no usual start all the same."""
    with Cluster(tmp_path, NAMES, PLAN, trainer=["--epoch-s", "0.3"], prelude=HELD) as cluster:
        state = cluster.layout("birch").state
        cluster.hold("ash", 2)  # so that nobody gets beyond it meanwhile
        cluster.start_all()
        cluster.wait_until("birch", lambda s: s["round"] == 2 and s["waiting_for"] == ["ash"], "round 2 signed")
        cluster.kill("birch")
        lose_disk(cluster, "birch")
        recover.prepare(state)
        (state / "hold").touch()
        cluster.start("birch")
        cluster.wait_until("birch", lambda s: (state / "fetching").exists(), "all have answered")
        status = cluster.status("birch")
        assert (status["state"], status["waiting_for"]) == ("recovering", [])
        (state / "hold").unlink()
        cluster.release("ash")
        require_same(cluster, undisturbed)


@pytest.mark.sample(3, "lost disks")
def test_threat_12_a_disk_lost_while_fusing_ends_with_the_same_bytes(
    tmp_path: Path, undisturbed: dict[int, str]
) -> None:
    """Three disks: lost before the fusion writes, when its file is whole but not in place, and when it is in place."""
    with Cluster(tmp_path, NAMES, PLAN) as cluster:
        cluster.start("ash")
        cluster.start("cedar")
        for point in Step.FUSION_WRITE.points:
            cluster.crash("birch", point)
            lose_disk(cluster, "birch")
            recover.prepare(cluster.layout("birch").state)
        cluster.start("birch")
        require_same(cluster, undisturbed)


@pytest.mark.sample(3, "lost disks")
def test_threat_12_two_disks_lost_at_once_end_with_the_same_bytes(tmp_path: Path, undisturbed: dict[int, str]) -> None:
    with Cluster(tmp_path, NAMES, PLAN) as cluster:
        cluster.hold("ash", 2)  # so that nobody gets beyond it meanwhile
        cluster.start_all()
        for name, other in (("birch", "cedar"), ("cedar", "birch")):
            cluster.wait_until(name, lambda s, p=other: has(s, 2, p) and s["waiting_for"] == ["ash"], "2 signed")  # type: ignore[misc]
        for name in ("birch", "cedar"):
            cluster.kill(name)
            lose_disk(cluster, name)
            recover.prepare(cluster.layout(name).state)
        for name in ("birch", "cedar"):
            cluster.start(name)
        cluster.release("ash")
        require_same(cluster, undisturbed)


@pytest.mark.sample(3, "lost disks")
def test_threat_12_an_old_backup_restored_ends_with_the_same_bytes(tmp_path: Path, undisturbed: dict[int, str]) -> None:
    """Backup in round 1 beside the running daemon, the node lost in round 3."""
    with Cluster(tmp_path, NAMES, PLAN) as cluster:
        training_round_1(cluster, "birch")
        state, file = cluster.layout("birch").state, tmp_path / "birch.tar"
        backup.backup(state, file)
        cluster.hold("birch", 3)
        cluster.wait_until("birch", lambda s: s["round"] == 3, "round 3")
        cluster.kill("birch")
        shutil.rmtree(state)
        backup.restore(state, file)
        cluster.release("birch")
        cluster.start("birch")
        require_same(cluster, undisturbed)


@pytest.mark.sample(3, "lost disks")
def test_threat_12_a_machine_rolled_back_unnoticed_finds_out_before_it_signs(
    tmp_path: Path, undisturbed: dict[int, str]
) -> None:
    """No command was given: a snapshot of round 1 is back. The daemon leaves, and its next start recovers."""
    with Cluster(tmp_path, NAMES, PLAN) as cluster:
        training_round_1(cluster, "birch")
        cluster.kill("birch")
        state = cluster.layout("birch").state
        shutil.copytree(state, tmp_path / "snapshot", symlinks=True, ignore=shutil.ignore_patterns("run"))
        cluster.hold("birch", 3)
        cluster.start("birch")
        cluster.wait_until("birch", lambda s: s["round"] == 3, "round 3")
        cluster.kill("birch")
        shutil.rmtree(state)
        shutil.copytree(tmp_path / "snapshot", state)
        cluster.release("birch")
        assert cluster.start("birch").wait(WAIT_S) == LOST
        assert "set back" in cluster.output("birch")
        cluster.start("birch")
        require_same(cluster, undisturbed)


@pytest.mark.sample(3, "lost disks")
@pytest.mark.parametrize("keys_read_anew", [False, True])
def test_threat_12_a_clone_beside_the_original_is_named_by_its_peers_and_nothing_wrong_is_fused(
    tmp_path: Path, undisturbed: dict[int, str], keys_read_anew: bool
) -> None:
    with Cluster(tmp_path, NAMES, PLAN, prelude="import hsl_node.node.alarms as a; a.QUIET_S = 5.0") as cluster:
        training_round_1(cluster, "cedar")
        # Then the next process connects to ash once, to ask before it signs: when it has, and its twin has, is certain.
        cluster.wait_until("cedar", lambda s: not owed(cluster, "cedar"), "its statement delivered")
        cluster.kill("cedar")
        state, clone = cluster.layout("cedar").state, tmp_path / "clone"
        shutil.copytree(state, clone, ignore=shutil.ignore_patterns("run"))
        (clone / "run").mkdir()
        settings: dict[str, Any] = {"name": "cedar", "address": cluster.federation.get("cedar").address}
        settings["listen"] = f"127.0.0.1:{free_ports(1)[0]}"  # another machine
        (clone / "node.toml").write_text(tomli_w.dumps(settings))
        before = seen(cluster.status("ash"), "cedar")
        cluster.start("cedar")
        status = cluster.wait_until("ash", lambda s: seen(s, "cedar") > before, "cedar is there")
        if keys_read_anew:  # as after each `peer revoke`, `peer update` and `key rotate`
            control.ask(state, "keys")
        twin = [sys.executable, "-c", START, str(clone), sys.executable, str(STAND_IN), "--state", str(clone)]
        twin += ["--hold", str(cluster.hold_file("cedar"))]
        process = subprocess.Popen(twin, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            first = seen(status, "cedar")
            cluster.wait_until("ash", lambda s: seen(s, "cedar") > first, "its twin too")
            cluster.release("cedar")  # both of them: now they take turns
            status = cluster.wait_until("ash", lambda s: warned(s, "twice cedar"), "names the clone")
            assert any("stop one" in w["fix"] for w in status["warnings"])
        finally:
            process.kill()
            process.wait()
        cluster.stop("cedar")
        cluster.start("cedar")
        cluster.wait_until("ash", lambda s: not warned(s, "twice cedar"), "one of them only")
        try:
            require_same(cluster, undisturbed)
        except AssertionError:
            if cluster.processes["cedar"].poll() != LOST:
                raise
            cluster.start("cedar")  # its twin had signed more than itself
            require_same(cluster, undisturbed)


@pytest.mark.sample(3, "lost disks")
def test_threat_12_a_giver_that_restarts_before_its_list_is_read_is_asked_again(tmp_path: Path) -> None:
    """birch waits for cedar; ash, which has answered, is restarted and has forgotten what its answer named.

    birch's trainer gives other bytes now: what it signed before must come from ash, or it would sign two.
    """
    with Cluster(tmp_path, NAMES, PLAN) as cluster:
        for name in ("birch", "cedar"):
            cluster.start(name)
            cluster.wait_until(name, lambda s: s["phase"] is not None, "up")
            control.ask(cluster.layout(name).state, "pause")
        cluster.start("ash")
        for name in NAMES:
            cluster.wait_until(name, lambda s: s["round"] == 1, "in round 1, where two of three are paused")
        cluster.kill("cedar")
        control.ask(cluster.layout("birch").state, "resume")
        cluster.wait_until("ash", lambda s: received(s, "birch") == "verified" and s["round"] == 1, "has birch's")
        before = signed(cluster, "birch", 1)
        cluster.kill("birch")
        lose_disk(cluster, "birch")
        recover.prepare(cluster.layout("birch").state)
        cluster.trainer = ["--times", "1.5"]
        cluster.start("birch")
        cluster.trainer = []
        cluster.wait_until("birch", lambda s: s["waiting_for"] == ["cedar"], "has ash's answer")
        cluster.kill("ash")
        cluster.start("ash")
        cluster.wait_until("ash", lambda s: s["round"] == 1, "up again")
        cluster.start("cedar")
        control_when_up(cluster, "cedar", "resume")
        cluster.wait_finished()
        assert signed(cluster, "birch", 1) == before
        assert not any(list((cluster.layout(n).state / "evidence").iterdir()) for n in NAMES)
        assert "does not give it" in cluster.layout("birch").event_log.read_text()


def control_when_up(cluster: Cluster, name: str, word: str) -> None:
    cluster.wait_until(name, lambda s: True, "up")
    control.ask(cluster.layout(name).state, word)


def training_round_1(cluster: Cluster, name: str) -> None:
    """All are up; this one goes on when its trainer is released, or held in a later round."""
    cluster.hold(name)
    cluster.start_all()
    cluster.wait_until(name, lambda s: s["round"] == 1, "round 1")


def received(status: dict[str, Any], peer: str) -> str:
    return str(next(p for p in status["peers"] if p["name"] == peer)["received"]["state"])


def seen(status: dict[str, Any], peer: str) -> float:
    return float(next(p for p in status["peers"] if p["name"] == peer)["last_seen"] or 0)


def owed(cluster: Cluster, name: str) -> list[Any]:
    """The deliveries for which its journal has no receipt."""
    with Journal.read_only(cluster.layout(name).journal) as journal:
        state = journal.state()
        assert state is not None
        return list(state["owed"])
