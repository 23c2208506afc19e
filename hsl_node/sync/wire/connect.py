"""Connect to a peer with the client that node.toml names."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager

from hsl_node.federation.config import PeerCard
from hsl_node.federation.identity import Identity
from hsl_node.federation.names import Peer
from hsl_node.sync.wire.toll import Toll
from hsl_node.sync.wire.transport import Client, Login, Patience, Transport


def connect(
    card: PeerCard,
    me: Peer,
    identity: Identity,
    *,
    client: Client = "asyncssh",
    patience: Patience = Patience(),
    host_keys: Sequence[str] | None = None,
    toll: Toll | None = None,
) -> AbstractAsyncContextManager[Transport]:
    """Connect to a peer's inbox. Leaving the context closes everything, also when the task is cancelled.

    `host_keys`: one of these the server must show; None: the one that the card pins.
    `toll`: the peer's, for all connections to it; None: one of its own.

    Raises:
        KeyRefused: the peer shows another host key than the pinned one, or does not accept ours.
        TransportError: it cannot be reached.
    """
    toll = toll or Toll()
    login = Login.of(card, me, host_keys)
    if client == "paramiko":
        from hsl_node.sync.wire import paramiko_client  # one client at a time is loaded: 12 MB

        return paramiko_client.connect(login, identity, patience, toll)
    from hsl_node.sync.wire import asyncssh_client

    return asyncssh_client.connect(login, identity, patience, toll)
