"""A file on its way to us: written block by block, hashed as it comes. No network."""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hsl_node.errors import PeerDataError
from hsl_node.federation.names import Digest, FileName, Kind

if TYPE_CHECKING:
    from hashlib import _Hash

HASH_BLOCK_BYTES = 1024 * 1024
REWIND_MAX_BYTES = 1024 * 1024  # a resuming sender goes back less far (`deliver.py`)


@dataclass(eq=False)
class OpenFile:
    """A handle. At most one disk operation at a time holds `lock`, so a descriptor is never closed under it."""

    descriptor: int
    part: Part | None = None  # None: opened for reading
    opened: float = field(default_factory=time.monotonic)
    received: int = 0
    reached: int = 0  # the end of what was written, and at first where a resuming sender may begin
    offered: bool = False  # lies below offer/: reading it is counted
    slow: bool = False  # the last write took long: the next one goes to a thread
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def close(self) -> None:
        async with self.lock:
            descriptor, self.descriptor = self.descriptor, -1
            if self.part and self.part.writer is self:
                self.part.writer = None
            if descriptor >= 0:
                os.close(descriptor)

    def require_open(self) -> None:
        """Raises: PeerDataError: code `busy`."""
        if self.descriptor < 0:
            raise PeerDataError("a newer connection took this file over", code="busy")


@dataclass(eq=False)
class Part:
    """A file on its way. Lives in memory until it is renamed or removed, over any number of connections."""

    name: FileName
    limit: int  # bytes: exactly this for data, at most this for a manifest
    inode: int = -1
    size: int = 0
    hashed: int = 0  # the first `hashed` bytes went through `hash` as they were written
    hash: _Hash | None = None  # None: something was overwritten or left out, the file must be read again
    writer: OpenFile | None = None

    def write(self, descriptor: int, offset: int, data: bytes) -> None:
        """Write a block and hash it. Blocking. A resuming sender goes a few blocks back: equal bytes change nothing."""
        if not data:
            return  # it makes no file longer
        again = min(max(self.hashed - offset, 0), len(data))  # bytes of this block that are hashed already
        if self.hash is not None and (
            offset > self.hashed or (again and os.pread(descriptor, again, offset) != data[:again])
        ):
            self.hash = None
        view = memoryview(data)
        done = 0
        while done < len(data):
            done += os.pwrite(descriptor, view[done:], offset + done)
        self.size = max(self.size, offset + len(data))
        if self.hash is not None and again < len(data):
            self.hash.update(view[again:])
            self.hashed = offset + len(data)

    def catch_up(self, descriptor: int) -> None:
        """Hash what lies on disk and was not hashed yet, after a restart of this process. Blocking."""
        while self.hash is not None and self.hashed < self.size:
            block = os.pread(descriptor, min(HASH_BLOCK_BYTES, self.size - self.hashed), self.hashed)
            if not block:
                self.hash = None
                return
            self.hash.update(block)
            self.hashed += len(block)

    @property
    def complete(self) -> bool:
        """All bytes are there. How long a manifest will be nobody knows before it is renamed."""
        return self.name.kind is Kind.DATA and self.size == self.limit

    @property
    def digest(self) -> Digest | None:
        """sha256 of the whole file, if every byte of it was hashed on arrival."""
        if self.hash is None or self.hashed != self.size:
            return None
        return Digest(self.hash.hexdigest())
