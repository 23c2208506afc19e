"""Parts of a daemon, without the daemon: what a component is given, made for a test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from federations import Members

from hsl_node.federation.keyring import Keyring
from hsl_node.federation.names import Peer
from hsl_node.federation.node_toml import NodeConfig
from hsl_node.host.layout import Layout
from hsl_node.node.alarms import Alarms
from hsl_node.node.here import Here, Keys
from hsl_node.node.peers.links import Links
from hsl_node.node.peers.liveness import Liveness
from hsl_node.sync.store.store import Store


class Parts:
    """Of `me`, with a state directory of its own; `close` lets go of it."""

    def __init__(
        self, members: Members, folder: Path, me: Peer, keyring: Keyring | None = None, listen: str = "127.0.0.1:1"
    ) -> None:
        self.store = Store(Layout(folder))
        config = NodeConfig(name=me, address="127.0.0.1:9", listen=listen)
        self.here = Here(config, members.federation, self.store)
        self.keys = Keys(self.here, members.identities[me])
        if keyring is not None:
            self.keys.ring = keyring
        self.alarms = Alarms()
        self.links = Links(self.here, self.keys)
        self.paused_s: float | None = None
        self.connected: set[Peer] = set()
        self.needs = True
        self.liveness = Liveness(*self.all, lambda: self.paused_s, lambda: self.connected, lambda peer: self.needs)

    @property
    def all(self) -> tuple[Here, Keys, Alarms, Links]:
        return self.here, self.keys, self.alarms, self.links

    def close(self) -> None:
        self.store.close()


def nothing(*_: Any, **__: Any) -> None:
    """In place of a callable whose call does not matter."""
