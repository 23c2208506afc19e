"""Three daemons; cedar's inbox is a real sshd, which can offer nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tomli_w
from cluster import Cluster
from lost_disk import NAMES, PLAN
from sshd import Sshd

from hsl_node.federation.config import Federation, federation_text

HURRY = "import hsl_node.node.heal.fetch_missing as m; m.PATIENCE_S = 1.0"


@contextmanager
def with_a_plain_inbox(folder: Path, prelude: str = HURRY, **options: Any) -> Iterator[Cluster]:
    """ash and birch with embedded inboxes, cedar's is OpenSSH with a folder for each sender."""
    with Cluster(folder / "nodes", NAMES, PLAN, prelude=prelude, **options) as cluster:
        homes = folder / "homes"
        for sender in ("ash", "birch"):
            for name in ("parts", "inbox", "receipts"):
                (homes / sender / name).mkdir(parents=True)
        accepted = "\n".join(cluster.federation.get(n).key for n in ("ash", "birch"))
        with Sshd(folder / "sshd", accepts=accepted, home=homes) as server:
            place = {"address": f"127.0.0.1:{server.port}", "host_key": server.host_key, "user": server.user}
            card = cluster.federation.get("cedar").model_copy(update={**place, "root": "{sender}"})
            cards = tuple(card if p.name == "cedar" else p for p in cluster.federation.peer)
            cluster.federation = Federation.model_validate(
                {**cluster.federation.model_dump(), "peer": [p.model_dump() for p in cards]}
            )
            for name in NAMES:
                (cluster.layout(name).state / "federation.toml").write_text(federation_text(cluster.federation))
            settings = {
                "name": "cedar",
                "address": card.address,
                "inbox": {"kind": "directory", "directory": str(homes)},
            }
            (cluster.layout("cedar").state / "node.toml").write_text(tomli_w.dumps(settings))
            yield cluster


def release(cluster: Cluster, *names: str) -> None:
    for name in names:
        cluster.release(name)
