"""A peer that shows two faces to real daemons: both name it, with its own signatures as proof, and nobody goes on."""

from __future__ import annotations

import asyncio
import json
import struct
from pathlib import Path
from typing import Any

import asyncssh
from cluster import Cluster
from hostile import Hostile, Signed

from hsl_node import identity
from hsl_node.config import Plan
from hsl_node.identity import MANIFEST_NAMESPACE, verify
from hsl_node.sync.journal import Journal
from hsl_node.sync.names import Peer

PLAN = Plan(method="fedavg", fusion="mean", rounds=5, epochs_per_round=1, plateau_rounds=100)
HONEST, CULPRIT = ("ash", "birch"), "cedar"


def test_threat_11_x_to_one_and_y_to_the_other_is_named_by_both_with_proof(tmp_path: Path) -> None:
    """cedar is played by the test. Its two checkpoints are right in every way but that there are two."""
    with Cluster(tmp_path, (*HONEST, CULPRIT), PLAN, trainer=["--bytes", "60000", "--tensors", "3"]) as cluster:
        for name in HONEST:
            cluster.start(name)
        for name in HONEST:  # the statement before the first round
            deliver(at(cluster, name).manifest({**signed(cluster, name, 0), "peer": CULPRIT}), None, cluster, name)
        faces = {name: face(cluster, value) for name, value in zip(HONEST, (1.0, 2.0), strict=True)}
        for name, (manifest, data) in faces.items():
            deliver(manifest, data, cluster, name)
        for name in HONEST:
            status = cluster.wait_until(name, lambda s: any(w["code"] == "halted" for w in s["warnings"]), "a halt")
            assert CULPRIT in next(w["text"] for w in status["warnings"] if w["code"] == "halted")
            assert sorted(cluster.fused(name)) == [0, 1], "nobody went on"
        for name, other in (HONEST, HONEST[::-1]):  # each face, shown to the other too
            deliver(*faces[other], cluster, name)
            cluster.wait_until(name, lambda s: "equivocation" in str(s["warnings"]), "proof")
            evidence = [p.read_bytes() for p in (cluster.layout(name).state / "evidence").glob(f"*_{CULPRIT}_*")]
            lines = [verify(d, cluster.federation.get(Peer(CULPRIT)).key, MANIFEST_NAMESPACE) for d in evidence]
            assert {json.loads(line)["sha256"] for line in lines} == {m.content["sha256"] for m, _ in faces.values()}
            assert "equivocation" in cluster.output(name) and f"peer={CULPRIT}" in cluster.output(name)


def at(cluster: Cluster, name: str) -> Hostile:
    return Hostile(
        Peer(CULPRIT),
        identity.load(cluster.layout(CULPRIT).key),
        cluster.federation,
        cluster.ports[name],
        asyncssh.import_public_key(cluster.federation.get(Peer(name)).key),
    )


def deliver(manifest: Signed, data: bytes | None, cluster: Cluster, name: str) -> None:
    asyncio.run(asyncio.wait_for(at(cluster, name).deliver(manifest, data), 60))


def signed(cluster: Cluster, name: str, round: int) -> dict[str, Any]:
    """What an honest daemon has signed for a round; waits for it."""
    content: list[dict[str, Any]] = []

    def there(status: dict[str, Any]) -> bool:
        journal = Journal.read_only(cluster.layout(name).journal)
        try:
            rows = journal.rows("manifests")
        finally:
            journal.close()
        content[:] = [r["content"] for r in rows if (r["round"], r["peer"]) == (round, name)]
        return bool(content)

    cluster.wait_until(name, there, f"round {round} signed")
    return content[0]


def face(cluster: Cluster, value: float) -> tuple[Signed, bytes]:
    """A checkpoint for round 1 whose last float is `value`, and the manifest that names it."""
    genuine = {**signed(cluster, "ash", 1), "peer": CULPRIT, "samples": 15}
    data = cluster.layout("ash").outbox(1).read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    entries = json.loads(data[8:header])
    end = header + max(e["data_offsets"][1] for e in entries.values() if e["dtype"] == "F32")
    data = data[: end - 4] + struct.pack("<f", value) + data[end:]
    return at(cluster, "ash").about(data, genuine), data
