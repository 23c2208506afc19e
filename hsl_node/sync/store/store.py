"""The files of one node: what it publishes, what arrived verified, what it fused. One daemon at a time holds them."""

from __future__ import annotations

import fcntl
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import IO

from hsl_node.errors import AlreadyRunning, LocalStateError
from hsl_node.federation.names import Peer, Round
from hsl_node.host import durable
from hsl_node.host.durable import Step
from hsl_node.host.layout import Layout, round_in_name
from hsl_node.host.units import size
from hsl_node.sync.store.holdings import drop_parts
from hsl_node.sync.store.journal import Journal
from hsl_node.sync.store.room import Quota, Room, room

EVIDENCE_MAX_FILES = 1000  # a hostile peer may sign nonsense for ever; the first thousand pieces are proof enough


class Store:
    """The state directory, held by an flock until `close`."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        layout.make()
        self._lock = lock(layout.lock)
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
        path = self.layout.evidence / name
        there = path.exists()
        if there and path.read_bytes() == document:
            durable.accept(path)
        elif there or len(os.listdir(path.parent)) < EVIDENCE_MAX_FILES:
            durable.write(path, document, Step.RECEIVER_EVIDENCE)
        return path

    def prune(
        self,
        current: Round,
        keep_fused: frozenset[Round],
        keep_own: frozenset[Round] = frozenset(),
        keep_sets: frozenset[Round] = frozenset(),
    ) -> None:
        """Delete data that no peer can ask for, older than the last round, and what nothing here begins with any more.
        Manifests and receipts stay; of the rounds `keep_sets` everybody's checkpoints."""
        with durable.passing(Step.FUSION_PRUNE):
            for path in sorted(self.layout.inbox_folder.iterdir()):
                if round_in_name(path) < current - 1 and round_in_name(path) not in keep_sets:
                    shutil.rmtree(path)
            for path in sorted(self.layout.outbox_folder.iterdir()):
                if round_in_name(path) < current - 1 and round_in_name(path) not in keep_sets:
                    path.unlink()
            for path in sorted(self.layout.fused_folder.iterdir()):
                if round_in_name(path) < current - 2 and round_in_name(path) not in keep_fused:
                    path.unlink()
            for round, path in sorted(self.layout.own_files().items())[:-1]:  # of a backup the last may be an old one
                if round < current - 2 and round not in keep_own:
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
