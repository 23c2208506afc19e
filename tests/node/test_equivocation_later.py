"""A node decides alike on two manifests of one round, whenever it sees the second, and wherever it is killed.

Real daemons. test_equivocation.py has the rest; the round machine under every order: test_round_simulation.py.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster, warned
from hostile import Signed, until
from two_faces import CULPRIT, HONEST, PLAN, TRAINER, at, begin, deliver, face, signed, until_logged

from hsl_node.admin import rotate
from hsl_node.federation import identity
from hsl_node.federation.identity import MANIFEST_NAMESPACE
from hsl_node.federation.names import Peer
from hsl_node.host.layout import Layout
from hsl_node.sync import evidence

NAMES = (*HONEST, CULPRIT)
LATER = "receiver.refused:after", "receiver.evidence:before", "receiver.evidence:after#2", "receiver.record:before"
# A node that waits asks soon; cedar asks nobody, so that it learns of nothing before the others do.
HURRY = """
import sys
import hsl_node.node.equivocation as p
p.PATIENCE_S, p.PAUSE, p.LOOK_S = 0.5, p.Pace(0.5, 2), 0.2
if sys.argv[1].endswith("cedar"):
    async def nobody(self, holder):
        return True
    p.Equivocations._ask = nobody
"""


def arrives(cluster: Cluster, second: Signed, point: str) -> None:
    """At ash: as delivered, or found by a node that is killed at `point` and started again."""
    if not point:
        return deliver(second, None, cluster, "ash")
    cluster.kill("ash")
    inbox = cluster.layout("ash").homes / CULPRIT / "inbox"
    (inbox / str(second.name)).write_bytes(second.document)
    cluster.crash("ash", point)
    cluster.start("ash")


@pytest.mark.sample(5, "proof of a past round")
@pytest.mark.parametrize("point", ["", *LATER])
@pytest.mark.parametrize("round", [2, 4])
def test_threat_11_a_second_manifest_of_a_past_round_halts_a_node_at_once_and_wherever_it_is_killed(
    tmp_path: Path, round: int, point: str
) -> None:
    """cedar signs round 1 again, one round or three rounds after it was fused; ash alone sees it."""
    with Cluster(tmp_path, NAMES, PLAN, trainer=TRAINER) as cluster:
        for name in NAMES:
            cluster.hold(name, round)
        cluster.start_all()
        for name in NAMES:
            cluster.wait_until(name, lambda s: s["round"] == round, f"round {round}")
        second = at(cluster, "ash").manifest(signed(cluster, CULPRIT, 1), samples=77)
        cluster.kill(CULPRIT)
        arrives(cluster, second, point)
        inbox = cluster.layout("ash").homes / CULPRIT / "inbox"
        status = require_named(cluster, "ash", CULPRIT)
        assert (status["state"], status["round"]) == ("halted", round)
        asyncio.run(asyncio.wait_for(until(lambda: not (inbox / str(second.name)).exists()), 60))
        assert digests(cluster, "ash", CULPRIT) >= {second.digest}
        require_the_same_after_a_restart(cluster, status)


@pytest.mark.sample(5, "proof of a past round")
@pytest.mark.parametrize("point", ["", *LATER])
def test_threat_11_a_second_manifest_of_this_round_whose_data_never_comes_is_proof(tmp_path: Path, point: str) -> None:
    """ash, with the first one verified, waits for birch. It objects at once; both halt with the next round."""
    with Cluster(tmp_path, NAMES, PLAN, trainer=TRAINER) as cluster:
        cluster.hold("birch")
        begin(cluster)
        first, data = face(cluster, 1.0)
        for name in HONEST:
            deliver(first, data, cluster, name)
        cluster.wait_until("ash", lambda s: s["waiting_for"] == ["birch"], "has cedar's")
        second, _ = face(cluster, 2.0)
        arrives(cluster, second, point)
        status = require_named(cluster, "ash", CULPRIT)
        assert (status["phase"], status["round"]) == ("collect", 1), "its own checkpoint is signed: the others fuse it"
        assert digests(cluster, "ash", CULPRIT) == {first.digest, second.digest}
        require_the_same_after_a_restart(cluster, status)
        cluster.release("birch")
        for name in HONEST:
            cluster.wait_until(name, lambda s: s["state"] == "halted", "halts")
            assert sorted(cluster.fused(name)) == [0, 1]


@pytest.mark.sample(5, "proof of a past round")
@pytest.mark.parametrize(
    "point", ["", "receiver.evidence:after", "receiver.evidence:after#2", "receiver.record:before"]
)
def test_threat_12_proof_against_this_node_itself_halts_it_wherever_it_is_killed(tmp_path: Path, point: str) -> None:
    """cedar lists what a clone of ash has signed for round 1; ash waits for cedar in round 2, and asks."""
    with Cluster(tmp_path, NAMES, PLAN, trainer=TRAINER, prelude=HURRY) as cluster:
        cluster.hold(CULPRIT, 2)
        cluster.start_all()
        cluster.wait_until(CULPRIT, lambda s: s["round"] == 2, "round 2")
        cluster.wait_until("ash", lambda s: s["round"] == 2 and s["waiting_for"] == [CULPRIT], "waits for cedar alone")
        another = at(cluster, CULPRIT, "ash").manifest(signed(cluster, "ash", 1), samples=77)
        cluster.kill("ash")
        cluster.kill(CULPRIT)
        hold(cluster.layout(CULPRIT), another)
        cluster.start(CULPRIT)
        if point:
            cluster.crash("ash", point)
        cluster.start("ash")
        status = require_named(cluster, "ash", "ash")
        assert status["round"] == 2 and len(digests(cluster, "ash", "ash")) == 2
        require_the_same_after_a_restart(cluster, status)
        cluster.release(CULPRIT)
        for name in NAMES:
            cluster.wait_until(name, lambda s: s["state"] == "halted", "halts")


@pytest.mark.sample(5, "proof of a past round")
@pytest.mark.parametrize("replaced", [False, True])
def test_threat_12_two_that_a_recovery_found_halt_this_node_unless_a_replaced_key_may_have_made_them(
    tmp_path: Path, replaced: bool
) -> None:
    """A recovery ends with such a pair; one without the peer that showed it may succeed."""
    with Cluster(tmp_path, HONEST, PLAN, trainer=TRAINER) as cluster:
        cluster.hold("birch")
        cluster.start_all()
        content = signed(cluster, "ash", 1)
        cluster.kill("ash")
        state, key = cluster.layout("ash").state, identity.load(cluster.layout("ash").key)
        for name, samples in zip(evidence.names(1, Peer("ash"), own=True), (content["samples"], 77), strict=True):
            document = key.sign({**content, "samples": samples}, MANIFEST_NAMESPACE)
            (state / "evidence" / name).write_bytes(document)
        if replaced:
            rotate.begin(state)
            rotate.finish(state, force=True)
        cluster.start("ash")
        if replaced:
            until_logged(cluster, "ash", "proves nothing")
            status = cluster.wait_until("ash", lambda s: s["round"] == 1, "goes on")
            assert not status["reason"] and not warned(status, "equivocation ash")
        else:
            require_the_same_after_a_restart(cluster, require_named(cluster, "ash", "ash"))


# ------------------------------------------------------------------ what the tests share


def require_named(cluster: Cluster, name: str, culprit: str) -> dict[str, Any]:
    """It has the proof, says so, and objects."""
    words = f"{culprit} signed two different manifests for round 1: both are in evidence/"
    status = cluster.wait_until(name, lambda s: words in s["reason"], "objects")
    assert warned(status, f"equivocation {culprit}")
    return status


def require_the_same_after_a_restart(cluster: Cluster, status: dict[str, Any]) -> None:
    assert cluster.stop("ash") == 0
    cluster.start("ash")
    again = cluster.wait_until("ash", lambda s: s["round"] is not None, "up again")
    assert status["reason"] in again["reason"]
    assert (again["phase"], again["round"]) == (status["phase"], status["round"])


def digests(cluster: Cluster, name: str, culprit: str) -> set[str]:
    """Of both manifests in evidence/, checked."""
    (proof,) = evidence.kept(cluster.layout(name).state / "evidence")
    key = cluster.federation.get(Peer(culprit)).key
    return {m.digest for m in evidence.require_proof(proof, (key,), cluster.federation)}


def hold(layout: Layout, other: Signed) -> None:
    """In this journal, instead of the manifest that it was sent. Its daemon is down."""
    with sqlite3.connect(layout.journal) as journal:
        changed = journal.execute(
            "UPDATE manifests SET document = ?, content = ? WHERE round = ? AND peer = ?",
            (other.document, json.dumps(other.content), other.content["round"], other.content["peer"]),
        )
        assert changed.rowcount == 1
    journal.close()
