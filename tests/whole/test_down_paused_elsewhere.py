"""Real daemons: a hospital that stops, is paused, or has joined another federation file is named by the others."""

from __future__ import annotations

from pathlib import Path

from cluster import Cluster, peer, warned

from hsl_node.federation.config import federation_text
from hsl_node.federation.plan import Plan
from hsl_node.host import control

PLAN = Plan(method="fedavg", rounds=2)
OFTEN = "import hsl_node.node.peers.liveness as m; m.SHORTEST_S, m.LOOK_S = 0.5, 0.05"


def test_a_paused_hospital_is_seen_as_paused_and_one_that_is_gone_as_down(tmp_path: Path) -> None:
    with Cluster(tmp_path, ("ash", "birch"), PLAN, prelude=OFTEN) as cluster:
        cluster.hold("birch")
        cluster.start_all()
        is_ = lambda word: lambda s: (peer(s, "birch")["life"] or {}).get("state") == word  # noqa: E731
        cluster.wait_until("ash", is_("alive"), "birch is alive")
        control.ask(cluster.layout("birch").state, "pause")
        status = cluster.wait_until("ash", is_("paused"), "birch is paused")
        assert not status["warnings"], "no alarm before the plan's time"
        control.ask(cluster.layout("birch").state, "resume")
        cluster.wait_until("ash", is_("alive"), "birch goes on")
        cluster.kill("birch")
        status = cluster.wait_until("ash", is_("down"), "birch is down")
        assert peer(status, "birch")["life"]["since"] <= peer(status, "birch")["life"]["heard"] + 0.1
        cluster.start("birch")
        cluster.wait_until("ash", is_("alive"), "birch is back")


def test_a_hospital_with_another_federation_file_is_named_at_both_sides_and_seldom_tried(tmp_path: Path) -> None:
    with Cluster(tmp_path, ("ash", "birch"), PLAN) as cluster:
        other = cluster.federation.model_copy(update={"plan": PLAN.model_copy(update={"rounds": 3})})
        (cluster.layout("birch").state / "federation.toml").write_text(federation_text(other))
        cluster.start_all()
        at_ash = cluster.wait_until("ash", lambda s: warned(s, "federation birch"), "birch is on another file")
        at_birch = cluster.wait_until("birch", lambda s: warned(s, "federation ash"), "ash is on another file")
        ours, theirs = cluster.federation.fed8, other.fed8
        text = next(w["text"] for w in at_ash["warnings"] if w["code"] == "federation birch")
        assert text.startswith(f"birch joined another federation file ({theirs}, ours is {ours})")
        assert any(f"({ours}, ours is {theirs})" in w["text"] for w in at_birch["warnings"])
        waits = lambda s: peer(s, "birch")["sent"]["state"] == "waiting to retry"  # noqa: E731
        seldom = lambda s: waits(s) and peer(s, "birch")["sent"]["next_try_s"] > 30  # noqa: E731
        status = cluster.wait_until("ash", seldom, "no retry for a minute")
        assert peer(status, "birch")["sent"]["retries"] < 12

        assert cluster.stop("birch") == 0
        (cluster.layout("birch").state / "federation.toml").write_text(federation_text(cluster.federation))
        (cluster.layout("birch").journal).unlink()
        cluster.start("birch")
        cluster.wait_finished()
        assert not warned(cluster.status("ash"), "federation birch")
