"""Daemons whose keys are replaced, and what their journals and keyrings say of it."""

from __future__ import annotations

import time
from pathlib import Path

from cluster import WAIT_S, Cluster
from federations import ASH, BIRCH, Members, stranger

from hsl_node.admin import rotate
from hsl_node.errors import (
    HslError,
    PeerDataError,
    UsageError,
)
from hsl_node.federation.identity import MANIFEST_NAMESPACE, verify
from hsl_node.federation.keyring import Keyring, sign_update
from hsl_node.federation.plan import Plan
from hsl_node.sync.store.journal import Journal

NAMES = ("ash", "birch", "cedar")
PLAN = Plan(method="fedavg", rounds=5, epochs_per_round=2, plateau_rounds=100)


def state(cluster: Cluster, name: str) -> Path:
    return cluster.layout(name).state


def signed_by(cluster: Cluster, at: str, key: str) -> set[int]:
    """Rounds whose manifest of ash, as `at` keeps it, was signed with this key."""
    with Journal.read_only(cluster.layout(at).journal) as journal:
        found = {m["round"]: journal.manifest(m["round"], ASH) for m in journal.rows("manifests") if m["peer"] == "ash"}
    rounds = set()
    for round, kept in found.items():
        assert kept is not None
        try:
            verify(kept["document"], key, MANIFEST_NAMESPACE)
            rounds.add(round)
        except PeerDataError:
            pass
    return rounds


def end_when_settled(cluster: Cluster, name: str) -> None:
    """`peer update --finish`, as often as it says "not yet"."""
    deadline = time.monotonic() + WAIT_S
    while True:
        try:
            assert rotate.end(state(cluster, name), "ash").live
            return
        except UsageError:
            raise
        except HslError as exc:
            assert "old key" in exc.message and time.monotonic() < deadline, exc
            time.sleep(0.1)


def sent(status: dict, name: str) -> dict:  # type: ignore[type-arg]
    return next(p["sent"] for p in status["peers"] if p["name"] == name)


def next_of(state: Path) -> Path:
    return state / "keys" / "node_ed25519.next"


def announced(members: Members, ring: Keyring | None = None) -> tuple[Keyring, str]:
    ring = ring or Keyring.of(members.federation)
    return ring, sign_update(ring, BIRCH, members.identities[BIRCH], stranger().public)


def wait_delivered(cluster: Cluster) -> None:
    """Finished, and all have the receipts for their closing statements."""
    cluster.wait_finished()
    last = f"round {cluster.federation.plan.rounds + 1}: accepted"
    for name in cluster.names:
        cluster.wait_until(name, lambda s: all(p["receipt"] == last for p in s["peers"]), last)
