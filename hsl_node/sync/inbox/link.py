"""One TCP connection to the embedded inbox: who is it, and the one thing it may become, an sftp session."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Callable

import asyncssh
from asyncssh.stream import SSHServerStreamSession

from hsl_node.errors import PeerDataError, escaped
from hsl_node.federation.names import FileName, Peer
from hsl_node.sync.inbox.admission import Admission, Member
from hsl_node.sync.inbox.home import Home
from hsl_node.sync.inbox.limits import source_of
from hsl_node.sync.inbox.part import OpenFile
from hsl_node.sync.inbox.requests import InboxFS, InboxHandler
from hsl_node.sync.wire.sockets import tune
from hsl_node.sync.wire.toll import Turnstile

LOGIN_MAX_BYTES = 32 * 1024  # until the login is done; those of OpenSSH, asyncssh and paramiko take 2 to 4 KB
AGAIN_S = 10.0  # of silence, after which a question is as good as a new login: the peer is there (again)
LATER_S = 0.05  # between that question and one that shows that its process lives: what a hole held up comes all at once
UNSENT_MAX_BYTES = 1024 * 1024  # of answers a client does not read; then we stop reading its requests


class Link(asyncssh.SSHServer):
    """One TCP connection: a stranger until `peer` is set, which only a verified key does."""

    def __init__(self, admission: Admission, home: Callable[[Peer], Home]) -> None:
        self._admission = admission
        self._home = home
        self.conn: asyncssh.SSHServerConnection
        self.turnstile: Turnstile
        self.member: Member  # from the login on
        self.source = ""
        self.peer: Peer | None = None
        self.key: bytes | None = None
        self.login = 0
        self.sessions = 0
        self.handles_max = admission.limits.handles_per_connection
        self.last_request = time.monotonic()
        self._offered: asyncssh.SSHKey | None = None
        self._attempts = 0
        self._writable = asyncio.Event()
        self._writable.set()
        self._filesystems: set[InboxFS] = set()
        self._answered = False
        self._not_before = 0.0

    # ------------------------------------------------------------ coming and going

    def connection_made(self, conn: asyncssh.SSHServerConnection) -> None:
        self.conn = conn
        self.source = source_of(str(conn.get_extra_info("peername", ("",))[0]))
        if (sock := conn.get_extra_info("socket")) is not None:
            tune(sock)
        # asyncssh ignores the transport's back-pressure: a client that never reads would grow our memory without end.
        assert conn._transport is not None
        conn._transport.set_write_buffer_limits(high=UNSENT_MAX_BYTES)
        conn.pause_writing = self._pause  # type: ignore[method-assign]
        conn.resume_writing = self._resume  # type: ignore[method-assign]
        self.turnstile = Turnstile(
            conn,
            LOGIN_MAX_BYTES,
            lambda: self._admission.flooded(self),
            lambda error: self.refused("packet", "", error),
        )
        self._admission.admit(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._writable.set()
        self._admission.leave(self)
        if self.peer:
            self.note("peer disconnected", logging.INFO, reason=escaped(str(exc or "")))

    def abort(self) -> None:
        self._admission.leave(self)  # at once: whoever comes next must not find this one still counted
        self.conn.abort()

    def _pause(self) -> None:
        self._writable.clear()
        self.turnstile.hold()

    def _resume(self) -> None:
        self._writable.set()
        self.turnstile.release()

    # ------------------------------------------------------------ who is it

    def public_key_auth_supported(self) -> bool:
        return True

    def validate_public_key(self, username: str, key: asyncssh.SSHKey) -> bool:
        """Is this key pinned, and the user name its peer's? asyncssh checks the signature right after this.

        Certificates, which would bring a second way to become a peer, it refuses where `validate_ca_key` is not ours.
        """
        self._offered = key
        peer = self._admission.identify(key)
        if peer is not None and username == peer:
            return True
        reason = "unknown or revoked key" if peer is None else f"this is the key of {peer!r}: log in under that name"
        self._admission.login_failed(self.source, username, key, reason)
        self._attempts += 1
        if self._attempts >= self._admission.limits.login_attempts:
            raise asyncssh.PermissionDenied("too many attempts")
        return False

    def auth_completed(self) -> None:
        """The signature is verified. User name and key were compared above; compared again, this time for good."""
        key, user = self._offered, str(self.conn.get_extra_info("username"))
        peer = self._admission.identify(key) if key else None
        if key is None or peer is None or peer != user:
            self._admission.login_failed(self.source, user, key, "key and user name changed during the login")
            self.abort()
            return
        self.peer, self.key = peer, key.public_data
        self.last_request = time.monotonic()
        self.member = self._admission.welcome(self, peer)
        self.turnstile.toll = self.member.toll

    @property
    def run(self) -> str:
        """Which process of the peer this is; empty where it does not say. Its key exchange signed it."""
        says = str(self.conn.get_extra_info("client_version", ""))
        found = re.fullmatch(r"SSH-2\.0-hsl1_([0-9a-f]{16})", says, re.ASCII)
        return found[1] if found else ""

    # ------------------------------------------------------------ sessions

    def session_requested(self) -> tuple[asyncssh.SSHServerChannel[bytes], Session] | bool:
        if self.peer is None or self._admission.sessions_of(self.peer) >= self._admission.limits.sessions_per_peer:
            if self.peer:
                self.refused("session", "", PeerDataError("too many sessions", code="sessions"))
            return False
        channel: asyncssh.SSHServerChannel[bytes] = self.conn.create_server_channel()
        # Environment variables would be kept without a limit; nothing here reads them.
        channel._process_env_request = lambda packet: False  # type: ignore[method-assign]
        self.sessions += 1
        return channel, Session(self)

    def file_system(self, channel: asyncssh.SSHServerChannel[bytes]) -> InboxFS:
        filesystem = InboxFS(channel, self._home(self.member.peer), self)
        self._filesystems.add(filesystem)
        return filesystem

    def session_closed(self, filesystem: InboxFS | None) -> None:
        self.sessions -= 1
        self._filesystems -= {filesystem}

    @property
    def handles(self) -> int:
        """Open files, of all sessions."""
        return sum(len(fs.files) for fs in self._filesystems)

    def holds(self, file: OpenFile) -> bool:
        return any(file in fs.files for fs in self._filesystems)

    # ------------------------------------------------------------ called by the sessions

    def asked(self) -> None:
        """A request came. Raises: PeerDataError: one too many."""
        self.turnstile.request()
        before, self.last_request = self.last_request, time.monotonic()
        if self.last_request - before > AGAIN_S:
            self.login, self._answered = self._admission.again(self), False
            self._not_before = self.last_request + LATER_S
        elif not self._answered and self.last_request >= self._not_before:
            self._answered = True
            self._admission.answered(self)

    async def writable(self) -> None:
        await self._writable.wait()

    def offered(self, name: str) -> OpenFile:
        return self._admission.offered(self, name)

    def refused(self, operation: str, path: str, error: PeerDataError) -> None:
        self._admission.refused(self.member.peer, operation, path, error)

    def note(self, event: str, level: int = logging.WARNING, **fields: object) -> None:
        self._admission.note(self.member.peer, event, level, peer=self.member.peer, **fields)

    def committed(self, name: FileName) -> None:
        self.note("delivery complete", logging.INFO, round=name.round, sha256=name.sha256[:12])
        self._admission.on_commit(self.member.peer)


class Session(SSHServerStreamSession[bytes]):
    """A channel that can become one thing only: the sftp subsystem."""

    def __init__(self, link: Link) -> None:
        super().__init__(None)
        self._link = link
        self._filesystem: InboxFS | None = None

    def subsystem_requested(self, subsystem: str) -> bool:
        if subsystem != "sftp":
            self._refuse("subsystem", subsystem)
        return subsystem == "sftp"

    def shell_requested(self) -> bool:
        return self._refuse("shell")

    def exec_requested(self, command: str) -> bool:
        return self._refuse("exec", command)

    def session_started(self) -> None:
        channel = self._chan
        assert channel is not None
        self._filesystem = self._link.file_system(channel)  # type: ignore[arg-type]
        handler = InboxHandler(
            self._filesystem,
            self._link,
            asyncssh.SSHReader[bytes](self, channel),
            asyncssh.SSHWriter[bytes](self, channel),
        )
        self._link.conn.create_task(handler.run())

    def connection_lost(self, exc: Exception | None) -> None:
        self._link.session_closed(self._filesystem)
        super().connection_lost(exc)

    # These would queue an exception each, without a limit.
    def signal_received(self, signal: str) -> None:
        pass

    def break_received(self, msec: int) -> bool:
        return False

    def terminal_size_changed(self, width: int, height: int, pixwidth: int, pixheight: int) -> None:
        pass

    def _refuse(self, what: str, argument: str = "") -> bool:
        self._link.refused(what, argument, PeerDataError(f"{what} is not offered here", code="operation"))
        return False
