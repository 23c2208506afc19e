"""A federation of real daemons that go on with their rounds while one of them is attacked.

with siege.endured("header"):           # afterwards: its log names the offender with this code, its memory and disk are
    asyncio.run(attack(siege.cedar))    # as they were, and two more rounds are fused by everybody

ash is attacked by whoever holds cedar's key; cedar's own daemon and birch are honest.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import asyncssh
from cluster import WAIT_S, Cluster
from hostile import Hostile

from hsl_node.federation import identity
from hsl_node.federation.names import Peer
from hsl_node.federation.plan import Plan
from hsl_node.host.control import ask
from hsl_node.host.layout import Layout
from hsl_node.sync.store.journal import Journal

PLAN = Plan(method="fedavg", fusion="mean", rounds=10_000, epochs_per_round=1, plateau_rounds=10_000)
TRAINER = ["--bytes", "60000", "--tensors", "3", "--epochs", "1", "--epoch-s", "0.1"]
RSS_GROWTH_MAX = 40 * 2**20  # bytes; a bomb or a flood is larger. What stays after a thousand: test_hostile_floods
DISK_GROWTH_MAX = 10 * 2**20  # a hundred checkpoints
# Every refusal is told here; that they are bounded has its own tests.
TELL_ALL = """
from hsl_node.host.log_limit import LogLimit
LogLimit.allows = lambda self, who: True
"""


class Siege:
    def __init__(self, cluster: Cluster, until_round: int = 4) -> None:
        self.cluster = cluster
        self.victim, self.owner = Peer("ash"), Peer("cedar")
        cluster.start_all()
        self.wait_for_round(until_round)  # by round 4 everybody has signed a whole one

    @property
    def victim_key(self) -> str:
        return self.cluster.federation.get(self.victim).key

    @property
    def cedar(self) -> Hostile:
        return self.holder_of(self.owner)

    def holder_of(self, peer: Peer) -> Hostile:
        return Hostile(
            peer,
            identity.load(self.cluster.layout(peer).key),
            self.cluster.federation,
            self.cluster.ports[self.victim],
            asyncssh.import_public_key(self.victim_key),
        )

    def genuine(self, peer: Peer = Peer("cedar")) -> list[dict[str, Any]]:
        """What `peer` truly signed so far, by round."""
        with Journal.read_only(self.cluster.layout(peer).journal) as journal:
            rows = journal.rows("manifests")
        return [r["content"] for r in sorted(rows, key=lambda r: int(r["round"])) if r["peer"] == peer]

    def next_manifest(self) -> dict[str, Any]:
        """A right manifest of cedar for the round after the victim's, which cedar itself has not reached."""
        last = next(m for m in reversed(self.genuine()) if m["round"] > 1)
        return {**last, "round": self.round + 1}

    def checkpoint(self) -> bytes:
        """The bytes of a right checkpoint."""
        return self.cluster.layout(self.owner).outbox(self.genuine()[-1]["round"]).read_bytes()

    @property
    def round(self) -> int:
        return int(self.cluster.status(self.victim)["round"])

    @property
    def state(self) -> Path:
        return self.cluster.layout(self.victim).state

    @property
    def pid(self) -> int:
        return self.cluster.processes[self.victim].pid

    def wait_for_round(self, round: int) -> None:
        self.cluster.wait_until(self.victim, lambda s: (s["round"] or 0) >= round, f"round {round}")

    @property
    def log_bytes(self) -> int:
        return Layout(self.state).event_log.stat().st_size

    def log(self, since: int = 0) -> list[dict[str, Any]]:
        """Events after byte `since`; each line must be one, whatever peers wrote into it."""
        with Layout(self.state).event_log.open("rb") as file:
            file.seek(since)
            return [json.loads(line) for line in file.read().splitlines()]

    @contextmanager
    def endured(self, *codes: str, still: bool = True) -> Iterator[None]:
        """`codes`: the victim's log gives each of them with cedar's name. `still`: the round stands meanwhile."""
        if still:
            ask(self.state, "pause")
            self.cluster.wait_until(self.victim, lambda s: s["phase"] == "train", "standing still")
        mark, memory, disk = self.log_bytes, rss(self.pid), held(self.state)
        yield
        # In the log and not in the warnings, which end as soon as the real cedar delivers.
        end = time.monotonic() + WAIT_S
        while not set(codes) <= {e.get("code") for e in self.log(mark) if e.get("peer") == self.owner}:
            assert time.monotonic() < end, (codes, self.log(mark)[-5:])
            time.sleep(0.05)
        assert rss(self.pid) < memory + RSS_GROWTH_MAX
        assert held(self.state) < disk + DISK_GROWTH_MAX
        ask(self.state, "resume")
        self.wait_for_round(self.round + 2)
        status = self.cluster.status(self.victim)
        assert status["phase"] != "halted", status["warnings"]


def rss(pid: int) -> int:
    """Resident bytes of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def open_files(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def held(folder: Path) -> int:
    """Bytes that a folder takes of the disk, without the log, which rotates."""
    total = 0
    for root, _, files in os.walk(folder):
        for name in files:
            if Path(root).name == "log":
                continue
            try:
                total += os.lstat(os.path.join(root, name)).st_blocks * 512
            except FileNotFoundError:
                continue  # collected meanwhile
    return total
