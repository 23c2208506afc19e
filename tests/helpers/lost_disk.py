"""Daemons of which one loses its disk, and what must come of it: the bytes of the undisturbed run."""

from __future__ import annotations

import shutil

from cluster import Cluster

from hsl_node.federation.plan import Plan
from hsl_node.sync.store.journal import Journal

PLAN = Plan(method="fedavg", fusion="mean", rounds=3, epochs_per_round=2, plateau_rounds=100)
NAMES = ("ash", "birch", "cedar")
KEPT = ("keys", "node.toml", "federation.toml", "log")
LOST = 15  # exit code of a node that finds it was set back


def lose_disk(cluster: Cluster, name: str) -> None:
    """Everything is gone but what an operator keeps elsewhere: keys and the two settings files."""
    for path in cluster.layout(name).state.iterdir():
        if path.name not in KEPT:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    cluster.layout(name).make()


def require_same(cluster: Cluster, undisturbed: dict[int, str]) -> None:
    """All rounds fused to the undisturbed digests everywhere, and nobody saw two signatures for one round."""
    cluster.wait_finished()
    for name in cluster.names:
        assert cluster.fused(name) == undisturbed
        assert not list((cluster.layout(name).state / "evidence").iterdir())


def signed(cluster: Cluster, name: str, round: int) -> bytes:
    with Journal.read_only(cluster.layout(name).journal) as journal:
        found = journal.signed(round)
        assert found is not None
        return found[1]
