"""Who this node is, what it may use, and which keys speak now: given to every component, knows none of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from hsl_node.federation import identity, keyring
from hsl_node.federation.config import Federation
from hsl_node.federation.identity import Identity
from hsl_node.federation.keyring import Keyring
from hsl_node.federation.names import Peer
from hsl_node.federation.node_toml import NodeConfig
from hsl_node.host.layout import Layout
from hsl_node.sync.store.journal import Journal
from hsl_node.sync.store.room import reserve_of
from hsl_node.sync.store.store import Store

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Here:
    """Never changes while the process lives, but for the settings that `reload.py` names."""

    config: NodeConfig
    federation: Federation
    store: Store

    @cached_property
    def me(self) -> Peer:
        return Peer(self.config.name)

    @cached_property
    def others(self) -> tuple[Peer, ...]:
        return tuple(p for p in self.federation.peers if p != self.me)

    @property
    def layout(self) -> Layout:
        return self.store.layout

    @property
    def journal(self) -> Journal:
        return self.store.journal

    @property
    def embedded(self) -> bool:
        """The inbox is our own server, which sees what comes; else another program's folders."""
        return self.config.inbox.kind == "embedded"

    @property
    def homes(self) -> Path:
        """Home folders of the senders."""
        return self.config.inbox.directory or self.layout.homes

    @property
    def reserve_bytes(self) -> int:
        """Of the disk, that the inbox never gives away."""
        return reserve_of(self.config.inbox.kind)


class Keys:
    """Which keys speak for whom now, this node's own included. Whoever must act on a change subscribes to `changed`."""

    def __init__(self, here: Here, own: Identity) -> None:
        self._here = here
        self.ring: Keyring = keyring.load(here.layout.state, here.federation)
        self.identity = own
        self.changed: list[Callable[[Collection[Peer], bool], None]] = []  # (whose changed, did ours?)

    def read_again(self) -> None:
        """Raises: HslError: they cannot be read; those that count stay."""
        layout = self._here.layout
        ring = keyring.load(layout.state, self._here.federation)
        self.change(ring, identity.load(identity.find_key(layout.key)))

    def change(self, ring: Keyring, own: Identity) -> None:
        """The operator changed keyring.toml, or this node's key."""
        here, before, self.ring = self._here, self.ring, ring
        rekeyed = own.public != self.identity.public
        self.identity = replace(own, run=self.identity.run)  # the process is the same, whatever key it uses
        if rekeyed:
            log.warning("this node uses another key now", extra={"fingerprint": own.fingerprint})
        peers = [p for p in here.federation.peers if before.keys(p) != ring.keys(p)]
        for peer in peers:
            was, now = keyring.shown(before.keys(peer)), keyring.shown(ring.keys(peer))
            log.warning("keys changed", extra={"peer": peer, "before": was, "now": now})
            here.journal.note("warning", "keys", f"{peer}: keys that count here now: {now}")
        for act in self.changed:
            act(peers, rekeyed)
