"""After the end of a run, or a halt: the last fused model is validated, the last statement delivered, and both told.

Real daemons. The stand-in trainer validates the model of round 1 when it is let into round 2.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster
from two_faces import at, deliver, signed
from typer.testing import CliRunner

from hsl_node.commands.app import app
from hsl_node.errors import UsageError
from hsl_node.federation.plan import Plan
from hsl_node.host import control
from hsl_node.results import evaluate, models
from hsl_node.status.page import fetch, render
from hsl_node.status.snapshot import from_json
from hsl_node.sync.store.journal import Journal

NAMES = ("ash", "birch")
PLAN = Plan(method="fedavg", fusion="mean", rounds=1, epochs_per_round=1)
# A daemon delivers no closing statement while a file beside its state directory says so.
LATE = """
import asyncio, os, sys
from hsl_node.node.delivery import Delivery
push = Delivery.push
async def late(self, action):
    while action.round == 2 and os.path.exists(sys.argv[1] + ".late"):
        await asyncio.sleep(0.05)
    return await push(self, action)
Delivery.push = late
"""
# birch never signs its closing statement.
SILENT = """
import asyncio, sys
from hsl_node.node.signing import Signing
declare = Signing.declare
async def opening(self, action):
    if sys.argv[1].endswith("birch") and action.round > 0:
        await asyncio.Event().wait()
    return await declare(self, action)
Signing.declare = opening
"""


def line(status: dict[str, Any]) -> str:
    """What the page says is still to do."""
    page = " ".join(render(from_json(status), now=status["started"] or 0.0).split())
    return page.partition("still to do ")[2].partition(" Keep the daemon running until this line is gone")[0]


def is_validated(status: dict[str, Any]) -> bool:
    return status["last_fused"] is not None and status["last_fused"]["score"] is not None


def require_no_model_yet(state: Path) -> None:
    """Of those that take the best one; who names a round gets it."""
    for take in (lambda: evaluate.evaluate(state), lambda: models.find_model(state, None)):
        with pytest.raises(UsageError, match=r"last fused model \(round 1\) is still to be validated") as caught:
            take()
        assert caught.value.exit_code == 2 and "`hsl-node status`" in caught.value.remedy
    assert models.find_model(state, 1).round == 1


def pause(state: Path) -> str:
    return CliRunner().invoke(app, ["--state", str(state), "pause"]).stdout


def test_a_finished_node_says_what_it_must_stay_up_for_and_gives_no_earlier_model_as_the_best(tmp_path: Path) -> None:
    with Cluster(tmp_path, NAMES, PLAN, prelude=LATE) as cluster:
        state, late = cluster.layout("ash").state, tmp_path / "ash.late"
        late.touch()
        cluster.hold("ash", 2)
        cluster.start_all()
        status = cluster.wait_until("ash", lambda s: s["state"] == "finished", "finished")
        assert status["still_to_do"] == {"deliver_to": ["birch"], "validate": 1}
        both = "deliver this node's last statement to birch; validate the last fused model (round 1)."
        assert line(status) == both
        require_no_model_yet(state)

        assert pause(state).startswith("paused: the last fused model is not validated until")
        (warning,) = [w for w in cluster.status("ash")["warnings"] if w["code"] == "paused"]
        assert "last fused model is not validated" in warning["text"]
        assert pause(state).startswith("it is paused already")
        control.ask(state, "resume")

        assert cluster.stop("ash") == 0
        assert line(fetch(state).as_json()) == both, "whoever looks when it is down is told too"
        require_no_model_yet(state)
        cluster.start("ash")

        cluster.release("ash")
        status = cluster.wait_until("ash", is_validated, "validated")
        assert line(status) == "deliver this node's last statement to birch."
        assert models.find_model(state, None).round == 1
        assert "nothing to pause" in pause(state)
        late.unlink()
        status = cluster.wait_until("ash", lambda s: s["still_to_do"] is None, "delivered")
        assert status["state"] == "finished" and line(status) == ""


def halted_before_its_last_model_is_validated(cluster: Cluster) -> dict[str, Any]:
    """ash learns in AGREE, after the last fusion, that birch has signed round 1 twice."""
    cluster.hold("ash", 2)
    cluster.start_all()
    cluster.wait_until("ash", lambda s: (s["phase"], s["round"]) == ("agree", 2), "the last fusion")
    second = at(cluster, "ash", "birch").manifest(signed(cluster, "birch", 1), samples=77)
    cluster.kill("birch")
    deliver(second, None, cluster, "ash", "birch")
    status = cluster.wait_until("ash", lambda s: s["state"] == "halted", "halts")
    assert status["still_to_do"]["validate"] == 1 and "validate the last fused model (round 1)" in line(status)
    require_no_model_yet(cluster.layout("ash").state)
    return status


@pytest.mark.parametrize("restarted", [False, True])
def test_a_halted_node_validates_its_last_fused_model_too(tmp_path: Path, restarted: bool) -> None:
    """Its final model is then the one that the other hospitals have."""
    with Cluster(tmp_path, NAMES, PLAN, prelude=SILENT) as cluster:
        reason = halted_before_its_last_model_is_validated(cluster)["reason"]
        if restarted:
            cluster.kill("ash")
            cluster.start("ash")
        cluster.release("ash")
        status = cluster.wait_until("ash", is_validated, "validated")
        assert (status["state"], status["reason"]) == ("halted", reason)
        assert status["still_to_do"] in (None, {"deliver_to": ["birch"], "validate": None})
        assert sorted(cluster.fused("ash")) == [0, 1]
        assert models.find_model(cluster.layout("ash").state, None).round == 1


def test_a_last_model_that_cannot_be_validated_leaves_a_halt_as_it_is(tmp_path: Path) -> None:
    """Elsewhere an altered file ends the daemon, and its next start asks the peers for another state."""
    with Cluster(tmp_path, NAMES, PLAN, prelude=SILENT) as cluster:
        reason = halted_before_its_last_model_is_validated(cluster)["reason"]
        cluster.kill("ash")
        path = cluster.layout("ash").fused(1)
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        cluster.release("ash")
        cluster.start("ash")

        def told(status: dict[str, Any]) -> list[dict[str, Any]]:
            return [w for w in status["warnings"] if w["code"] == "unvalidated"]

        status = cluster.wait_until("ash", lambda s: bool(told(s)), "says so")
        (warning,) = told(status)
        assert "fused/r000001.safetensors" in warning["text"] and str(tmp_path) not in warning["text"]
        assert "from a peer that has it" in warning["fix"] and "hsl-node resume" in warning["fix"]
        assert (status["state"], status["reason"]) == ("halted", reason)
        path.write_bytes(whole)
        for op in ("pause", "resume"):
            assert control.ask(cluster.layout("ash").state, op)["changed"]
        status = cluster.wait_until("ash", is_validated, "tried again")
        assert not told(status) and (status["state"], status["reason"]) == ("halted", reason)


def test_threat_08_a_last_model_that_diverges_is_tried_again_by_pause_and_resume(tmp_path: Path) -> None:
    """As the alarm says; the run is finished meanwhile."""
    with Cluster(tmp_path, NAMES, PLAN, trainer=["--fragile"]) as cluster:
        cluster.start("ash")
        cluster.trainer = ["--times", "1e7"]
        cluster.start("birch")

        def noted() -> int:
            with Journal.read_only(cluster.layout("ash").journal) as journal:
                return sum(n["code"] == "diverged" for n in journal.rows("notes"))

        def diverged(status: dict[str, Any]) -> bool:
            return status["phase"] == "finished" and any(w["code"] == "diverged" for w in status["warnings"])

        cluster.wait_until("ash", diverged, "diverged")
        for op in ("pause", "resume"):
            assert control.ask(cluster.layout("ash").state, op)["changed"]
        cluster.wait_until("ash", lambda s: noted() == 2 and diverged(s), "tried again")
