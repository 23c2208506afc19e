"""Repeat a finished demo's run with new keys and two kills: are the fused models the same, how much was sent twice?

    hsl-node demo --out hsl-demo ...                       # undisturbed
    python benchmarks/interruption.py hsl-demo             # the same plan, data and names; one daemon killed twice

The victim (the second hospital) is killed with SIGKILL once in mid-epoch, in round 1, and once in mid-transfer, in
round 2: when another hospital's inbox holds between a tenth and nine tenths of its checkpoint. Both times it is started
again at once. Real daemons, real trainers.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import tomllib
from pathlib import Path

import tomli_w

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "helpers"))
import cluster as clusters

from hsl_node.federation.config import load_federation
from hsl_node.federation.names import PARTS
from hsl_node.sync.store.journal import Journal

clusters.WAIT_S = 3600  # a round of real training takes minutes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path, help="folder of a finished demo")
    parser.add_argument("--folder", type=Path, help="where the state folders go (default: a temporary one)")
    args = parser.parse_args()
    nodes = args.demo.resolve() / "nodes"
    names = sorted(p.name for p in nodes.iterdir())
    original = load_federation(nodes / names[0])
    victim = names[1]
    with (
        tempfile.TemporaryDirectory(dir=args.folder) as folder,
        clusters.Cluster(Path(folder), names, original.plan, trainer=None, anchor=original.anchor) as cluster,
    ):
        for name in names:
            copy_settings(nodes / name, cluster, name)
        began = time.monotonic()
        cluster.start_all()
        kills = [kill_in_mid_epoch(cluster, victim), kill_in_mid_transfer(cluster, victim)]
        cluster.wait_finished()
        for name in names:
            cluster.wait_until(name, lambda s: all(p["sent"]["state"] == "done" for p in s["peers"]), "all delivered")
        seconds = time.monotonic() - began
        undisturbed = [fused(nodes / n) for n in names]
        disturbed = [cluster.fused(n) for n in names]
        resent = {n: resent_bytes(cluster.layout(n).journal) for n in names}
    print(
        json.dumps(
            {
                "victim": victim,
                "kills": kills,
                "fused_undisturbed": undisturbed[0],
                "fused_with_kills": disturbed[0],
                "all_the_same": all(d == undisturbed[0] for d in undisturbed + disturbed),
                "sent_twice_bytes": resent,
                "seconds": round(seconds, 1),
            },
            indent=2,
        )
    )


def copy_settings(source: Path, cluster: clusters.Cluster, name: str) -> None:
    """The original's data, anchor and trainer settings at this cluster's addresses."""
    content = tomllib.loads((source / "node.toml").read_text())
    address = f"127.0.0.1:{cluster.ports[name]}"
    content |= {
        "address": address,
        "listen": address,
        "anchor": content.get("anchor", str(source / "anchor.safetensors")),
    }
    (cluster.layout(name).state / "node.toml").write_text(tomli_w.dumps(content))


def kill_in_mid_epoch(cluster: clusters.Cluster, victim: str) -> str:
    status = cluster.wait_until(
        victim,
        lambda s: s["round"] == 1 and s["epoch"] is not None and s["epoch"]["epoch"] == 2 and s["epoch"]["batch"] > 1,
        "the second epoch",
    )
    cluster.kill(victim)
    cluster.start(victim)
    epoch = status["epoch"]
    return f"round 1, epoch {epoch['epoch']}, batch {epoch['batch']} of {epoch['batches']}"


def kill_in_mid_transfer(cluster: clusters.Cluster, victim: str) -> str:
    """Watch the others' parts/ of the victim, since a transfer on this machine takes about a second."""
    cluster.wait_until(victim, lambda s: s["round"] == 2 and s["phase"] == "train", "round 2")
    homes = [cluster.layout(n).homes / victim / PARTS for n in cluster.names if n != victim]
    total = cluster.layout(victim).fused(0).stat().st_size
    end = time.monotonic() + clusters.WAIT_S
    while time.monotonic() < end:
        for part in (p for home in homes for p in home.glob("*_r000002_*.safetensors.part")):
            try:
                size = part.stat().st_size
            except FileNotFoundError:
                continue
            if total / 10 < size < total * 9 / 10:
                cluster.kill(victim)
                left = {h.parent.parent.parent.parent.name: sum(p.stat().st_size for p in h.iterdir()) for h in homes}
                cluster.start(victim)
                return f"round 2, bytes at the others: {left} of {total}"
        time.sleep(0.002)
    raise SystemExit("no transfer of round 2 was seen under way")


def fused(state: Path) -> dict[int, str]:
    with Journal.read_only(state / "journal.sqlite3") as journal:
        return {r["round"]: r["sha256"] for r in journal.rows("fused")}


def resent_bytes(path: Path) -> dict[str, int]:
    """Bytes that a node sent twice, per round and receiver; only those above 0."""
    with Journal.read_only(path) as journal:
        return {f"round {t['round']} to {t['peer']}": t["resent"] for t in journal.rows("transfers") if t["resent"]}


if __name__ == "__main__":
    main()
