"""A peer that shows two faces to real daemons: cedar signs one manifest for ash and another for birch."""

from __future__ import annotations

import asyncio
import json
import struct
from typing import Any

import asyncssh
from cluster import Cluster
from hostile import Hostile, Signed

from hsl_node.federation import identity
from hsl_node.federation.names import Peer
from hsl_node.federation.plan import Plan
from hsl_node.sync.store.journal import Journal

PLAN = Plan(method="fedavg", fusion="mean", rounds=5, epochs_per_round=1, plateau_rounds=100)
HONEST, CULPRIT = ("ash", "birch"), "cedar"
TRAINER = ["--bytes", "60000", "--tensors", "3"]


def begin(cluster: Cluster, culprit: str = CULPRIT, honest: tuple[str, ...] = HONEST) -> None:
    """Start the honest daemons and give them the culprit's statement before the first round."""
    for name in honest:
        cluster.start(name)
    for name in honest:
        genuine = {**signed(cluster, name, 0), "peer": culprit}
        deliver(at(cluster, name, culprit).manifest(genuine), None, cluster, name, culprit)


def until_logged(cluster: Cluster, name: str, words: str) -> None:
    cluster.wait_until(name, lambda s: words in cluster.output(name), f"says: {words}")


def at(cluster: Cluster, name: str, culprit: str = CULPRIT) -> Hostile:
    return Hostile(
        Peer(culprit),
        identity.load(cluster.layout(culprit).key),
        cluster.federation,
        cluster.ports[name],
        asyncssh.import_public_key(cluster.federation.get(Peer(name)).key),
    )


def deliver(manifest: Signed, data: bytes | None, cluster: Cluster, name: str, culprit: str = CULPRIT) -> None:
    asyncio.run(asyncio.wait_for(at(cluster, name, culprit).deliver(manifest, data), 60))


def signed(cluster: Cluster, name: str, round: int) -> dict[str, Any]:
    """What an honest daemon has signed for a round; waits for it."""
    content: list[dict[str, Any]] = []

    def there(status: dict[str, Any]) -> bool:
        with Journal.read_only(cluster.layout(name).journal) as journal:
            rows = journal.rows("manifests")
        content[:] = [r["content"] for r in rows if (r["round"], r["peer"]) == (round, name)]
        return bool(content)

    cluster.wait_until(name, there, f"round {round} signed")
    return content[0]


def face(cluster: Cluster, value: float, culprit: str = CULPRIT) -> tuple[Signed, bytes]:
    """A checkpoint for round 1 whose last float is `value`, and the manifest that names it."""
    genuine = {**signed(cluster, "ash", 1), "peer": culprit, "samples": 15}
    data = cluster.layout("ash").outbox(1).read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    entries = json.loads(data[8:header])
    end = header + max(e["data_offsets"][1] for e in entries.values() if e["dtype"] == "F32")
    data = data[: end - 4] + struct.pack("<f", value) + data[end:]
    return at(cluster, "ash", culprit).about(data, genuine), data
