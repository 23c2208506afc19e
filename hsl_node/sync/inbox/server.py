"""The embedded SFTP inbox: who may connect, how often and how fast. What they may do there is in `requests.py`.

A peer is recognised by its verified key alone; the user name must then be that peer's name. Unauthenticated
connections are cheap to open, so they are capped by making room: one of the busiest sources' goes, drawn by lot. The
oldest would be whoever has a slow line. Sources that a peer logged in from have places of their own.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import random
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import asyncssh
from asyncssh.kex import get_kex_algs

from hsl_node.errors import LocalStateError, PeerDataError, escaped
from hsl_node.federation.config import Federation
from hsl_node.federation.identity import Identity
from hsl_node.federation.keyring import Keyring
from hsl_node.federation.names import FileName, Kind, Peer, Round, is_digest
from hsl_node.federation.strings import fingerprint, split_address
from hsl_node.host.log_limit import LogLimit
from hsl_node.sync.clones import Runs
from hsl_node.sync.inbox.home import Home
from hsl_node.sync.inbox.limits import Counters, Limits, Sources
from hsl_node.sync.inbox.link import Link, source_of
from hsl_node.sync.inbox.part import OpenFile
from hsl_node.sync.wire.algorithms import CIPHERS, KEY_EXCHANGES, MACS
from hsl_node.sync.wire.allowance import Allowance
from hsl_node.sync.wire.toll import Toll

__all__ = ["Counters", "InboxServer", "Incoming", "Limits"]

log = logging.getLogger(__name__)

WINDOW_BYTES = 4 * 1024 * 1024  # in flight per session: 64 ms x 500 Mbit/s
PACKET_BYTES = 256 * 1024  # a whole block in one SSH packet; 128 KiB cost 5 % more processor time, 32 KiB a third more
DISK_THREADS = 4


@dataclass(frozen=True)
class Incoming:
    """A part that somebody holds open for writing; whether it grows is another matter."""

    name: FileName
    bytes: int
    total: int
    rate_bytes_per_s: float


class InboxServer:
    """The listening socket, the pinned keys and all live connections."""

    def __init__(
        self,
        *,
        identity: Identity,
        federation: Federation,
        me: Peer,
        homes: Path,
        data_bytes: int,
        on_commit: Callable[[Peer], None],
        on_connect: Callable[[Peer], None],
        on_fatal: Callable[[LocalStateError], None] | None = None,
        on_twice: Callable[[Peer, bool], None] = lambda peer, twice: None,
        offer: Callable[[Peer, str, bool], int] | None = None,
        limits: Limits = Limits(),
        keyring: Keyring | None = None,
        lot: random.Random = random.SystemRandom(),
    ) -> None:
        """`on_commit(peer)`: a manifest lies in its inbox/; `on_fatal`: our disk failed, the process must end.

        `on_twice(peer, yes)`: two processes with this peer's key are at work, or no longer. `offer(peer, name, twice)`:
        a descriptor to read what lies below offer/ for this peer; FileNotFoundError where there is nothing.
        """
        self.limits = limits
        self.counters = Counters()
        self._identity = identity
        self._federation = federation
        self._me = me
        self._homes = homes
        self._data_bytes = data_bytes
        self.on_commit = on_commit
        self.on_connect = on_connect
        self._on_fatal = on_fatal
        self._on_twice = on_twice
        self._offer = offer
        self._runs: dict[Peer, Runs] = {}
        self._lists: dict[Peer, Allowance] = {}
        self._reading: dict[Peer, Allowance] = {}
        self._tolls: dict[Peer, Toll] = {}
        self._back: dict[Peer, Allowance] = {}
        self._peer_of: dict[bytes, Peer] = {}
        self._home: dict[Peer, Home] = {}
        self._links: list[Link] = []  # oldest first
        self._lot = lot
        self._sources = Sources()  # at first, those that the federation file gives as addresses
        for card in federation.peer:
            self._sources.add(Peer(card.name), source_of(split_address(card.address)[0]))
        self._threads = ThreadPoolExecutor(DISK_THREADS, thread_name_prefix="inbox")
        self._acceptor: asyncssh.SSHAcceptor | None = None
        self._sweeper: asyncio.Task[None] | None = None
        self._progress: dict[OpenFile, tuple[float, int]] = {}  # unfinished transfer -> (since when, its end then)
        self._lines = LogLimit(limits.log_lines_per_minute)
        self.trust(keyring or Keyring.of(federation))

    async def start(self, host: str, port: int) -> int:
        """Listen; gives back the port (0 = any).

        Raises:
            LocalStateError: the port is in use, or the address is not ours.
        """
        for peer in self._federation.peers:
            if peer != self._me:
                self._home[peer] = Home(
                    self._homes, peer, self._federation, self._data_bytes, self.limits.quota, self._threads
                )
        try:
            self._acceptor = await asyncssh.listen(
                host,
                port,
                server_factory=lambda: Link(self),
                server_host_keys=[self._identity.key],
                config=None,
                server_version="hsl1",
                kex_algs=[k for k in KEY_EXCHANGES if k.encode() in get_kex_algs()],
                encryption_algs=CIPHERS,
                mac_algs=MACS,
                compression_algs=["none"],
                signature_algs=["ssh-ed25519"],
                public_key_auth=True,
                password_auth=False,
                kbdint_auth=False,
                host_based_auth=False,
                gss_host=None,
                login_timeout=self.limits.login_timeout_s,
                keepalive_interval=15,
                keepalive_count_max=4,
                allow_pty=False,
                line_editor=False,
                x11_forwarding=False,
                agent_forwarding=False,
                rdns_lookup=False,
                encoding=None,
                window=WINDOW_BYTES,
                max_pktsize=PACKET_BYTES,
            )
        except OSError as exc:
            what = "is in use" if exc.errno == errno.EADDRINUSE else f"cannot be listened on: {exc.strerror or exc}"
            raise LocalStateError(
                f"{host}:{port} {what}", remedy='stop the other program, or set another "listen" in node.toml'
            ) from exc
        self._sweeper = asyncio.create_task(self._keep_sweeping())
        listening = self._acceptor.get_port()
        log.info("inbox listening", extra={"host": host, "port": listening})
        return listening

    async def stop(self) -> None:
        if self._sweeper:
            self._sweeper.cancel()
        if self._acceptor:
            self._acceptor.close()
        links = list(self._links)
        for link in links:
            link.abort()
        await asyncio.gather(*(link.conn.wait_closed() for link in links))
        if self._acceptor:
            await self._acceptor.wait_closed()  # last: from Python 3.12 on it waits for every live connection
        for home in self._home.values():
            for file in home.writing():
                await file.close()
        self._threads.shutdown(wait=True)

    def trust(self, keyring: Keyring) -> None:
        """These keys log in from now on; live connections of any other end at once."""
        others = [p for p in self._federation.peers if p != self._me]
        self._peer_of = {_wire(key): peer for peer in others for key in keyring.keys(peer)}
        for link in list(self._links):
            if link.key is not None and self._peer_of.get(link.key) != link.peer:
                log.warning("connection of a revoked or replaced key cut", extra={"peer": link.peer})
                link.abort()

    def show(self, identity: Identity) -> None:
        """The node's key was replaced: new connections see the new one."""
        self._identity = identity
        if self._acceptor:
            self._acceptor.update(server_host_keys=[identity.key])

    def connected(self) -> frozenset[Peer]:
        """Peers with a live connection to this inbox."""
        return frozenset(link.peer for link in self._links if link.peer is not None)

    def incoming(self, round: Round) -> list[Incoming]:
        """Checkpoints of this round that are open for writing at this moment; each names its peer."""
        return [
            Incoming(part.name, part.size, part.limit, file.received / max(time.monotonic() - file.opened, 0.001))
            for home in self._home.values()
            for file in home.writing()
            if (part := file.part) is not None and part.name.kind is Kind.DATA and part.name.round == round
        ]

    # ------------------------------------------------------------ called by the links

    def identify(self, key: asyncssh.SSHKey) -> Peer | None:
        return self._peer_of.get(key.public_data)

    def home(self, peer: Peer) -> Home:
        return self._home[peer]

    def admit(self, new: Link) -> None:
        """A stranger knocks. Above the caps, one stranger of its source, or of the busiest ones, is sent away.

        Where a peer logged in from there before, only its like is: who never logged in competes with its own.
        """
        self._links.append(new)
        familiar = new.source in self._sources
        strangers = [k for k in self._links if k.peer is None and (k.source in self._sources) == familiar]
        sources = Counter(link.source for link in strangers)
        crowd: list[Link] = []
        if sources[new.source] > self.limits.strangers_per_source:
            crowd = [link for link in strangers if link.source == new.source]
        elif len(strangers) > self.limits.strangers:
            crowd = [link for link in strangers if sources[link.source] == max(sources.values())]
        if crowd:
            drawn = self._lot.choice(crowd)
            self.counters.evicted += 1
            self.note_stranger("unauthenticated connection closed to make room", drawn.source)
            drawn.abort()
        self._count_strangers()

    def welcome(self, link: Link, peer: Peer) -> None:
        """A peer logged in. Its third connection ends its first: that is the one the network has forgotten."""
        mine = [other for other in self._links if other.peer == peer and other is not link]
        for oldest in mine[: max(0, len(mine) + 1 - self.limits.connections_per_peer)]:
            self.note(peer, "older connection closed for a newer one", peer=peer)
            oldest.abort()
        self._sources.add(peer, link.source)
        self._count_strangers()
        self.note(peer, "peer connected", logging.INFO, peer=peer, source=link.source)
        link.login = self._runs.setdefault(peer, Runs()).login()
        self.on_connect(peer)

    def answered(self, link: Link, peer: Peer) -> None:
        """It made a request: its process was alive after the login."""
        if link.run:
            self._on_twice(peer, self._runs[peer].seen(link.run, link.login))

    def leave(self, link: Link) -> None:
        if link in self._links:
            self._links.remove(link)
        self._count_strangers()

    def offered(self, peer: Peer, run: str, name: str) -> OpenFile:
        """Open what is kept for this peer: see `offer.py`.

        Raises:
            PeerDataError: code `rate`; it asks too often.
            FileNotFoundError: nothing of that name.
        """
        if self._offer is None:
            raise FileNotFoundError(errno.ENOENT, "nothing is offered here")
        allowance = self._lists.setdefault(peer, Allowance(self.limits.offers_per_minute, 60))
        if not is_digest(name) and not allowance.take(1, time.monotonic()):
            raise PeerDataError("asks too often", code="rate")
        twice = peer in self._runs and run in self._runs[peer].contested
        return OpenFile(self._offer(peer, name, twice), offered=True)

    def spend(self, peer: Peer, count: int) -> None:
        """Count what this peer reads of what is kept for it.

        Raises:
            PeerDataError: code `rate`.
        """
        most = self.limits.offer_files_per_hour * (self._data_bytes + 2**20)  # beside the files, lists and manifests
        if not self._reading.setdefault(peer, Allowance(most, 3600)).take(count, time.monotonic()):
            raise PeerDataError("reads more than a recovery needs", code="rate")

    def read_back(self, peer: Peer, count: int) -> None:
        """Count what this peer reads of its own files: for a request of 60 bytes our line carries 256 KiB.

        Raises:
            PeerDataError: code `rate`.
        """
        if not self._own_files(peer).take(count, time.monotonic()):
            raise PeerDataError("reads back more than resuming needs", code="rate")

    def wrote(self, peer: Peer, count: int) -> None:
        """What it writes it may read once."""
        self._own_files(peer).take(-count, time.monotonic())

    def _own_files(self, peer: Peer) -> Allowance:
        return self._back.setdefault(peer, Allowance(self.limits.read_back_bytes_per_minute, 60))

    def toll(self, peer: Peer) -> Toll:
        """The same for all connections of this peer."""
        return self._tolls.setdefault(peer, Toll(self.limits.packets_per_minute, self.limits.requests_per_minute))

    def sessions_of(self, peer: Peer) -> int:
        return sum(link.sessions for link in self._links if link.peer == peer)

    def flooded(self, link: Link) -> None:
        self.counters.flooded += 1
        self.note_stranger("unauthenticated connection cut: it sends too much", link.source)
        link.abort()

    def refused(self, peer: Peer, operation: str, path: str, error: PeerDataError) -> None:
        self.counters.rejected[peer, error.code] += 1
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
        self.counters.auth_failures += 1
        shown = fingerprint(key.export_public_key("openssh").decode("ascii")) if key else ""
        self.note_stranger("login refused", source, user=escaped(user, 64), key=shown, reason=reason)

    def disk_failed(self, error: LocalStateError) -> None:
        log.critical("disk failed", extra={"reason": error.message})
        if self._on_fatal:
            self._on_fatal(error)

    def note_stranger(self, event: str, source: str, **fields: object) -> None:
        """One budget for all of them, since sources are as cheap as connections; another one at peers' addresses."""
        who = "strangers at peers' addresses" if source in self._sources else "all strangers"
        self.note(who, event, logging.WARNING, source=source, **fields)

    def note(self, who: str, event: str, level: int = logging.WARNING, **fields: object) -> None:
        """Log what others make us log, so many lines a minute about each `who`: a peer, or all strangers."""
        budget = who if level > logging.INFO else f"{who} (routine)"  # coming and going must not hide refusals
        if self._lines.allows(budget):
            log.log(level, event, extra=fields)

    # ------------------------------------------------------------ below

    def _count_strangers(self) -> None:
        self.counters.unauthenticated = sum(link.peer is None for link in self._links)

    async def _keep_sweeping(self) -> None:
        while True:
            await asyncio.sleep(self.limits.sweep_s)
            self._lines.flush()
            self.sweep(time.monotonic())

    def sweep(self, now: float) -> None:
        """Cut connections that hold something and do nothing with it. `now` is monotonic."""
        for link in list(self._links):
            if link.peer is not None and now - link.last_request > self.limits.idle_s:
                self.note(link.peer, "idle connection closed", peer=link.peer)
                link.abort()
        writing = {file: peer for peer, home in self._home.items() for file in home.writing()}
        self._progress = {file: mark for file, mark in self._progress.items() if file in writing}
        for file, peer in writing.items():
            if file.part is None or file.part.complete:
                continue
            since, reached = self._progress.setdefault(file, (now, file.reached))
            if file.reached - reached >= self.limits.progress_bytes:
                self._progress[file] = (now, file.reached)
            elif now - since > self.limits.progress_s:
                self.note(peer, "transfer without progress cut", peer=peer, bytes=file.part.size)
                for link in list(self._links):
                    if link.holds(file):
                        link.abort()


def _wire(public_key: str) -> bytes:
    return asyncssh.import_public_key(public_key).public_data
