"""The files of one node: what it publishes, what arrived verified, what it fused. One daemon at a time holds them."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from hsl_node.errors import AlreadyRunning, LocalStateError
from hsl_node.sync import durable
from hsl_node.sync.durable import Step
from hsl_node.sync.holdings import drop_parts
from hsl_node.sync.journal import Journal
from hsl_node.sync.limits import Quota
from hsl_node.sync.names import Peer, Round
from hsl_node.units import size

FOLDERS = ("keys", "outbox", "inbox", "quarantine", "fused", "trainer", "evidence", "cache", "log", "run")
EVIDENCE_MAX_FILES = 1000  # a hostile peer may sign nonsense for ever; the first thousand pieces are proof enough


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


class Store:
    """The state directory, held by an flock until `close`."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        layout.make()
        self._lock = lock(layout.state / "run" / "lock")
        try:
            drop_parts(layout.homes, Quota.reserve_bytes)  # first: on a full disk no journal opens
            self.journal = Journal.create(layout.journal)
        except BaseException:
            self._lock.close()
            raise

    def close(self) -> None:
        self.journal.close()
        self._lock.close()

    def admit(self, data: Path, round: Round, peer: Peer) -> None:
        """Move a verified checkpoint into the inbox, durably. The bytes were fsynced by the receiver."""
        target = self.layout.inbox(round, peer)
        with durable.passing(Step.RECEIVER_ADMIT):
            durable.make_folder(target.parent)
            durable.rename(data, target)
            durable.renamed(Step.RECEIVER_ADMIT)
            durable.sync_folder(target.parent)
            durable.sync_folder(target.parent.parent)

    def keep_evidence(self, name: str, document: bytes) -> Path:
        """Keep a signed document that proves a peer's fault, in place of what lies there: see `evidence.keep`."""
        path = self.layout.state / "evidence" / name
        there = path.exists()
        if there and path.read_bytes() == document:
            durable.accept(path)
        elif there or len(os.listdir(path.parent)) < EVIDENCE_MAX_FILES:
            durable.write(path, document, Step.RECEIVER_EVIDENCE)
        return path

    def prune(self, current: Round, keep_fused: frozenset[Round]) -> None:
        """Delete data that no peer can ask for: older than the last round. Manifests and receipts stay."""
        with durable.passing(Step.FUSION_PRUNE):
            for path in sorted((self.layout.state / "inbox").iterdir()):
                if _round_in_name(path) < current - 1:
                    shutil.rmtree(path)
            for path in sorted((self.layout.state / "outbox").iterdir()):
                if _round_in_name(path) < current - 1:
                    path.unlink()
            for path in sorted((self.layout.state / "fused").iterdir()):
                if _round_in_name(path) < current - 2 and _round_in_name(path) not in keep_fused:
                    path.unlink()

    def require_room(self, checkpoint_bytes: int, peers: int, reserve_bytes: int) -> None:
        """Two rounds of everybody must fit beside the reserve before a round starts.

        Raises:
            LocalStateError: says how much is missing.
        """
        found = self.room(checkpoint_bytes, peers, reserve_bytes)
        if found.free < found.round:
            free, need = size(found.free), size(found.round)
            raise LocalStateError(
                f"{self.layout.state} has {free} free; two rounds of {peers} peers need {need}",
                remedy="free some space; the node goes on by itself",
            )

    def room(self, checkpoint_bytes: int, peers: int, reserve_bytes: int) -> Room:
        """See `room`."""
        return room(self.layout, checkpoint_bytes, peers, reserve_bytes)


@dataclass(frozen=True)
class Room:
    """Bytes of the disk: what is free, and below what free space this node does without something."""

    free: int
    arrival: int  # below it the inbox takes in no checkpoint of a peer
    round: int  # below it no round is started; at least `arrival`


def reserve_of(inbox: str) -> int:
    """Bytes of the disk that this kind of inbox never gives away: another program's server knows of none."""
    return Quota.reserve_bytes if inbox == "embedded" else 0


def room(layout: Layout, checkpoint_bytes: int, peers: int, reserve_bytes: int) -> Room:
    """What the disk has and what this node needs of it: what is stored already counts as room for a round.

    The inbox never gives its reserve away, so what a round still has to store comes on top of that.
    """
    held = sum(_held(layout.state / folder) for folder in ("inbox", "outbox"))
    missing = max(checkpoint_bytes, 2 * (peers + 1) * checkpoint_bytes - held)
    free = shutil.disk_usage(layout.state).free
    return Room(free, reserve_bytes + checkpoint_bytes, reserve_bytes + missing)


def _held(folder: Path) -> int:
    """Bytes of the checkpoints below a folder. `prune` may be deleting some of them in another thread meanwhile."""
    total = 0
    for where, _, names in os.walk(folder):  # unlike rglob it passes over a folder that is gone by now
        for name in names:
            if name.endswith(".safetensors"):
                with suppress(FileNotFoundError):
                    total += os.stat(os.path.join(where, name)).st_size
    return total


def paths_of(layout: Layout, round: Round, me: Peer, peers: tuple[Peer, ...]) -> Mapping[Peer, Path]:
    """The checkpoint files of a full set."""
    return {p: layout.outbox(round) if p == me else layout.inbox(round, p) for p in peers}


def lock(path: Path) -> IO[str]:
    """Hold a state directory until the file is closed. Raises: AlreadyRunning, LocalStateError."""
    file = open(path, "a+")  # noqa: SIM115  (held open on purpose: closing it is what frees the lock)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as exc:
        file.seek(0)
        owner = file.read().strip() or "unknown"
        file.close()
        raise AlreadyRunning(
            f"another hsl-node (process {owner}) holds {path.parent.parent}",
            remedy="`hsl-node status` shows it; `hsl-node stop` ends it",
        ) from exc
    except OSError as exc:
        file.close()
        raise LocalStateError(
            f"{path} cannot be locked: {exc}", remedy="keep the state directory on a local disk"
        ) from exc
    with suppress(OSError):  # a full disk: it is only for people
        file.truncate(0)
        os.write(file.fileno(), str(os.getpid()).encode())
    return file


def _round_in_name(path: Path) -> Round:
    found = re.match(r"r([0-9]{6})(?![0-9])", path.name)
    return int(found[1]) if found else 10**9  # not ours: leave it
