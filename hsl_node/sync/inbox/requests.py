"""The SFTP side of the embedded inbox: which requests exist, which are refused. Files and rules are in `home.py`.

Two fences. `InboxHandler` lets only the listed request types reach any code at all; `InboxFS` overrides every hook
of asyncssh's `SFTPServer` and denies what is not needed, should a new request type ever find a way there.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, cast

import asyncssh
from asyncssh import sftp as asyncssh_sftp
from asyncssh.constants import (
    FXF_CREAT,
    FXF_EXCL,
    FXF_READ,
    FXF_TRUNC,
    FXF_WRITE,
    FXP_CLOSE,
    FXP_FSETSTAT,
    FXP_FSTAT,
    FXP_LSTAT,
    FXP_OPEN,
    FXP_READ,
    FXP_REALPATH,
    FXP_REMOVE,
    FXP_RENAME,
    FXP_SETSTAT,
    FXP_STAT,
    FXP_WRITE,
)
from asyncssh.packet import PacketDecodeError, SSHPacket

from hsl_node.errors import LocalStateError, PeerDataError
from hsl_node.federation.names import INBOX, PARTS, FileName, Kind
from hsl_node.sync.inbox.admission import Member
from hsl_node.sync.inbox.home import Home
from hsl_node.sync.inbox.part import OpenFile
from hsl_node.sync.offer import OFFER, parse_path

log = logging.getLogger(__name__)

BLOCK_MAX_BYTES = 256 * 1024  # of one read or write; what OpenSSH allows in one packet
PACKET_MAX_BYTES = BLOCK_MAX_BYTES + 1024  # with file handle, offset and length

_REQUESTS = {
    FXP_OPEN, FXP_CLOSE, FXP_READ, FXP_WRITE, FXP_STAT, FXP_LSTAT, FXP_FSTAT, FXP_SETSTAT, FXP_FSETSTAT,
    FXP_REMOVE, FXP_RENAME, FXP_REALPATH, b"fsync@openssh.com", b"limits@openssh.com",
}  # fmt: skip
_OPEN_WAYS = {
    FXF_READ: (False, False),  # flags -> (for writing, create)
    FXF_WRITE: (True, False),
    FXF_WRITE | FXF_READ: (True, False),
    FXF_WRITE | FXF_CREAT | FXF_EXCL: (True, True),
    FXF_WRITE | FXF_READ | FXF_CREAT | FXF_EXCL: (True, True),
    # Truncating what did not exist changes nothing; paramiko's mode "wx" asks for it.
    FXF_WRITE | FXF_CREAT | FXF_EXCL | FXF_TRUNC: (True, True),
    FXF_WRITE | FXF_READ | FXF_CREAT | FXF_EXCL | FXF_TRUNC: (True, True),
}


class Link(Protocol):
    """What a session needs of its connection (`link.py`)."""

    member: Member
    handles_max: int

    @property
    def handles(self) -> int: ...  # open on all sessions of this connection
    def asked(self) -> None: ...
    async def writable(self) -> None: ...
    def offered(self, name: str) -> OpenFile: ...
    def refused(self, operation: str, path: str, error: PeerDataError) -> None: ...
    def note(self, event: str, level: int = logging.WARNING, **fields: object) -> None: ...
    def committed(self, name: FileName) -> None: ...


class InboxFS(asyncssh.SFTPServer):
    """One session of one peer. Files are those of its `Home`; nothing else exists here."""

    def __init__(self, channel: asyncssh.SSHServerChannel[bytes], home: Home, link: Link) -> None:
        super().__init__(channel)
        self._home = home
        self._link = link
        self.files: set[OpenFile] = set()

    # ------------------------------------------------------------ what a sender needs

    async def open(self, path: bytes, pflags: int, attrs: asyncssh.SFTPAttrs) -> OpenFile:
        with self._answering("open", path):
            offered = parse_path(path)
            folder, name = (OFFER, None) if offered is not None else self._home.locate(path)
            if pflags not in _OPEN_WAYS or attrs.size is not None:
                raise PeerDataError(f"open with flags {pflags:#x}", code="operation")
            writing, create = _OPEN_WAYS[pflags]
            if writing and folder != PARTS:
                raise PeerDataError(f"{folder}/ is not written to", code="operation")
            if self._link.handles >= self._link.handles_max:
                raise PeerDataError("too many open files", code="handles")
            if offered is not None:
                file = self._link.offered(offered)
            elif writing:
                file = await self._home.open_part(_file(name), create=create)
            else:
                file = self._home.open_to_read(folder, _file(name))
        self.files.add(file)
        return file

    async def close(self, file_obj: object) -> None:
        file = cast(OpenFile, file_obj)
        self.files.discard(file)
        await file.close()

    async def read(self, file_obj: object, offset: int, size: int) -> bytes:
        if offset >= 2**63:  # beyond what the operating system can express
            return b""
        file, count = cast(OpenFile, file_obj), min(size, BLOCK_MAX_BYTES)
        with self._answering("read"):
            if file.offered:
                self._link.member.spend(count)
            data = await self._home.read(file, offset, count)
            if not file.offered:
                self._link.member.read_back(len(data))
        self._link.member.toll.sent(len(data))
        return data

    async def write(self, file_obj: object, offset: int, data: bytes) -> int:
        with self._answering("write"):
            await self._home.write(cast(OpenFile, file_obj), offset, data)
        self._link.member.wrote(len(data))
        return len(data)

    async def fsync(self, file_obj: object) -> None:
        with self._answering("fsync"):
            await self._home.fsync(cast(OpenFile, file_obj))

    def stat(self, path: bytes) -> asyncssh.SFTPAttrs:
        with self._answering("stat", path):
            folder, name = self._home.locate(path)
            if name is None:
                return asyncssh.SFTPAttrs(size=0, permissions=0o40700)
            status = self._home.status(folder, name)
        return asyncssh.SFTPAttrs(size=status.st_size, permissions=0o100600)

    lstat = stat

    def fstat(self, file_obj: object) -> asyncssh.SFTPAttrs:
        with self._answering("fstat"):
            size = self._home.size_of(cast(OpenFile, file_obj))
        return asyncssh.SFTPAttrs(size=size, permissions=0o100600)

    async def rename(self, oldpath: bytes, newpath: bytes) -> None:
        with self._answering("rename", oldpath + b" " + newpath):
            (from_folder, old), (to_folder, new) = self._locate_file(oldpath), self._locate_file(newpath)
            if (from_folder, to_folder) != (PARTS, INBOX):
                raise PeerDataError("only a part is renamed, into inbox/", code="operation")
            await self._home.commit(old, new)
        if new.kind is Kind.MANIFEST or self._home.awaits(new.of(Kind.MANIFEST)):
            self._link.committed(new)

    async def remove(self, path: bytes) -> None:
        with self._answering("remove", path):
            folder, name = self._locate_file(path)
            if folder != PARTS:
                raise PeerDataError(f"nothing is removed from {folder}/", code="operation")
            await self._home.remove(name)

    def realpath(self, path: bytes) -> bytes:
        with self._answering("realpath", path):
            folder, name = self._home.locate(path)
        return f"/{folder}/{name}".encode() if name else f"/{folder}".encode()

    def setstat(self, path: bytes, attrs: asyncssh.SFTPAttrs) -> None:
        with self._answering("setstat", path):
            self._locate_file(path)
            _require_times_only(attrs)

    def fsetstat(self, file_obj: object, attrs: asyncssh.SFTPAttrs) -> None:
        with self._answering("fsetstat"):
            _require_times_only(attrs)

    async def exit(self) -> None:
        for file in list(self.files):
            await self.close(file)

    # ------------------------------------------------------------ the second fence: every other hook of asyncssh's

    def _not_offered(self, *args: Any, **more: Any) -> Any:
        with self._answering("request"):
            raise PeerDataError("a request that is not offered here", code="operation")

    lsetstat = open56 = scandir = listdir = mkdir = rmdir = readlink = symlink = link = posix_rename = _not_offered
    lock = unlock = statvfs = fstatvfs = map_path = reverse_map_path = _not_offered

    # ------------------------------------------------------------ below

    def _locate_file(self, path: bytes) -> tuple[str, FileName]:
        folder, name = self._home.locate(path)
        return folder, _file(name)

    @contextmanager
    def _answering(self, operation: str, path: bytes = b"") -> Iterator[None]:
        """Log what is refused, and that this disk fails, within the link's budget."""
        try:
            yield
        except PeerDataError as exc:
            self._link.refused(operation, path.decode("latin-1"), exc)
            raise asyncssh.SFTPPermissionDenied(f"{exc.code}: {exc.message}") from exc
        except LocalStateError as exc:
            self._link.note("disk failed", logging.CRITICAL, reason=exc.message)
            raise asyncssh.SFTPFailure("the disk failed") from exc


def _file(name: FileName | None) -> FileName:
    """Raises: PeerDataError: it is a folder."""
    if name is None:
        raise PeerDataError("a folder", code="name")
    return name


def _require_times_only(attrs: asyncssh.SFTPAttrs) -> None:
    """Times are taken and forgotten, as many clients set them after an upload; all else is refused."""
    if any(v is not None for v in (attrs.size, attrs.permissions, attrs.uid, attrs.gid, attrs.owner, attrs.acl)):
        raise PeerDataError("only times may be set", code="operation")


class InboxHandler(asyncssh_sftp.SFTPServerHandler):
    """asyncssh's request loop with fewer requests, smaller packets and back-pressure."""

    def __init__(
        self, fs: InboxFS, link: Link, reader: asyncssh.SSHReader[bytes], writer: asyncssh.SSHWriter[bytes]
    ) -> None:
        super().__init__(fs, reader, writer, sftp_version=3)
        self._fs = fs
        self._link = link

    async def run(self) -> None:
        try:
            await super().run()
        except PeerDataError as exc:  # only from `recv_packet`
            raise asyncssh.DisconnectError(asyncssh.DISC_PROTOCOL_ERROR, exc.message) from exc
        finally:
            await self._fs.exit()

    async def recv_packet(self) -> SSHPacket:
        """The next request. It waits until the client has taken the answers so far: else they'd fill our memory.

        Raises:
            PeerDataError: the peer makes too many.
        """
        reader, writer = self._reader, self._writer
        assert reader is not None and writer is not None
        await asyncio.sleep(0)  # else nothing waits while requests lie here: a window of them took 8 s, without a pause
        await writer.drain()
        await self._link.writable()
        length = int.from_bytes(await reader.readexactly(4), "big")
        if length > PACKET_MAX_BYTES:
            raise asyncssh.SFTPBadMessage(f"packet of {length} bytes")
        packet = SSHPacket(await reader.readexactly(length))
        self._link.asked()
        return packet

    async def _process_limits(self, packet: SSHPacket) -> asyncssh.SFTPLimits:
        packet.check_end()
        return asyncssh.SFTPLimits(PACKET_MAX_BYTES, BLOCK_MAX_BYTES, BLOCK_MAX_BYTES, self._link.handles_max)

    async def _process_unoffered(self, packet: SSHPacket) -> None:
        error = PeerDataError("a request that is not offered here", code="operation")
        self._link.refused("request", "", error)
        raise asyncssh.SFTPOpUnsupported(error.message)


def _watched(handler: Any) -> Any:
    """Log what is our fault: asyncssh would only tell the client, in words that may name our paths."""

    async def process(self: InboxHandler, packet: SSHPacket) -> object:
        try:
            return await handler(self, packet)
        except (asyncssh.SFTPError, PacketDecodeError, FileNotFoundError, FileExistsError):
            raise
        except OSError as exc:
            self._link.note("disk error in the inbox", logging.ERROR, errno=exc.errno, reason=exc.strerror)
            raise
        except Exception as exc:
            log.exception("bug in the inbox")
            raise asyncssh.SFTPFailure("internal error") from exc

    process.__name__ = handler.__name__
    return process


InboxHandler._extensions = [(b"fsync@openssh.com", b"1"), (b"limits@openssh.com", b"1")]
InboxHandler._packet_handlers = {
    request: _watched(handler if request in _REQUESTS else InboxHandler._process_unoffered)
    for request, handler in asyncssh_sftp.SFTPServerHandler._packet_handlers.items()
} | {b"limits@openssh.com": _watched(InboxHandler._process_limits)}
