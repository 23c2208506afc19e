"""The second client: paramiko, the library of the paper, in a thread of its own for every connection.

paramiko's deadlines do not cover all of its waits (a peer that only answers keepalives hangs it for ever, and so does a
full socket), so the event loop watches the thread and shuts the socket down when nothing moves: that ends every wait.

Requests go through paramiko's own SFTP request functions, not its file object, which drops the server's answers to
pipelined writes and to `close`: a full remote disk then looks like success (paramiko#79).
"""

from __future__ import annotations

import asyncio
import errno
import io
import logging
import socket
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import asyncssh
import paramiko
from paramiko.sftp import (
    CMD_CLOSE,
    CMD_DATA,
    CMD_EXTENDED,
    CMD_HANDLE,
    CMD_OPEN,
    CMD_READ,
    CMD_WRITE,
    SFTP_FLAG_CREATE,
    SFTP_FLAG_EXCL,
    SFTP_FLAG_READ,
    SFTP_FLAG_WRITE,
    int64,
)

from hsl_node.errors import HslError, PeerDataError
from hsl_node.federation.identity import Identity
from hsl_node.sync.wire.algorithms import CIPHERS, KEY_EXCHANGES, MACS
from hsl_node.sync.wire.dial import reach
from hsl_node.sync.wire.flow import Flow
from hsl_node.sync.wire.sockets import Congestion
from hsl_node.sync.wire.toll import Toll
from hsl_node.sync.wire.transport import (
    BLOCK_BYTES,
    READ_AHEAD_BLOCKS,
    Login,
    Patience,
    Source,
    Transport,
)

P = ParamSpec("P")
T = TypeVar("T")

# paramiko believes any length that a server announces, before its key is checked: up to 4 GiB would be read.
PACKET_MAX_BYTES = 1024 * 1024  # ours have 32 KiB
GREETING_MAX_BYTES = 64 * 1024  # and a greeting line has no end for it
END_S = 10  # for paramiko's reader thread to notice a closed socket; it looks ten times a second
# Its threads log a traceback for every broken connection; what happened is in the error that we raise.
logging.getLogger("paramiko").setLevel(logging.CRITICAL)


@asynccontextmanager
async def connect(login: Login, identity: Identity, patience: Patience, toll: Toll) -> AsyncIterator[Transport]:
    """See `transport.connect`."""

    async def log_in(login: Login, sock: socket.socket) -> _Link:
        link = _Link(login, sock, patience, toll)
        try:
            await link.log_in(identity)
        except BaseException:
            await link.close()
            raise
        return link

    link = await reach(login, patience.connect_s, log_in)
    try:
        yield link
    finally:
        await link.close()


class _Link:
    """One connection. Methods with `_blocking` in their name run in its thread, one at a time."""

    sftp: Any  # paramiko.SFTPClient

    def __init__(self, login: Login, sock: socket.socket, patience: Patience, toll: Toll) -> None:
        self._login = login
        self._sock = sock
        self.patience = patience
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"sftp-{login.peer}")
        self._ssh = paramiko.Transport(sock)
        self._toll = toll
        _bound(self._ssh.packetizer, toll)
        self._up, self._down = Flow(), Flow()
        self._congestion = Congestion(sock)
        self._moved = 0.0  # monotonic time of the last sign of life, as the thread sees it

    # ------------------------------------------------------------ in the event loop

    async def log_in(self, identity: Identity) -> None:
        await self._run("logging in", self.patience.connect_s, self._blocking_log_in, identity)

    async def close(self) -> None:
        self._cut()
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._thread, self._blocking_close)
        self._thread.shutdown()

    def alive(self) -> bool:
        return bool(self._ssh.is_active())

    async def size(self, path: str) -> int | None:
        return await self._run("asking for a file's size", self.patience.answer_s, self._blocking_size, path)

    async def read(self, path: str, offset: int, count: int) -> bytes:
        return await self._run("reading", self.patience.for_bytes(count), self._blocking_read, path, offset, count)

    async def rename(self, old: str, new: str) -> None:
        root = self._login.root
        await self._run("renaming", self.patience.answer_s, lambda: self.sftp.rename(root + old, root + new))

    async def remove(self, path: str) -> None:
        await self._run("removing a part", self.patience.answer_s, lambda: self.sftp.remove(self._login.root + path))

    async def write(
        self, path: str, source: Path | bytes, offset: int, *, create: bool, progress: Callable[[int], None]
    ) -> None:
        flags = SFTP_FLAG_WRITE | (SFTP_FLAG_CREATE | SFTP_FLAG_EXCL if create else 0)
        loop = asyncio.get_running_loop()

        def report(end: int) -> None:
            loop.call_soon_threadsafe(progress, end)

        content = await asyncio.to_thread(Source, source)
        try:
            disk_s = self.patience.for_disk(content.size)
            handle = await self._run("opening the part", self.patience.answer_s, self._blocking_open, path, flags)
            await self._run(
                "sending",
                lambda: self.patience.for_bytes(self._up.piece_bytes),
                self._blocking_send,
                handle,
                content,
                offset,
                report,
            )
            await self._run("making the part durable", disk_s, self._blocking_fsync, handle)
            await self._run("closing the part", disk_s, self._blocking_end, handle)
        finally:
            content.close()

    async def _run(
        self, what: str, allowed: float | Callable[[], float], work: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Run `work` in the thread. If nothing moves for `allowed` seconds, or we are cancelled, the socket is shut."""
        self._moved = time.monotonic()
        call = asyncio.get_running_loop().run_in_executor(self._thread, lambda: work(*args, **kwargs))
        try:
            while not call.done():
                seconds = allowed() if callable(allowed) else allowed
                left = self._moved + seconds - time.monotonic()
                if left <= 0:
                    raise self._login.silent(what, seconds)
                await asyncio.wait({call}, timeout=left)
            return call.result()
        except HslError:
            raise
        except Exception as exc:  # a server that breaks the protocol shows as any error at all
            if isinstance(exc, OSError) and self._ssh.is_active():
                raise self._login.failed(what, exc) from exc
            cause = self._ssh.saved_exception  # of its reader's end; what a waiting call raises says less
            raise self._login.lost(what, cause if isinstance(cause, paramiko.SSHException) else exc) from exc
        finally:
            if not call.done():
                self._cut()
                await asyncio.wait({call})
                call.exception()  # seen: it is the echo of the cut

    def _cut(self) -> None:
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    # ------------------------------------------------------------ in the thread

    def _blocking_log_in(self, identity: Identity) -> None:
        ssh, login = self._ssh, self._login
        ssh.local_version = f"SSH-2.0-{identity.client_version}"
        options = ssh.get_security_options()
        options.ciphers = tuple(c for c in CIPHERS if c in options.ciphers)
        options.kex = tuple(k for k in KEY_EXCHANGES if k in options.kex)
        options.digests = tuple(m for m in MACS if m in options.digests)
        options.key_types = ("ssh-ed25519",)
        options.compression = ("none",)
        # The event loop watches, and says what is wrong; paramiko's own limits, which say less, must not come before.
        later_s = 10 * self.patience.connect_s
        ssh.banner_timeout = ssh.handshake_timeout = ssh.auth_timeout = later_s
        ssh.start_client(timeout=later_s)
        offered = ssh.get_remote_server_key()
        pinned = [asyncssh.import_public_key(key).public_data for key in login.host_keys]
        if offered.asbytes() not in pinned:
            raise login.other_host_key(offered.fingerprint)
        key = paramiko.Ed25519Key.from_private_key(io.StringIO(identity.key.export_private_key("openssh").decode()))
        try:
            ssh.auth_publickey(login.user, key)
        except paramiko.AuthenticationException as exc:
            if not ssh.is_active() or "timeout" in str(exc).lower():  # paramiko says "authentication" for these too
                raise login.lost("logging in", exc) from exc
            raise login.our_key_refused(identity) from exc
        channel = ssh.open_session(timeout=later_s)
        channel.invoke_subsystem("sftp")
        self.sftp = paramiko.SFTPClient(channel)
        ssh.set_keepalive(int(max(1, self.patience.keepalive_s)))

    def _blocking_close(self) -> None:
        self._ssh.close()
        self._ssh.packetizer.complete_handshake()  # ends the timer thread of a handshake that failed
        if self._ssh.is_alive():
            self._ssh.join(END_S)
        self._sock.close()

    def _blocking_size(self, path: str) -> int | None:
        try:
            size = self.sftp.stat(self._login.root + path).st_size
        except OSError as exc:
            if exc.errno == errno.ENOENT:
                return None
            raise
        if size is None:
            raise OSError("the server does not tell sizes")
        return int(size)

    def _blocking_open(self, path: str, flags: int) -> bytes:
        kind, message = self.sftp._request(CMD_OPEN, self._login.root + path, flags, paramiko.SFTPAttributes())
        if kind != CMD_HANDLE:
            raise paramiko.SSHException("a file handle was expected")
        return bytes(message.get_binary())

    def _blocking_end(self, handle: bytes) -> None:
        """Close a file; a deferred write error is reported here."""
        self.sftp._request(CMD_CLOSE, handle)

    def _blocking_fsync(self, handle: bytes) -> None:
        try:
            self.sftp._request(CMD_EXTENDED, "fsync@openssh.com", handle)
        except OSError as exc:
            # paramiko hides the server's list of extensions and its "unsupported" code; that text is the protocol's.
            if exc.errno != errno.EACCES and "unsupported" not in str(exc).lower():
                raise

    def _blocking_read(self, path: str, offset: int, count: int) -> bytes:
        handle = self._blocking_open(path, SFTP_FLAG_READ)
        result, until = b"", time.monotonic() + self.patience.for_all(count)
        try:
            while len(result) < count:  # a server may answer with less than it was asked for
                asked, began = min(count - len(result), self._down.most_bytes), time.monotonic()
                try:
                    kind, message = self.sftp._request(CMD_READ, handle, int64(offset + len(result)), asked)
                except EOFError:  # the status "end of file"; a broken link is an SSHException here
                    break
                if kind != CMD_DATA:
                    raise paramiko.SSHException("data was expected")
                block = message.get_string()
                if not block:
                    break
                self._moved = time.monotonic()
                if self._moved > until:
                    raise paramiko.SSHException("it sends next to nothing")
                self._down.answered(len(block), self._moved - began)
                result += block
        finally:
            with suppress(OSError):
                self._blocking_end(handle)
        return result[:count]

    def _blocking_send(self, handle: bytes, content: Source, offset: int, report: Callable[[int], None]) -> None:
        answers = _Answers(self.sftp)
        waiting: deque[tuple[int, int, int, float]] = (
            deque()
        )  # (bytes, their end, number of request, began), oldest first
        on_its_way = 0

        def acknowledged() -> None:
            nonlocal on_its_way
            count, end, number, began = waiting.popleft()
            answers.wait_for(number)
            self._moved = time.monotonic()
            self._up.answered(count, self._moved - began)
            self._congestion.follow(self._up.most_bytes)
            on_its_way -= count
            self._toll.sent(count)
            report(end)

        for start in range(offset, content.size, READ_AHEAD_BLOCKS * BLOCK_BYTES):
            for number, block in enumerate(content.read(start)):
                for within, piece in self._up.pieces(block):
                    while waiting and on_its_way + len(piece) > self._up.most_bytes:
                        acknowledged()
                    at, began = start + number * BLOCK_BYTES + within, time.monotonic()
                    request = self.sftp._async_request(answers, CMD_WRITE, handle, int64(at), piece)
                    waiting.append((len(piece), at + len(piece), request, began))
                    on_its_way += len(piece)
        while waiting:
            acknowledged()


def _bound(packetizer: Any, toll: Toll) -> None:
    """Limit what one packet and the greeting may take of our memory, and all packets of our time."""
    read_all, read_some, greeting = packetizer.read_all, packetizer._read_timeout, 0
    read_message = packetizer.read_message

    def bounded_message() -> tuple[int, paramiko.Message]:
        kind, message = read_message()
        try:
            toll.packet(kind, len(message.asbytes()))
        except PeerDataError as exc:
            raise paramiko.SSHException(exc.message) from exc
        return kind, message

    def bounded_read(count: int, check_rekey: bool = False) -> bytes:
        if count > PACKET_MAX_BYTES:
            raise paramiko.SSHException(f"the server announces a packet of {count} bytes")
        return bytes(read_all(count, check_rekey))

    def bounded_greeting(timeout: float) -> bytes:
        nonlocal greeting
        block = bytes(read_some(timeout))
        greeting += len(block)
        if greeting > GREETING_MAX_BYTES:
            raise paramiko.SSHException("the server's greeting has no end")
        return block

    packetizer.read_all, packetizer._read_timeout = bounded_read, bounded_greeting
    packetizer.read_message = bounded_message


class _Answers:
    """What paramiko calls for each answer to a request that nobody waits for at that moment; the order is free."""

    def __init__(self, sftp: Any) -> None:
        self._sftp = sftp
        self._arrived: set[int] = set()

    def wait_for(self, number: int) -> None:
        while number not in self._arrived:
            self._sftp._read_response()
        self._arrived.remove(number)

    def _async_response(self, kind: int, message: Any, number: int) -> None:
        self._sftp._convert_status(message)  # raises OSError for anything but "ok"
        self._arrived.add(number)
