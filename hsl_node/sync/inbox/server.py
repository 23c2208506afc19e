"""The embedded SFTP inbox: the listening socket and the homes behind it.

Who may come in is in `admission.py`, what a peer may do there in `requests.py`.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import asyncssh

from hsl_node.errors import LocalStateError
from hsl_node.federation.identity import Identity
from hsl_node.federation.names import FileName, Kind, Peer, Round
from hsl_node.sync.inbox.admission import Admission
from hsl_node.sync.inbox.home import Home
from hsl_node.sync.inbox.link import Link
from hsl_node.sync.inbox.part import OpenFile
from hsl_node.sync.store.room import Quota
from hsl_node.sync.wire.algorithms import ASYNCSSH
from hsl_node.sync.wire.sockets import listening

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
    """Listens, and makes a `Link` of each connection."""

    def __init__(self, admission: Admission, *, identity: Identity, homes: Path) -> None:
        self.admission = admission
        self._identity = identity
        self._homes = homes
        self._home: dict[Peer, Home] = {}
        self._threads = ThreadPoolExecutor(DISK_THREADS, thread_name_prefix="inbox")
        self._acceptor: asyncssh.SSHAcceptor | None = None
        self._sweeper: asyncio.Task[None] | None = None
        self._progress: dict[OpenFile, tuple[float, int]] = {}  # unfinished transfer -> (since when, its end then)

    async def start(self, host: str, port: int) -> int:
        """Listen; gives back the port (0 = any).

        Raises:
            LocalStateError: the port is in use, or the address is not ours.
        """
        here, limits = self.admission, self.admission.limits
        for peer in here.members:
            self._home[peer] = Home(self._homes, peer, here.federation, here.data_bytes, limits.quota, self._threads)
            self._home[peer].on_gone = here.on_gone
        try:
            self._acceptor = await asyncssh.listen(
                host,
                port,
                sock=listening(host, port) if host == "::" else None,  # else asyncssh takes IPv6 alone
                server_factory=lambda: Link(here, self.home),
                server_host_keys=[self._identity.key],
                server_version="hsl1",
                public_key_auth=True,
                password_auth=False,
                kbdint_auth=False,
                host_based_auth=False,
                login_timeout=limits.login_timeout_s,
                keepalive_interval=15,
                keepalive_count_max=4,
                allow_pty=False,
                line_editor=False,
                x11_forwarding=False,
                agent_forwarding=False,
                rdns_lookup=False,
                window=WINDOW_BYTES,
                max_pktsize=PACKET_BYTES,
                **ASYNCSSH,
            )
        except OSError as exc:
            what = "is in use" if exc.errno == errno.EADDRINUSE else f"cannot be listened on: {exc.strerror or exc}"
            raise LocalStateError(
                f"{host}:{port} {what}", remedy='stop the other program, or set another "listen" in node.toml'
            ) from exc
        self._sweeper = asyncio.create_task(self._keep_sweeping())
        found = self._acceptor.get_port()
        log.info("inbox listening", extra={"host": host, "port": found})
        return found

    async def stop(self) -> None:
        if self._sweeper:
            self._sweeper.cancel()
        if self._acceptor:
            self._acceptor.close()
        links = list(self.admission.links)
        for link in links:
            link.abort()
        await asyncio.gather(*(link.conn.wait_closed() for link in links))
        if self._acceptor:
            await self._acceptor.wait_closed()  # last: from Python 3.12 on it waits for every live connection
        for home in self._home.values():
            for file in home.writing():
                await file.close()
        self._threads.shutdown(wait=True)

    def show(self, identity: Identity) -> None:
        """The node's key was replaced: new connections see the new one."""
        self._identity = identity
        if self._acceptor:
            self._acceptor.update(server_host_keys=[identity.key])

    def allow(self, quota: Quota) -> None:
        """What each sender may hold from now on; what lies there stays."""
        for home in self._home.values():
            home.quota = quota

    def home(self, peer: Peer) -> Home:
        return self._home[peer]

    def incoming(self, round: Round) -> list[Incoming]:
        """Checkpoints of this round that are open for writing at this moment; each names its peer."""
        return [
            Incoming(part.name, part.size, part.limit, file.received / max(time.monotonic() - file.opened, 0.001))
            for home in self._home.values()
            for file in home.writing()
            if (part := file.part) is not None and part.name.kind is Kind.DATA and part.name.round == round
        ]

    async def _keep_sweeping(self) -> None:
        while True:
            await asyncio.sleep(self.admission.limits.sweep_s)
            self.admission.lines.flush()
            self.sweep(time.monotonic())

    def sweep(self, now: float) -> None:
        """Cut connections that hold something and do nothing with it. `now` is monotonic."""
        links, limits, note = list(self.admission.links), self.admission.limits, self.admission.note
        for link in links:
            if link.peer is not None and now - link.last_request > limits.idle_s:
                note(link.peer, "idle connection closed", peer=link.peer)
                link.abort()
        writing = {file: peer for peer, home in self._home.items() for file in home.writing()}
        self._progress = {file: mark for file, mark in self._progress.items() if file in writing}
        for file, peer in writing.items():
            if file.part is None or file.part.complete:
                continue
            since, reached = self._progress.setdefault(file, (now, file.reached))
            if file.reached - reached >= limits.progress_bytes:
                self._progress[file] = (now, file.reached)
            elif now - since > limits.progress_s:
                note(peer, "transfer without progress cut", peer=peer, bytes=file.part.size)
                for link in links:
                    if link.holds(file):
                        link.abort()
