"""Peers that give files, over a line of the test's: some break off, drip, or give other bytes."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator, Callable, Mapping
from types import SimpleNamespace
from typing import Any, cast

from inbox_site import BIRCH, CEDAR, ROUND, Site

from hsl_node.errors import TransportError
from hsl_node.federation.names import Digest, Peer
from hsl_node.host.layout import Layout
from hsl_node.node.alarms import Alarms
from hsl_node.node.heal.fetch_missing import FetchMissing
from hsl_node.node.peers.fetch import Fetch
from hsl_node.node.peers.links import Links
from hsl_node.sync.offer import Offer
from hsl_node.sync.round import State

BLOCK = 1000


class Link:
    """Gives a file block by block. `between` is called before each; after `breaks` blocks the line is dead."""

    def __init__(self, data: bytes, between: Callable[[], object] = lambda: None, breaks: int | None = None) -> None:
        self.data, self.between, self.breaks = data, between, breaks
        self.asked: list[int] = []

    async def read(self, path: str, offset: int, count: int) -> bytes:
        await asyncio.to_thread(self.between)
        if self.breaks is not None and len(self.asked) == self.breaks:
            raise TransportError("the line is dead")
        self.asked.append(offset)
        return self.data[offset : offset + min(count, BLOCK)]


def here_of(site: Site) -> Any:
    """ash, with birch's inbox."""
    layout = Layout(site.root)
    layout.make()
    return SimpleNamespace(layout=layout, homes=site.homes, others=(BIRCH, CEDAR), federation=site.members.federation)


def fetch_over(here: Any, site: Site, link: Link) -> Fetch:
    """From whoever it is, over this link."""
    links: Any = SimpleNamespace(connected=lambda peer: contextlib.nullcontext(link))
    return Fetch(here, Alarms(), links, site.schema.file_bytes)


def missing_of(state: Callable[[], State], **given: Any) -> tuple[FetchMissing, Alarms]:
    """Of a node that waits for others: ash. What is not given is not there."""
    alarms = Alarms()
    parts: dict[str, Any] = {
        "here": SimpleNamespace(others=(BIRCH, CEDAR)),
        "keys": SimpleNamespace(ring=SimpleNamespace(is_revoked=lambda peer: False)),
        "alarms": alarms,
        "links": None,
        "fetch": None,
        "machine": Now(state),
        "set_back": SimpleNamespace(listed=frozenset),
        "incoming": lambda round: (),
        "placed": lambda peer: None,
    }
    return FetchMissing(**(parts | given)), alarms


class Now:
    """In place of the machine: the state as the test has it."""

    def __init__(self, state: Callable[[], State]) -> None:
        self._state = state

    @property
    def state(self) -> State:
        return self._state()


def offer_of(site: Site, *digests: str) -> Offer:
    return Offer(
        federation=site.members.federation.digest, peer=CEDAR, asker="ash", nonce="0" * 16, recovering=False,
        round=ROUND, phase="collect", twice=False, manifests=[], files=sorted(digests),
    )  # fmt: skip


DATA = bytes(range(256)) * 20  # 5120 bytes: 6 blocks
SHA = Digest(hashlib.sha256(DATA).hexdigest())


class Giver:
    """A peer that gives what is in `files`; after `stalls` blocks of a connection it hangs, or the link `breaks`."""

    def __init__(self, stalls: int | None = None) -> None:
        self.files: dict[str, bytes] = {}
        self.documents: dict[str, bytes] = {}  # in one read
        self.stalls, self.turns, self.given, self.breaks = stalls, 0, 0, False

    @contextlib.asynccontextmanager
    async def connected(self) -> AsyncIterator[Giver]:
        self.turns, self.given = self.turns + 1, 0
        yield self

    async def read(self, path: str, offset: int, count: int) -> bytes:
        if self.given == self.stalls:
            if self.breaks:
                raise TransportError("the line is dead")
            await asyncio.Event().wait()
        self.given += 1
        name = path.rpartition("/")[2]
        return self.documents.get(name) or self.files[name][offset : offset + min(count, BLOCK)]


class Several(Fetch):
    """Links and fetch in one. Who hangs has a short turn, in which an honest one gives a file a hundred times."""

    def __init__(self, here: Any, site: Site, givers: Mapping[Peer, Giver]) -> None:
        super().__init__(here, Alarms(), cast(Any, self), site.schema.file_bytes)
        self.givers = givers
        self._turn_s = 1.0
        self.offers: dict[Peer, Offer] = {}

    def connected(self, peer: Peer, patience: Any = None) -> Any:
        return self.givers[peer].connected()

    async def offer_of(self, peer: Peer, patience: Any = None) -> Offer:
        return self.offers[peer]

    offers_of: Any = Links.offers_of


def asking_of(site: Site, birch: Giver, cedar: Giver) -> tuple[Several, list[bytes]]:
    """Both list two files, which both have."""
    files = [site.good_data(), site.good_data(2.0)]
    for giver in (birch, cedar):
        giver.files |= {hashlib.sha256(data).hexdigest(): data for data in files}
    return Several(here_of(site), site, {BIRCH: birch, CEDAR: cedar}), files


async def got(asks: Several, site: Site, data: bytes, *givers: Peer) -> bytes:
    """The file that is fetched; a giver that hangs for ever is given up after a while by the test, too."""
    sha256 = Digest(hashlib.sha256(data).hexdigest())
    target = site.root / "here" / sha256[:8]
    async with asyncio.timeout(60):
        assert await asks.get(sha256, target, {p: offer_by(site, p, sha256) for p in givers or (BIRCH, CEDAR)})
    return target.read_bytes()


def offer_by(site: Site, peer: Peer, *digests: str) -> Offer:
    return offer_of(site, *digests).model_copy(update={"peer": peer})
