"""The mark in the journal: this node may have lost something of its state, and must ask before it signs anything.

By `recover --from-peers`, `restore`, by a peer's proof (`asking.py`), by a checkpoint that is gone or altered
(`altered.py`), or when a journal came to another machine.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from hsl_node import config, enrol, exports, identity
from hsl_node.errors import UsageError
from hsl_node.sync import keyring
from hsl_node.sync.journal import Journal
from hsl_node.sync.names import Peer
from hsl_node.sync.store import Layout, Store

ALTERED = "altered"  # what this disk did to checkpoints (`altered.py`), until its operator has acted


@dataclass(frozen=True)
class Mark:
    """Why this node must ask first, and whom it need not wait for."""

    why: str
    without: tuple[str, ...] = ()


def set_mark(journal: Journal, mark: Mark) -> None:
    journal.set_meta("recover", json.dumps({"why": mark.why, "without": mark.without}))


def find_mark(journal: Journal) -> Mark | None:
    content = json.loads(journal.meta("recover") or "null")
    return Mark(content["why"], tuple(content["without"])) if content else None


def machine_id() -> str:
    """Tells one machine from another, no more; empty where the system has no such file (most containers)."""
    with contextlib.suppress(OSError):
        if text := Path("/etc/machine-id").read_text().strip():
            return hashlib.sha256(f"hsl-node {text}".encode()).hexdigest()[:16]
    return ""


def due(journal: Journal) -> Mark | None:
    """Must this node ask before it goes on? Notices a journal that came to another machine."""
    known, here = journal.meta("machine"), machine_id()
    if find_mark(journal) is None and known and here and known != here and journal.state() is not None:
        set_mark(journal, Mark("its journal was written on another machine"))
    return find_mark(journal)


def prepare(state: Path, without: tuple[str, ...] = (), documents: tuple[Path, ...] = ()) -> tuple[Peer, ...]:
    """Mark the state directory: the next start asks these peers.

    What must be here: the key, node.toml, federation.toml, and the anchor set where the plan has one.

    `documents`: folders of `hsl-node verify --export` at peers that cannot be asked: they know what we signed.

    Raises:
        NotInitialised, ConfigError: one of these is missing; says where to get it.
        AlreadyRunning: stop the daemon first.
        UsageError: `without` names no other peer, or `documents` holds nothing that this node signed.
        PeerDataError, FederationMismatch: a document is not what its name says.
        Equivocation: two different manifests of one round carry this node's signature.
    """
    node, federation = config.load_node(state), config.load_federation(state)
    key = identity.load(identity.find_key(Layout(state).key)).public
    ring = keyring.load(state, federation)
    keyring.require_mine(ring, node.name, key)
    enrol.require_own_anchor(state, node, federation)
    others = tuple(p for p in federation.peers if p != node.name)
    for name in without:
        if name not in others:
            raise UsageError(f"{name!r} is not one of the other peers", remedy=f"they are: {', '.join(others)}")
    store = Store(Layout(state))
    try:
        for folder in documents:
            exports.take(folder, store, ring, Peer(node.name))
        store.journal.set_meta(ALTERED, "")
        set_mark(store.journal, Mark("its operator said that state was lost or set back", without))
    finally:
        store.close()
    return tuple(p for p in others if p not in without)
