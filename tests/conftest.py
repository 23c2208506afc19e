"""What all tests share: small federations with real keys, where the real images are, hypothesis settings.

members = federation_of(3)              # peers ash, birch, cedar; real ed25519 keys; a plan without anchor
members.federation, members.identities["ash"], members.peers
folder = data_folder("busbra")          # skips the test, with the reason, where the images are not here
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol

import asyncssh
import pytest
from hypothesis import HealthCheck, settings

from hsl_node.federation.config import AnchorCard, Federation, PeerCard
from hsl_node.federation.identity import Identity
from hsl_node.federation.names import Peer
from hsl_node.federation.plan import Plan

# A busy machine must never decide a test: no deadlines. In CI the same examples every time; elsewhere new ones.
settings.register_profile(
    "default", deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.register_profile("ci", settings.get_profile("default"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a job in the background ignores Ctrl-C, as its children would
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Several tests run at once, each with its daemons: threads that wait for each other made one of them six times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")

NAMES = ("ash", "birch", "cedar", "durmast", "elm", "fir", "gorse", "hazel")  # already in sorted order
REPOSITORY = Path(__file__).resolve().parent.parent


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


@pytest.fixture(scope="session")
def federation_of() -> FederationOf:
    return make_federation


@pytest.fixture(scope="session")
def data_folder() -> Callable[[str], Path]:
    """Folder of real images by name: under $HSL_TEST_DATA, else `../shared/data` beside the repository."""
    root = Path(os.environ.get("HSL_TEST_DATA") or REPOSITORY.parent / "shared" / "data")

    def folder(name: str) -> Path:
        path = root / name
        if not path.is_dir():
            pytest.skip(f"real images {name!r} are not at {root} (set HSL_TEST_DATA)")
        return path

    return folder
