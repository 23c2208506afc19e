"""One node of three falls over in every phase of every round. The test decides when, not what it happens to see.

fallen = falls_in_every_phase(cluster, "birch", harm)     # `harm` is done to it each time before it is started again
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cluster import Cluster

from hsl_node.host.durable import Step


def falls_in_every_phase(
    cluster: Cluster, victim: str, harm: Callable[[str], None] = lambda name: None
) -> list[tuple[int, str]]:
    """From the first start to the end of the run; gives the rounds and phases in which the victim fell.

    Where it waits for what the test holds back it is killed; in FUSE and at the end a crash point ends it.
    """
    last, fallen = cluster.federation.plan.rounds, list[tuple[int, str]]()
    slow, witness = (n for n in cluster.names if n != victim)

    def falls(round: int, phase: str, crash_at: str = "") -> None:
        if crash_at:
            cluster.crash(victim, crash_at)
        else:
            there = (round, phase)
            cluster.wait_until(victim, lambda s: (s["round"], s["phase"]) == there, f"round {round}, {phase}")
            cluster.kill(victim)
        fallen.append((round, phase))
        harm(victim)

    def trained(round: int) -> None:
        cluster.hold(victim, round + 1)
        cluster.start(victim)
        cluster.wait_until(witness, lambda s: has(s, round, victim), f"has {victim}'s round {round}")

    cluster.hold(victim)
    cluster.hold(slow)
    cluster.start(victim)
    falls(0, "agree")  # nobody else is there yet
    cluster.start_all()
    for round in range(1, last + 1):
        falls(round, "train")
        trained(round)
        falls(round, "collect")
        cluster.hold(slow, round + 1)
        if round == last:  # one of many points of it: test_crash_points.py has them all
            falls(round, "fuse", Step.FUSION_WRITE.points[1])
        else:
            cluster.start(victim)
    falls(last + 1, "agree", Step.SENDER_SIGN.points[0])
    cluster.start(victim)
    cluster.wait_finished()
    return fallen


def has(status: dict[str, Any], round: int, *peers: str) -> bool:
    """This node is in that round and has these peers' checkpoints of it."""
    there = {p["name"] for p in status["peers"] if p["received"]["state"] == "verified"}
    return bool(status["round"] == round and there.issuperset(peers))
