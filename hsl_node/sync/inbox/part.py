"""A file on its way to us: written block by block. No network."""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import dataclass, field

from hsl_node.errors import PeerDataError
from hsl_node.federation.names import FileName, Kind

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
            if descriptor >= 0:
                os.close(descriptor)

    @property
    def is_open(self) -> bool:
        return self.descriptor >= 0

    def require_open(self) -> None:
        """Raises: PeerDataError: code `busy`."""
        if not self.is_open:
            raise PeerDataError("a newer connection took this file over", code="busy")


@dataclass(eq=False)
class Part:
    """A file that is open for writing."""

    name: FileName
    limit: int  # bytes: exactly this for data, at most this for a manifest
    size: int

    def write(self, descriptor: int, offset: int, data: bytes) -> None:
        """Blocking."""
        if not data:
            return  # it makes no file longer
        view, done = memoryview(data), 0
        while done < len(data):
            done += os.pwrite(descriptor, view[done:], offset + done)
        self.size = max(self.size, offset + len(data))

    @property
    def complete(self) -> bool:
        """All bytes are there. How long a manifest will be nobody knows before it is renamed."""
        return self.name.kind is Kind.DATA and self.size == self.limit
