"""Who may come into the embedded inbox, how often, and what it may take there; what is told of it.

A peer is recognised by its verified key alone; the user name must then be that peer's name. Unauthenticated
connections are cheap to open, so they are capped by making room: one of the busiest sources' goes, drawn by lot. The
oldest would be whoever has a slow line. Sources that a peer logged in from have places of their own.
"""

from __future__ import annotations

import errno
import logging
import random
import re
import time
from collections import Counter
from collections.abc import Callable
from typing import Protocol

import asyncssh

from hsl_node.errors import PeerDataError, escaped
from hsl_node.federation.config import Federation
from hsl_node.federation.keyring import Keyring
from hsl_node.federation.names import Peer, is_digest
from hsl_node.federation.strings import fingerprint, split_address
from hsl_node.host.log_limit import LogLimit
from hsl_node.sync.clones import Runs
from hsl_node.sync.inbox.limits import Limits, Sources, source_of
from hsl_node.sync.inbox.part import OpenFile
from hsl_node.sync.wire.allowance import Allowance
from hsl_node.sync.wire.toll import Toll

log = logging.getLogger(__name__)


class Connection(Protocol):
    """What is admitted: `link.py`."""

    conn: asyncssh.SSHServerConnection
    source: str
    peer: Peer | None  # None: a stranger
    key: bytes | None
    member: Member  # from the login on
    login: int  # its place among the logins of this peer
    sessions: int
    last_request: float

    @property
    def run(self) -> str: ...
    def holds(self, file: OpenFile) -> bool: ...
    def abort(self) -> None: ...


class Member:
    """What one peer may take, over all its connections."""

    def __init__(self, peer: Peer, limits: Limits, data_bytes: int) -> None:
        self.peer = peer
        self.runs = Runs()
        self.toll = Toll(limits.packets_per_minute, limits.requests_per_minute)
        self.lists = Allowance(limits.offers_per_minute, 60)
        # Of what is kept for it; beside the files, lists and manifests.
        self._kept = Allowance(limits.offer_files_per_hour * (data_bytes + 2**20), 3600)
        self._own = Allowance(limits.read_back_bytes_per_minute, 60)

    def spend(self, count: int) -> None:
        """Count what it reads of what is kept for it. Raises: PeerDataError: code `rate`."""
        if not self._kept.take(count, time.monotonic()):
            raise PeerDataError("reads more than a recovery needs", code="rate")

    def read_back(self, count: int) -> None:
        """Count what it reads of its own files: for a request of 60 bytes our line carries 256 KiB.

        Raises: PeerDataError: code `rate`.
        """
        if not self._own.take(count, time.monotonic()):
            raise PeerDataError("reads back more than resuming needs", code="rate")

    def wrote(self, count: int) -> None:
        """What it writes it may read once."""
        self._own.take(-count, time.monotonic())


class Admission:
    """The pinned keys, all live connections, and what each peer has taken."""

    def __init__(
        self,
        *,
        federation: Federation,
        me: Peer,
        data_bytes: int,
        on_commit: Callable[[Peer], None],
        on_connect: Callable[[Peer], None],
        on_twice: Callable[[Peer, bool], None] = lambda peer, twice: None,
        on_other_federation: Callable[[Peer, str], None] = lambda peer, fed8: None,
        on_full: Callable[[Peer, str], None] = lambda peer, why: None,
        on_gone: Callable[[Peer, int], None] = lambda peer, count: None,
        offer: Callable[[Peer, str, bool], int] | None = None,
        limits: Limits = Limits(),
        keyring: Keyring | None = None,
        lot: random.Random = random.SystemRandom(),
    ) -> None:
        """`on_commit(peer)`: a manifest lies in its inbox/.

        `on_twice(peer, yes)`: two processes with this peer's key are at work, or no longer. `on_other_federation(peer,
        its hash)`: it uses names of another federation. `on_full(peer, why)`: its quota was refused another file.
        `on_gone(peer, bytes)`: what it had written here vanished. `offer(peer, name, twice)`: a descriptor to read what
        lies below offer/ for this peer; FileNotFoundError where there is nothing.
        """
        self.federation, self.data_bytes, self.limits = federation, data_bytes, limits
        self.on_commit, self.on_connect, self.on_twice = on_commit, on_connect, on_twice
        self.on_other_federation, self.on_full, self.on_gone = on_other_federation, on_full, on_gone
        self.offer, self._lot = offer, lot
        # A gateway may bring all peers from one address, each with one login at a time and one that the network forgot.
        places = 2 * (len(federation.peers) - 1)
        self._strangers, self._per_source = max(limits.strangers, places), max(limits.strangers_per_source, places)
        self.lines = LogLimit(limits.log_lines_per_minute)
        self.members = {peer: Member(peer, limits, data_bytes) for peer in federation.peers if peer != me}
        self.links: list[Connection] = []  # oldest first
        self._peer_of: dict[bytes, Peer] = {}
        self._sources = Sources()  # at first, those that the federation file gives as addresses
        for card in federation.peer:
            self._sources.add(Peer(card.name), source_of(split_address(card.address)[0]))
        self.trust(keyring or Keyring.of(federation))

    def trust(self, keyring: Keyring) -> None:
        """These keys log in from now on; live connections of any other end at once."""
        self._peer_of = {_wire(key): peer for peer in self.members for key in keyring.keys(peer)}
        for link in list(self.links):
            if link.key is not None and self._peer_of.get(link.key) != link.peer:
                log.warning("connection of a revoked or replaced key cut", extra={"peer": link.peer})
                link.abort()

    def connected(self) -> frozenset[Peer]:
        """Peers with a live connection to this inbox."""
        return frozenset(link.peer for link in self.links if link.peer is not None)

    # ------------------------------------------------------------ coming and going

    def identify(self, key: asyncssh.SSHKey) -> Peer | None:
        return self._peer_of.get(key.public_data)

    def admit(self, new: Connection) -> None:
        """A stranger knocks. Above the caps, one stranger of its source, or of the busiest ones, is sent away.

        Where a peer logged in from there before, only its like is: who never logged in competes with its own.
        """
        self.links.append(new)
        familiar = new.source in self._sources
        strangers = [k for k in self.links if k.peer is None and (k.source in self._sources) == familiar]
        sources = Counter(link.source for link in strangers)
        crowd: list[Connection] = []
        if sources[new.source] > self._per_source:
            crowd = [link for link in strangers if link.source == new.source]
        elif len(strangers) > self._strangers:
            crowd = [link for link in strangers if sources[link.source] == max(sources.values())]
        if crowd:
            drawn = self._lot.choice(crowd)
            self.note_stranger("unauthenticated connection closed to make room", drawn.source)
            drawn.abort()

    def welcome(self, link: Connection, peer: Peer) -> Member:
        """A peer logged in. Its third connection ends the one that asked least lately: the network has forgotten it."""
        mine = [other for other in self.links if other.peer == peer and other is not link]
        mine.sort(key=lambda other: other.last_request)
        for oldest in mine[: max(0, len(mine) + 1 - self.limits.connections_per_peer)]:
            self.note(peer, "older connection closed for a newer one", peer=peer)
            oldest.abort()
        self._sources.add(peer, link.source)
        self.note(peer, "peer connected", logging.INFO, peer=peer, source=link.source)
        link.login = self.again(link)
        return self.members[peer]

    def again(self, link: Connection) -> int:
        """It is there, after a login or a silence. Gives back its place among this peer's logins."""
        assert link.peer is not None
        self.on_connect(link.peer)
        return self.members[link.peer].runs.login()

    def answered(self, link: Connection) -> None:
        """It made a request: its process was alive after the login."""
        if link.run:
            self.on_twice(link.member.peer, link.member.runs.seen(link.run, link.login))

    def leave(self, link: Connection) -> None:
        if link in self.links:
            self.links.remove(link)

    def sessions_of(self, peer: Peer) -> int:
        return sum(link.sessions for link in self.links if link.peer == peer)

    def offered(self, link: Connection, name: str) -> OpenFile:
        """Open what is kept for this peer: see `offer.py`.

        Raises:
            PeerDataError: code `rate`; it asks too often.
            FileNotFoundError: nothing of that name.
        """
        if self.offer is None:
            raise FileNotFoundError(errno.ENOENT, "nothing is offered here")
        member = link.member
        if not is_digest(name) and not member.lists.take(1, time.monotonic()):
            raise PeerDataError("asks too often", code="rate")
        return OpenFile(self.offer(member.peer, name, link.run in member.runs.contested), offered=True)

    # ------------------------------------------------------------ what is told

    def flooded(self, link: Connection) -> None:
        self.note_stranger("unauthenticated connection cut: it sends too much", link.source)
        link.abort()

    def refused(self, peer: Peer, operation: str, path: str, error: PeerDataError) -> None:
        if error.code == "federation" and (its := re.search(r"/hsl1_([0-9a-f]{8})_", path)):
            self.on_other_federation(peer, its[1])
        if error.code == "quota":
            self.on_full(peer, escaped(error.message))
        self.note(
            peer,
            "request refused",
            peer=peer,
            operation=operation,
            path=escaped(path),
            code=error.code,
            reason=escaped(error.message),
        )

    def login_failed(self, source: str, user: str, key: asyncssh.SSHKey | None, reason: str) -> None:
        shown = fingerprint(key.export_public_key("openssh").decode("ascii")) if key else ""
        self.note_stranger("login refused", source, user=escaped(user, 64), key=shown, reason=reason)

    def note_stranger(self, event: str, source: str, **fields: object) -> None:
        """One budget for all of them, since sources are as cheap as connections; another one at peers' addresses."""
        who = "strangers at peers' addresses" if source in self._sources else "all strangers"
        self.note(who, event, logging.WARNING, source=source, **fields)

    def note(self, who: str, event: str, level: int = logging.WARNING, **fields: object) -> None:
        """Log what others make us log, so many lines a minute about each `who`: a peer, or all strangers."""
        budget = who if level > logging.INFO else f"{who} (routine)"  # coming and going must not hide refusals
        if self.lines.allows(budget):
            log.log(level, event, extra=fields)


def _wire(public_key: str) -> bytes:
    return asyncssh.import_public_key(public_key).public_data
