"""The default client: asyncssh, all in the event loop, disk reads in a thread."""

from __future__ import annotations

import asyncio
import socket
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import asyncssh
from asyncssh.constants import FXF_CREAT, FXF_EXCL, FXF_READ, FXF_WRITE

from hsl_node.errors import HslError, TransportError
from hsl_node.federation.identity import Identity
from hsl_node.sync.wire.algorithms import ASYNCSSH
from hsl_node.sync.wire.dial import reach
from hsl_node.sync.wire.flow import Flow
from hsl_node.sync.wire.sockets import Congestion
from hsl_node.sync.wire.toll import Toll, Turnstile
from hsl_node.sync.wire.transport import (
    BLOCK_BYTES,
    READ_AHEAD_BLOCKS,
    Login,
    Patience,
    Source,
    Transport,
)

LOGIN_MAX_BYTES = 128 * 1024  # with a greeting; asyncssh's limit for that alone is 8 MB
GOODBYE_S = 2  # for a polite end; what was sent is acknowledged by then, so a rude one loses nothing
_BROKEN = (asyncssh.SFTPConnectionLost, asyncssh.SFTPNoConnection, asyncssh.SFTPBadMessage)
_ABSENT = (asyncssh.SFTPNoSuchFile, asyncssh.SFTPNoSuchPath)
_NOT_OFFERED = (asyncssh.SFTPOpUnsupported, asyncssh.SFTPPermissionDenied)  # the latter: `internal-sftp -p` without it


@asynccontextmanager
async def connect(login: Login, identity: Identity, patience: Patience, toll: Toll) -> AsyncIterator[Transport]:
    """See `transport.connect`."""

    async def log_in(login: Login, sock: socket.socket) -> tuple[Login, _Doorman, asyncssh.SSHClientConnection]:
        doorman = _Doorman(toll)
        return login, doorman, await _log_in(login, identity, patience, doorman, sock)

    login, doorman, connection = await reach(login, patience.connect_s, log_in)
    try:
        link = _Link(login, connection, patience, doorman)
        async with link.answer("opening SFTP", patience.connect_s):
            link.sftp = await connection.start_sftp_client()
        yield link
        connection.close()
        with suppress(TimeoutError):
            async with asyncio.timeout(GOODBYE_S):
                await connection.wait_closed()
    finally:
        connection.abort()  # a task cancelled inside asyncssh leaves its connection open otherwise
        await connection.wait_closed()


async def _log_in(
    login: Login, identity: Identity, patience: Patience, doorman: _Doorman, sock: socket.socket
) -> asyncssh.SSHClientConnection:
    try:
        async with asyncio.timeout(patience.connect_s):
            return await asyncssh.connect(
                login.host,
                login.port,
                sock=sock,
                client_factory=lambda: doorman,
                username=login.user,
                known_hosts=([asyncssh.import_public_key(key) for key in login.host_keys], [], []),
                server_host_key_algs=["ssh-ed25519"],
                client_keys=[identity.key],
                preferred_auth="publickey",
                disable_trivial_auth=True,
                agent_path=None,
                x509_trusted_certs=None,
                x509_trusted_cert_paths=[],
                client_version=identity.client_version,
                login_timeout=patience.connect_s,
                keepalive_interval=patience.keepalive_s,
                keepalive_count_max=patience.keepalives,
                **ASYNCSSH,
            )
    except TimeoutError as exc:
        raise login.silent("logging in", patience.connect_s) from exc
    except asyncssh.HostKeyNotVerifiable as exc:
        raise login.other_host_key(doorman.offered) from exc
    except asyncssh.PermissionDenied as exc:
        raise login.our_key_refused(identity) from exc
    except Exception as exc:  # whatever answers there may talk rubbish, which the library shows as any error at all
        raise login.lost("logging in", exc) from exc
    finally:
        if doorman.connection is None:  # else the socket is asyncssh's, which closes it
            sock.close()


class _Doorman(asyncssh.SSHClient):
    """Counts what the server sends. Remembers a host key that is not the pinned one, to show its fingerprint."""

    offered = ""
    connection: asyncssh.SSHClientConnection | None = None
    turnstile: Turnstile

    def __init__(self, toll: Toll) -> None:
        self.toll = toll

    def connection_made(self, conn: asyncssh.SSHClientConnection) -> None:
        self.connection = conn
        too_much = asyncssh.ProtocolError(f"the server sends more than {LOGIN_MAX_BYTES} bytes before the login")
        self.turnstile = Turnstile(conn, LOGIN_MAX_BYTES, lambda: conn.connection_lost(too_much))

    def auth_completed(self) -> None:
        self.turnstile.toll = self.toll

    def validate_host_public_key(self, host: str, addr: str, port: int, key: asyncssh.SSHKey) -> bool:
        self.offered = key.get_fingerprint()
        return False


@dataclass
class _Link:
    _login: Login
    _connection: asyncssh.SSHClientConnection
    patience: Patience
    _doorman: _Doorman
    sftp: asyncssh.SFTPClient = field(init=False)
    _up: Flow = field(default_factory=Flow)
    _down: Flow = field(default_factory=Flow)

    def __post_init__(self) -> None:
        self._congestion = Congestion(self._connection.get_extra_info("socket"))

    @asynccontextmanager
    async def answer(self, what: str, seconds: float) -> AsyncIterator[None]:
        """Our errors for asyncssh's, and a deadline after which the connection is of no use."""
        try:
            async with asyncio.timeout(seconds):
                yield
        except TimeoutError as exc:
            self._connection.abort()
            raise self._login.silent(what, seconds) from exc
        except asyncssh.SFTPError as exc:
            if isinstance(exc, _BROKEN):
                raise self._lost(what, exc) from exc
            raise self._login.failed(what, exc) from exc
        except HslError:
            raise
        except Exception as exc:  # a server that breaks the protocol shows as any error at all
            raise self._lost(what, exc) from exc

    def _lost(self, what: str, exc: Exception) -> TransportError:
        self._connection.abort()
        return self._login.lost(what, self._doorman.turnstile.over or exc)

    def alive(self) -> bool:
        return not self._connection.is_closed()

    async def size(self, path: str) -> int | None:
        async with self.answer("asking for a file's size", self.patience.answer_s):
            try:
                attributes = await self.sftp.stat(self._login.root + path)
            except _ABSENT:
                return None
        if attributes.size is None:
            raise self._login.failed("asking for a file's size", "the server does not tell sizes")
        return attributes.size

    async def read(self, path: str, offset: int, count: int) -> bytes:
        result = b""
        async with self.answer("reading", self.patience.for_all(count)):
            file = await self.sftp.open(self._login.root + path, FXF_READ, encoding=None, block_size=0)
            try:
                while len(result) < count:  # a server may answer with less than it was asked for
                    asked, began = min(count - len(result), self._down.most_bytes), time.monotonic()
                    async with self.answer("reading", self.patience.for_bytes(asked)):
                        block = await file.read(asked, offset + len(result))
                    if not block:
                        break
                    self._down.answered(len(block), time.monotonic() - began)
                    result += cast(bytes, block)  # no encoding was set
            finally:
                with suppress(asyncssh.SFTPError):
                    await file.close()
        return result[:count]

    async def write(
        self, path: str, source: Path | bytes, offset: int, *, create: bool, progress: Callable[[int], None]
    ) -> None:
        flags = FXF_WRITE | (FXF_CREAT | FXF_EXCL if create else 0)
        content = await asyncio.to_thread(Source, source)
        try:
            async with self.answer("opening the part", self.patience.answer_s):
                file = await self.sftp.open(self._login.root + path, flags, encoding=None, block_size=0)
            await self._send(file, content, offset, progress)
            async with self.answer("making the part durable", self.patience.for_disk(content.size)):
                with suppress(*_NOT_OFFERED):
                    await file.fsync()
            async with self.answer("closing the part", self.patience.for_disk(content.size)):
                await file.close()
        finally:
            content.close()

    async def _send(
        self, file: asyncssh.SFTPClientFile, content: Source, offset: int, progress: Callable[[int], None]
    ) -> None:
        """Keep as much on its way as `Flow` says. The deadline is for the next answer, not for the file."""
        waiting: deque[tuple[int, int, asyncio.Task[None]]] = deque()  # (bytes, their end, request), oldest first
        on_its_way = 0

        async def write(piece: bytes, at: int) -> None:
            began = time.monotonic()
            await file.write(piece, at)
            self._up.answered(len(piece), time.monotonic() - began)
            self._congestion.follow(self._up.most_bytes)

        async def acknowledged() -> None:
            nonlocal on_its_way
            count, end, request = waiting[0]
            async with self.answer("sending", self.patience.for_bytes(count)):
                await request
            waiting.popleft()
            on_its_way -= count
            self._doorman.toll.sent(count)
            progress(end)

        try:
            for start in range(offset, content.size, READ_AHEAD_BLOCKS * BLOCK_BYTES):
                for number, block in enumerate(await asyncio.to_thread(content.read, start)):
                    for within, piece in self._up.pieces(block):
                        while waiting and on_its_way + len(piece) > self._up.most_bytes:
                            await acknowledged()
                        at = start + number * BLOCK_BYTES + within
                        waiting.append((len(piece), at + len(piece), asyncio.create_task(write(piece, at))))
                        on_its_way += len(piece)
            while waiting:
                await acknowledged()
        finally:
            for *_, request in waiting:
                request.cancel()
            await asyncio.gather(*(request for *_, request in waiting), return_exceptions=True)

    async def rename(self, old: str, new: str) -> None:
        async with self.answer("renaming", self.patience.answer_s):
            await self.sftp.rename(self._login.root + old, self._login.root + new)

    async def remove(self, path: str) -> None:
        async with self.answer("removing a part", self.patience.answer_s):
            await self.sftp.remove(self._login.root + path)
