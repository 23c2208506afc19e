"""A TCP proxy that does to a connection what hospital networks do. In the test's own event loop.

async with Proxy(port_of_the_server) as link:
    link.cut_after = 1_000_000      # bytes from the client; then both sides are reset, once
    link.at_cut = kill_the_server   # what else ends at that byte; awaited before the reset
    link.bits_per_s = 4_000_000     # of each direction
    link.hole = True                # connections stay open, nothing passes until it is False again
    link.deaf = True                # nothing comes back, everything goes there
    link.largest_up = 6000          # bytes; from a larger piece on nothing goes there: a path that loses large packets
    link.largest_down = 6000        # the same for what comes back
    link.mute = True                # nothing goes there, everything comes back
    link.cuts, link.swallowed       # a test asserts that its fault fired
    await link.down()               # nobody listens any more; await link.up(): again, on the same port
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any

CHUNK_BYTES = 16 * 1024


class Proxy:
    def __init__(self, target_port: int, host: str = "127.0.0.1") -> None:
        self.host, self.target_port = host, target_port
        self.port = 0
        self.cut_after: int | None = None
        self.at_cut: Callable[[], Coroutine[Any, Any, None]] | None = None
        self.bits_per_s: float | None = None
        self.hole = False
        self.deaf = False
        self.mute = False
        self.largest_up: int | None = None
        self.largest_down: int | None = None
        self.bytes_up = 0  # from clients, over all connections
        self.connections = 0  # ever
        self.live = 0
        self.cuts = 0
        self.swallowed = 0  # bytes that met the hole, or went in a direction that is dead
        self._server: asyncio.Server | None = None
        self._cutting: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Proxy:
        await self.up()
        return self

    async def __aexit__(self, kind: type | None, exc: BaseException | None, trace: TracebackType | None) -> None:
        await self.down()

    async def up(self) -> None:
        self._server = await asyncio.start_server(self._accept, self.host, self.port, limit=CHUNK_BYTES)
        self.port = self._server.sockets[0].getsockname()[1]

    async def down(self) -> None:
        """Stop listening and reset what is open."""
        if self._server:
            self._server.close()
            self._server = None
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        self.live += 1
        far_writer: asyncio.StreamWriter | None = None
        try:
            far_reader, far_writer = await asyncio.open_connection(self.host, self.target_port, limit=CHUNK_BYTES)
            pumps = [
                asyncio.create_task(self._pump(reader, far_writer, up=True)),
                asyncio.create_task(self._pump(far_reader, writer, up=False)),
            ]
            try:
                await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for pump in pumps:
                    pump.cancel()
                await asyncio.gather(*pumps, return_exceptions=True)
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            if self._cutting:
                await asyncio.wait({self._cutting})
            self.live -= 1
            self._tasks.discard(task)
            for side in (writer, far_writer):
                if side:
                    side.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, up: bool) -> None:
        lost = False  # a packet that never arrives: TCP has no use for those behind it
        while data := await reader.read(CHUNK_BYTES):
            largest = self.largest_up if up else self.largest_down
            lost = lost or (largest is not None and len(data) > largest)
            dead = lost or (self.mute if up else self.deaf)
            self.swallowed += len(data) if self.hole or dead else 0
            while self.hole:  # noqa: ASYNC110  (the test sets a plain attribute)
                await asyncio.sleep(0.02)
            if up:
                self.bytes_up += len(data)
                if self.cut_after is not None and self.bytes_up >= self.cut_after:
                    self.cut_after = None
                    self.cuts += 1
                    if self.at_cut:
                        self._cutting = asyncio.create_task(self.at_cut())
                    return
            if self.bits_per_s:
                await asyncio.sleep(len(data) * 8 / self.bits_per_s)
            if not dead:
                writer.write(data)
                await writer.drain()
