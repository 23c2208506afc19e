"""The embedded SFTP inbox: who may connect, how often and how fast. What they may do there is in `inbox_fs.py`.

A peer is recognised by its verified key alone; the user name must then be that peer's name. Unauthenticated
connections are cheap to open, so they are capped by making room: the oldest of the busiest source goes first, which
lets an honest peer in even while its own address floods us.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import asyncssh
from asyncssh.kex import get_kex_algs

from hsl_node.config import Federation, fingerprint
from hsl_node.errors import ConfigError, LocalStateError, PeerDataError, escaped
from hsl_node.identity import Identity
from hsl_node.sync.home import Home
from hsl_node.sync.limits import Counters, Limits
from hsl_node.sync.link import Link
from hsl_node.sync.names import Digest, FileName, Peer
from hsl_node.sync.part import OpenFile

__all__ = ["Counters", "InboxServer", "Incoming", "Limits"]

log = logging.getLogger(__name__)

CIPHERS = ("aes256-gcm@openssh.com", "aes128-gcm@openssh.com")
KEY_EXCHANGES = (  # those of them that the installed cryptography library offers
    "mlkem768x25519-sha256",
    "sntrup761x25519-sha512@openssh.com",
    "curve25519-sha256",
    "curve25519-sha256@libssh.org",  # the only spelling that paramiko 5.1 knows
)
MACS = ("hmac-sha2-256-etm@openssh.com", "hmac-sha2-256")  # never used beside AES-GCM, but clients insist on a match
WINDOW_BYTES = 4 * 1024 * 1024  # in flight per session: 64 ms x 500 Mbit/s
PACKET_BYTES = 128 * 1024  # asyncssh's 32 KiB cost a third more processor time here; 256 KiB saves nothing more
DISK_THREADS = 4


@dataclass(frozen=True)
class Incoming:
    """A part that is being written now, for status."""

    name: FileName
    bytes: int
    total: int
    rate_bytes_per_s: float
    since: float  # wall clock, for display


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
        limits: Limits = Limits(),
    ) -> None:
        """`on_commit(peer)`: a manifest lies in its inbox/; `on_fatal`: our disk failed, the process must end."""
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
        self._peer_of = {_wire(card.key): Peer(card.name) for card in federation.peer if card.name != me}
        self._revoked: set[bytes] = set()
        self._home: dict[Peer, Home] = {}
        self._links: list[Link] = []  # oldest first
        self._threads = ThreadPoolExecutor(DISK_THREADS, thread_name_prefix="inbox")
        self._acceptor: asyncssh.SSHAcceptor | None = None
        self._sweeper: asyncio.Task[None] | None = None
        self._progress: dict[OpenFile, tuple[float, int]] = {}  # unfinished transfer -> (since when, bytes then)
        self._lines: Counter[str] = Counter()
        self._lines_until = 0.0

    async def start(self, host: str, port: int) -> int:
        """Listen; gives back the port (0 = any).

        Raises:
            ConfigError: the port is in use, or the address is not ours.
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
            raise ConfigError(
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

    def revoke(self, public_key: str) -> None:
        """Refuse this key from now on and cut its live connections."""
        key = _wire(public_key)
        self._revoked.add(key)
        for link in list(self._links):
            if link.key == key:
                log.warning("connection of a revoked key cut", extra={"peer": link.peer})
                link.abort()

    def connected(self) -> frozenset[Peer]:
        """Peers with a live connection to this inbox."""
        return frozenset(link.peer for link in self._links if link.peer is not None)

    def incoming(self) -> dict[Peer, Incoming]:
        """What arrives at this moment."""
        result = {}
        for peer, home in self._home.items():
            for file in home.writing():
                if (part := file.part) is not None:
                    seconds = max(time.time() - file.opened, 0.001)
                    result[peer] = Incoming(part.name, part.size, part.limit, file.received / seconds, file.opened)
        return result

    def take_digest(self, peer: Peer, name: str) -> Digest | None:
        """sha256 of the file now in `peer`'s inbox/, if all its bytes were hashed on arrival. Forgotten once taken.

        Ask before claiming the file: until it is claimed, nothing can take its place.
        """
        home = self._home.get(peer)
        return home.take_digest(name) if home else None

    # ------------------------------------------------------------ called by the links

    def identify(self, key: asyncssh.SSHKey) -> Peer | None:
        return None if key.public_data in self._revoked else self._peer_of.get(key.public_data)

    def home(self, peer: Peer) -> Home:
        return self._home[peer]

    def admit(self, new: Link) -> None:
        """A stranger knocks. Above the caps, the oldest stranger of its source, or of the busiest one, is sent away."""
        self._links.append(new)
        strangers = [link for link in self._links if link.peer is None]
        sources = Counter(link.source for link in strangers)
        crowd = None
        if sources[new.source] > self.limits.strangers_per_source:
            crowd = new.source
        elif len(strangers) > self.limits.strangers:
            crowd = sources.most_common(1)[0][0]
        if crowd is not None:
            oldest = next(link for link in strangers if link.source == crowd)
            self.counters.evicted += 1
            self.note(crowd, "unauthenticated connection closed to make room", source=crowd)
            oldest.abort()
        self._count_strangers()

    def welcome(self, link: Link, peer: Peer) -> None:
        """A peer logged in. Its third connection ends its first: that is the one the network has forgotten."""
        mine = [other for other in self._links if other.peer == peer and other is not link]
        for oldest in mine[: max(0, len(mine) + 1 - self.limits.connections_per_peer)]:
            self.note(peer, "older connection closed for a newer one", peer=peer)
            oldest.abort()
        self._count_strangers()
        log.info("peer connected", extra={"peer": peer, "source": link.source})
        self.on_connect(peer)

    def leave(self, link: Link) -> None:
        if link in self._links:
            self._links.remove(link)
        self._count_strangers()

    def sessions_of(self, peer: Peer) -> int:
        return sum(link.sessions for link in self._links if link.peer == peer)

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
        self.note(source, "login refused", source=source, user=escaped(user, 64), key=shown, reason=reason)

    def disk_failed(self, error: LocalStateError) -> None:
        log.critical("disk failed", extra={"reason": error.message})
        if self._on_fatal:
            self._on_fatal(error)

    def note(self, who: str, event: str, **fields: object) -> None:
        """Log what others make us log, a bounded number of lines a minute for each of them."""
        now = time.monotonic()
        if now >= self._lines_until:
            for muted, lines in self._lines.items():
                if lines > self.limits.log_lines_per_minute:
                    hidden = lines - self.limits.log_lines_per_minute
                    log.warning("log lines suppressed", extra={"about": muted, "lines": hidden})
            self._lines.clear()
            self._lines_until = now + 60
        self._lines[who] += 1
        if self._lines[who] <= self.limits.log_lines_per_minute:
            log.warning(event, extra=fields)

    # ------------------------------------------------------------ below

    def _count_strangers(self) -> None:
        self.counters.unauthenticated = sum(link.peer is None for link in self._links)

    async def _keep_sweeping(self) -> None:
        while True:
            await asyncio.sleep(self.limits.sweep_s)
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
            since, received = self._progress.setdefault(file, (now, file.received))
            if file.received - received >= self.limits.progress_bytes:
                self._progress[file] = (now, file.received)
            elif now - since > self.limits.progress_s:
                self.note(peer, "transfer without progress cut", peer=peer, bytes=file.part.size)
                for link in list(self._links):
                    if link.holds(file):
                        link.abort()


def _wire(public_key: str) -> bytes:
    return asyncssh.import_public_key(public_key).public_data
