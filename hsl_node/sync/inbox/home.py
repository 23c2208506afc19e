"""A sender's home on the receiver: `parts/`, `inbox/`, `receipts/`, and the rules for each. No network.

A file is reached by a name that `names.parse_file_name` accepts, in one of three folders, through directory
descriptors and without following links. Anything else is a `PeerDataError`, whose `code` is counted and logged.
"""

from __future__ import annotations

import asyncio
import errno
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hsl_node.errors import PeerDataError, escaped
from hsl_node.federation.config import Federation
from hsl_node.federation.names import INBOX, PARTS, RECEIPTS, FileName, Kind, Peer, parse_file_name
from hsl_node.host import durable
from hsl_node.host.durable import Step
from hsl_node.sync.inbox.part import REWIND_MAX_BYTES, OpenFile, Part
from hsl_node.sync.manifest import MANIFEST_MAX_BYTES
from hsl_node.sync.store.plain_files import exists, open_folder, open_plain, require_plain
from hsl_node.sync.store.room import Quota

FOLDERS = (PARTS, INBOX, RECEIPTS)
# A block of 256 KiB is written in the event loop: handing each one to a thread cost 30 % more processor time and 70 MB
# more memory (four senders, two cores). Only a disk that blocks us gets threads.
SLOW_WRITE_S = 0.05


class Home:
    """Everything one sender may touch. Its sessions share this object; all calls are made in the event loop."""

    def __init__(
        self, homes: Path, peer: Peer, federation: Federation, data_bytes: int, quota: Quota, threads: Executor
    ) -> None:
        self.homes = homes
        self.peer = peer
        self._fed8 = federation.fed8
        self._last_round = federation.plan.rounds + 1  # the last statement
        self._data_bytes = data_bytes
        self.quota = quota
        self._threads = threads
        self._structure = asyncio.Lock()  # opening for writing, renaming, removing: one at a time
        self._writers: dict[str, OpenFile] = {}  # of parts, by name
        self._begun: dict[str, Part] = {}  # what was written of parts that nobody has removed or renamed
        self._brought: set[FileName] = set()  # checkpoints that came into inbox/, of the last rounds
        self.on_gone: Callable[[Peer, int], None] = lambda peer, count: None  # bytes that somebody else took away
        for path in (homes, homes / peer, *(homes / peer / folder for folder in FOLDERS)):
            path.mkdir(mode=0o700, exist_ok=True)

    # ------------------------------------------------------------ names

    def locate(self, path: bytes) -> tuple[str, FileName | None]:
        """Folder and file that a client's path means; ("", None) is the root. Nothing is normalised.

        Raises:
            PeerDataError: code `name` or `owner`.
        """
        shown = escaped(path[:300].decode("latin-1"))
        try:
            parts = path.decode("ascii").removeprefix("/").split("/")
        except UnicodeDecodeError as exc:
            raise PeerDataError(f"{shown}: not a path here", code="name") from exc
        if parts in ([""], ["."]):
            return "", None
        if parts[0] not in FOLDERS or len(parts) > 2:
            raise PeerDataError(f"{shown}: not a path here", code="name")
        if len(parts) == 1:
            return parts[0], None
        name = parse_file_name(parts[1])
        if name.peer != self.peer:
            raise PeerDataError(f"{shown}: not a file of {self.peer!r}", code="owner")
        if name.fed8 != self._fed8:
            raise PeerDataError(f"{shown}: another federation, ours is {self._fed8}", code="federation")
        wrong_kind = (name.kind is Kind.RECEIPT) != (parts[0] == RECEIPTS)
        if wrong_kind or name.part != (parts[0] == PARTS) or name.round > self._last_round:
            raise PeerDataError(f"{shown}: not a file of this folder", code="name")
        return parts[0], name

    def limit_of(self, name: FileName) -> int:
        return self._data_bytes if name.kind is Kind.DATA else MANIFEST_MAX_BYTES

    # ------------------------------------------------------------ reading

    def status(self, folder: str, name: FileName) -> os.stat_result:
        with open_folder(self.homes, self.peer, folder) as descriptor, self._noticing(folder, name):
            status = os.stat(str(name), dir_fd=descriptor, follow_symlinks=False)
        require_plain(status)
        return status

    def open_to_read(self, folder: str, name: FileName) -> OpenFile:
        if folder == INBOX:
            raise PeerDataError("inbox/ is not readable", code="operation")
        with open_folder(self.homes, self.peer, folder) as descriptor:
            return OpenFile(open_plain(str(name), os.O_RDONLY, descriptor))

    async def read(self, file: OpenFile, offset: int, count: int) -> bytes:
        async with file.lock:
            file.require_open()
            return bytes(await self._run(os.pread, file.descriptor, count, offset))

    def size_of(self, file: OpenFile) -> int:
        file.require_open()
        return os.fstat(file.descriptor).st_size

    # ------------------------------------------------------------ writing

    async def open_part(self, name: FileName, *, create: bool) -> OpenFile:
        """Open a part for writing. A sender that comes back after a broken link takes its part over."""
        async with self._structure:
            if not create:
                await self._close_writer(name)
            with open_folder(self.homes, self.peer, PARTS) as folder:
                if create:
                    self._require_room(name)
                flags = os.O_RDWR | (os.O_CREAT | os.O_EXCL if create else 0)
                descriptor = open_plain(str(name), flags, folder)
            size = os.fstat(descriptor).st_size
            part, reached = Part(name, self.limit_of(name), size), max(0, size - REWIND_MAX_BYTES)
            file = OpenFile(descriptor, part, reached=reached)
            self._writers[str(name)] = file
            if name.kind is Kind.DATA:  # the others are small, and a ping's are removed by whoever comes first
                self._begun[str(name)] = part
            return file

    async def write(self, file: OpenFile, offset: int, data: bytes) -> None:
        if file.part is None:
            raise PeerDataError("not opened for writing", code="operation")
        if offset + len(data) > file.part.limit:
            raise PeerDataError(f"write to {offset + len(data)}, this file ends at {file.part.limit}", code="size")
        async with file.lock:
            file.require_open()
            began = time.monotonic()
            if file.slow:
                await self._run(self._write, file.part, file.descriptor, offset, data)
            else:
                self._write(file.part, file.descriptor, offset, data)
            file.slow = time.monotonic() - began > SLOW_WRITE_S
            file.received += len(data)
            if data:  # an empty write gets nowhere
                file.reached = max(file.reached, offset + len(data))

    async def fsync(self, file: OpenFile) -> None:
        async with file.lock:
            file.require_open()
            await self._run(_make_durable, file.descriptor)

    async def commit(self, old: FileName, new: FileName) -> None:
        """Rename a finished part into inbox/, never over another file."""
        if new != old.of(old.kind):
            raise PeerDataError("a part is renamed to its own name", code="name")
        async with self._structure:
            if (writer := self._writers.get(str(old))) and writer.is_open:
                raise PeerDataError("still open for writing", code="busy")
            with (
                open_folder(self.homes, self.peer, PARTS) as parts,
                open_folder(self.homes, self.peer, INBOX) as inbox,
            ):
                with self._noticing(PARTS, old):
                    status = os.stat(str(old), dir_fd=parts, follow_symlinks=False)
                require_plain(status)
                limit = self.limit_of(old)
                if status.st_size != limit if old.kind is Kind.DATA else not 0 < status.st_size <= limit:
                    raise PeerDataError(f"{status.st_size} of {limit} bytes", code="size")
                # Only this process adds to inbox/, and nothing awaits between the look and the rename.
                if exists(str(new), inbox):
                    raise FileExistsError(errno.EEXIST, "already delivered")
                with durable.passing(Step.RECEIVER_COMMIT):
                    durable.rename(str(old), str(new), old_folder=parts, new_folder=inbox)
                self._begun.pop(str(old), None)
                if new.kind is Kind.DATA:
                    self._brought = {new, *(data for data in self._brought if data.round >= new.round - 1)}

    async def remove(self, name: FileName) -> None:
        async with self._structure:
            await self._close_writer(name)
            with open_folder(self.homes, self.peer, PARTS) as folder:
                os.unlink(str(name), dir_fd=folder)
            self._begun.pop(str(name), None)

    async def _close_writer(self, name: FileName) -> None:
        if writer := self._writers.pop(str(name), None):
            await writer.close()

    @contextmanager
    def _noticing(self, folder: str, name: FileName) -> Iterator[None]:
        """A part that was written here, that nobody removed, and that is not there: a virus scanner's work, say."""
        try:
            yield
        except FileNotFoundError:
            if folder == PARTS and (part := self._begun.pop(str(name), None)) and part.size:
                self.on_gone(self.peer, part.size)
            raise

    # ------------------------------------------------------------ for the node

    def misses(self, data: FileName) -> None:
        """A manifest lies here, and its checkpoint nowhere: did it ever come?"""
        if data in self._brought:
            self._brought.remove(data)
            self.on_gone(self.peer, self._data_bytes)

    def awaits(self, name: FileName) -> bool:
        """Is `name` in inbox/ now?"""
        with open_folder(self.homes, self.peer, INBOX) as folder:
            return exists(str(name), folder)

    def writing(self) -> list[OpenFile]:
        self._writers = {name: file for name, file in self._writers.items() if file.is_open}
        return list(self._writers.values())

    # ------------------------------------------------------------ below

    def _require_room(self, name: FileName) -> None:
        """Refuse one file too many. For the quota each counts with the size it may grow to, so writes don't ask it."""
        present = []
        for folder in (PARTS, INBOX):
            with open_folder(self.homes, self.peer, folder) as descriptor:
                present += os.listdir(descriptor)
        if len(present) >= self.quota.files:
            raise PeerDataError(f"{len(present)} files wait here already", code="quota")
        need = self.limit_of(name)
        held = sum(MANIFEST_MAX_BYTES if ".manifest" in other else self._data_bytes for other in present)
        if held + need > self.quota.bytes:
            text = f"{held} bytes are taken of {self.quota.bytes} (inbox.quota_mib), and this file may have {need}"
            raise PeerDataError(text, code="quota")
        self._require_free(os.statvfs(self.homes), need)

    def _write(self, part: Part, descriptor: int, offset: int, data: bytes) -> None:
        """Room when the part was opened is no room now: others grow meanwhile. Asking takes 1.5 us."""
        self._require_free(os.fstatvfs(descriptor), len(data))
        part.write(descriptor, offset, data)

    def _require_free(self, disk: os.statvfs_result, need: int) -> None:
        if disk.f_bavail * disk.f_frsize < need + self.quota.reserve_bytes:
            raise OSError(errno.ENOSPC, "no room here")

    async def _run(self, work: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)


def _make_durable(descriptor: int) -> None:
    with durable.passing(Step.RECEIVER_PART):
        durable.sync(descriptor, "an arriving file")
