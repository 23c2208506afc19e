"""Every path of a state directory: the only file that spells one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hsl_node.federation.names import Peer, Round

FOLDERS = ("keys", "outbox", "inbox", "quarantine", "fused", "trainer", "evidence", "cache", "log", "run")


@dataclass(frozen=True)
class Layout:
    """Where everything is in a state directory."""

    state: Path

    @property
    def key(self) -> Path:
        return self.state / "keys" / "node_ed25519"

    @property
    def journal(self) -> Path:
        return self.state / "journal.sqlite3"

    @property
    def anchor(self) -> Path:
        return self.state / "anchor.safetensors"

    @property
    def homes(self) -> Path:
        """Home folders of the senders, where the inbox is the embedded one."""
        return self.state / "quarantine" / "homes"

    @property
    def claimed(self) -> Path:
        """What was taken from a sender's inbox and is being checked: nobody else can reach it."""
        return self.state / "quarantine" / "claimed"

    @property
    def fetched(self) -> Path:
        """What is on its way here because this node asked for it: a folder for each giver."""
        return self.state / "quarantine" / "fetched"

    def outbox(self, round: Round) -> Path:
        return self.state / "outbox" / f"r{round:06d}.safetensors"

    def inbox(self, round: Round, peer: Peer) -> Path:
        return self.state / "inbox" / f"r{round:06d}" / f"{peer}.safetensors"

    def checkpoint(self, round: Round, peer: Peer, me: Peer) -> Path:
        """A peer's verified checkpoint, or mine."""
        return self.outbox(round) if peer == me else self.inbox(round, peer)

    def fused(self, round: Round) -> Path:
        """Round 0: the initial weights."""
        return self.state / "fused" / f"r{round:06d}.safetensors"

    def fused_files(self) -> dict[Round, Path]:
        """The fused models whose files are there."""
        return {_round_in_name(path): path for path in (self.state / "fused").glob("r*.safetensors")}

    def make(self) -> None:
        self.state.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.state.chmod(0o700)
        for folder in FOLDERS:
            (self.state / folder).mkdir(mode=0o700, exist_ok=True)
        for path in (self.homes, self.claimed, self.fetched):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)


def paths_of(layout: Layout, round: Round, me: Peer, peers: tuple[Peer, ...]) -> Mapping[Peer, Path]:
    """The checkpoint files of a full set."""
    return {p: layout.checkpoint(round, p, me) for p in peers}


def _round_in_name(path: Path) -> Round:
    found = re.match(r"r([0-9]{6})(?![0-9])", path.name)
    return int(found[1]) if found else 10**9  # not ours: leave it
