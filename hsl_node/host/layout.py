"""Every path of a state directory but for a few names that one writer has for itself. Loads fast."""

from __future__ import annotations

import re
from pathlib import Path


class Layout:
    """Where everything is in a state directory. Who writes trainer/, cache/ and evidence/ names the files there;
    of trainer/ one is read by others too, `own`."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.node_toml = state / "node.toml"
        self.federation_toml = state / "federation.toml"
        self.keyring_toml = state / "keyring.toml"
        self.splits = state / "splits.json"
        self.anchor = state / "anchor.safetensors"
        self.journal = state / "journal.sqlite3"
        self.keys = state / "keys"
        self.key = self.keys / "node_ed25519"
        self.outbox_folder = state / "outbox"
        self.inbox_folder = state / "inbox"
        self.fused_folder = state / "fused"
        self.quarantine = state / "quarantine"
        self.homes = self.quarantine / "homes"  # of the senders, where the inbox is the embedded one
        self.claimed = (
            self.quarantine / "claimed"
        )  # taken from a sender's inbox, being checked: nobody else can reach it
        self.fetched = (
            self.quarantine / "fetched"
        )  # on its way here because this node asked for it: a folder for each giver
        self.refused = self.quarantine / "refused"  # signed manifests that failed a check
        self.trainer = state / "trainer"
        self.alone = self.trainer / "alone"
        self.evidence = state / "evidence"
        self.cache = state / "cache"
        self.log = state / "log"
        self.event_log = self.log / "hsl-node.log"
        self.trainer_log = self.log / "trainer.log"
        self.run = state / "run"
        self.lock = self.run / "lock"
        self.keys_lock = self.run / "keys.lock"
        self.socket = self.run / "control.sock"
        self.restoring = state / ".restore"  # a restore that was cut short, to be made again
        self.past = state / "past"  # what belongs to an earlier federation

    def outbox(self, round: int) -> Path:
        return self.outbox_folder / f"r{round:06d}.safetensors"

    def inbox(self, round: int, peer: str) -> Path:
        return self.inbox_folder / f"r{round:06d}" / f"{peer}.safetensors"

    def checkpoint(self, round: int, peer: str, me: str) -> Path:
        """A peer's verified checkpoint, or mine."""
        return self.outbox(round) if peer == me else self.inbox(round, peer)

    def fused(self, round: int) -> Path:
        """Round 0: the initial weights."""
        return self.fused_folder / f"r{round:06d}.safetensors"

    def own(self, round: int) -> Path:
        """All tensors of what this node sent in a round, also those that never leave it. Nobody else has it."""
        return self.trainer / f"own_r{round:06d}.safetensors"

    def own_files(self) -> dict[int, Path]:
        return {round_in_name(path): path for path in self.trainer.glob("own_r*.safetensors")}

    def fused_files(self) -> dict[int, Path]:
        """The fused models whose files are there."""
        return {round_in_name(path): path for path in self.fused_folder.glob("r*.safetensors")}

    def card(self, name: str) -> Path:
        return self.state / f"{name}.card"

    def update(self, name: str, number: int) -> Path:
        """As `verify --export` names it; no peer's name has a "_"."""
        return self.state / f"{name}_{number}.update"

    def make(self) -> None:
        self.state.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.state.chmod(0o700)
        for path in (
            self.keys, self.outbox_folder, self.inbox_folder, self.quarantine, self.homes, self.claimed, self.fetched,
            self.fused_folder, self.trainer, self.evidence, self.cache, self.log, self.run,
        ):  # fmt: skip
            path.mkdir(mode=0o700, exist_ok=True)


def round_in_name(path: Path) -> int:
    found = re.match(r"(?:own_)?r([0-9]{6})(?![0-9])", path.name)
    return int(found[1]) if found else 10**9  # not ours: leave it
