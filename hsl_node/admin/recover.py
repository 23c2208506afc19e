"""Mark a state directory: the next start asks the peers. `hsl-node recover --from-peers`."""

from __future__ import annotations

from pathlib import Path

from hsl_node.errors import UsageError
from hsl_node.federation import config, identity, keyring, node_toml
from hsl_node.federation.names import Peer
from hsl_node.host.layout import Layout
from hsl_node.node import checks
from hsl_node.node.heal import by_hand
from hsl_node.node.heal.mark import ALTERED, Mark, set_mark
from hsl_node.sync.store.store import Store


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
    node, federation = node_toml.load_node(state), config.load_federation(state)
    key = identity.load(identity.find_key(Layout(state).key)).public
    ring = keyring.load(state, federation)
    keyring.require_mine(ring, node.name, key)
    checks.require_own_anchor(state, node, federation)
    others = tuple(p for p in federation.peers if p != node.name)
    for name in without:
        if name not in others:
            raise UsageError(f"{name!r} is not one of the other peers", remedy=f"they are: {', '.join(others)}")
    store = Store(Layout(state))
    try:
        for folder in documents:
            by_hand.take(folder, store, ring, Peer(node.name))
        store.journal.set_meta(ALTERED, "")
        set_mark(store.journal, Mark("its operator said that state was lost or set back", without))
    finally:
        store.close()
    return tuple(p for p in others if p not in without)
