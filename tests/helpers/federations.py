"""Small federations with real keys.

members = make_federation(3)            # peers ash, birch, cedar; real ed25519 keys; a plan without anchor
members.federation, members.identities["ash"], members.peers
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import asyncssh

from hsl_node.federation.config import AnchorCard, Federation, PeerCard
from hsl_node.federation.identity import Identity
from hsl_node.federation.names import Peer
from hsl_node.federation.plan import Plan

NAMES = ("ash", "birch", "cedar", "durmast", "elm", "fir", "gorse", "hazel")  # already in sorted order
ASH, BIRCH, CEDAR = (Peer(name) for name in NAMES[:3])


@dataclass(frozen=True)
class Members:
    """A federation and the private keys of all its peers, which only a test can hold together."""

    federation: Federation
    identities: Mapping[Peer, Identity]

    @property
    def peers(self) -> tuple[Peer, ...]:
        return self.federation.peers


class FederationOf(Protocol):
    def __call__(
        self,
        n: int,
        *,
        plan: Plan = ...,
        anchor: AnchorCard | None = ...,
        addresses: Mapping[str, str] = ...,
        name: str = ...,
    ) -> Members: ...


@cache
def _identity(name: str) -> Identity:
    return Identity(asyncssh.generate_private_key("ssh-ed25519"))


def make_federation(
    n: int,
    *,
    plan: Plan = Plan(method="fedavg"),
    anchor: AnchorCard | None = None,
    addresses: Mapping[str, str] = {},
    name: str = "the grove",
) -> Members:
    """`n` peers with real keys, the same keys all session long; `addresses` where servers really listen."""
    identities = {Peer(p): _identity(p) for p in NAMES[:n]}
    cards = tuple(
        PeerCard(name=p, address=addresses.get(p, f"127.0.0.1:{9001 + i}"), key=identity.public)
        for i, (p, identity) in enumerate(identities.items())
    )
    return Members(Federation(name=name, anchor=anchor, plan=plan, peer=cards), identities)


def stranger(number: int = 0) -> Identity:
    return list(make_federation(8).identities.values())[5 + number]
