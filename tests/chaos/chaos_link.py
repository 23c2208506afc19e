"""The sending end of a simulated connection: the daemon's `Transport` interface over a `chaos_net.Wire`."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import asyncssh
from asyncssh.constants import FXF_CREAT, FXF_EXCL, FXF_READ, FXF_WRITE
from chaos_net import ASK_BYTES, REFUSED, Net, Wire

from hsl_node.errors import TransportError
from hsl_node.federation.config import PeerCard
from hsl_node.federation.identity import Identity
from hsl_node.federation.names import Peer
from hsl_node.sync.inbox.requests import InboxFS
from hsl_node.sync.wire import transport
from hsl_node.sync.wire.transport import Login, Patience, Source


class Connected:
    """In place of `transport.connect`."""

    def __init__(
        self,
        net: Net,
        card: PeerCard,
        me: Peer,
        identity: Identity,
        *,
        client: str = "",
        patience: Patience = Patience(),
        host_keys: Sequence[str] | None = None,
        toll: object = None,
    ) -> None:
        self.net = net
        self._login = Login.of(card, me, host_keys)
        self.patience = patience
        self._wire = Wire(net, me, card, identity, patience, self._login)

    async def __aenter__(self) -> Connected:
        try:
            await self._wire.connect()
        except BaseException:
            self._wire.leave()
            raise
        return self

    async def __aexit__(self, *error: object) -> None:
        self._wire.leave()

    def alive(self) -> bool:
        return False  # a connection for each question here: the more there are, the more meets a fault

    async def _ask(self, what: str, seconds: float, work: Callable[[InboxFS], Any], **sizes: int) -> Any:
        try:
            return await self._wire.ask(what, seconds, work, **sizes)
        except REFUSED as exc:
            raise self._login.failed(what, exc) from exc

    async def size(self, path: str) -> int | None:
        try:
            found = await self._wire.ask("size", self.patience.answer_s, lambda fs: fs.stat(path.encode()))
        except (FileNotFoundError, asyncssh.SFTPNoSuchFile):
            return None
        except REFUSED as exc:
            raise self._login.failed("size", exc) from exc
        return int(found.size)

    async def read(self, path: str, offset: int, count: int) -> bytes:
        answer_s = self.patience.answer_s
        file = await self._ask("open", answer_s, lambda fs: fs.open(path.encode(), FXF_READ, asyncssh.SFTPAttrs()))
        try:
            return bytes(
                await self._ask("read", self.patience.for_bytes(count), lambda fs: fs.read(file, offset, count))
            )
        finally:
            with suppress(TransportError):
                await self._ask("close", answer_s, lambda fs: fs.close(file))

    async def write(
        self, path: str, source: Path | bytes, offset: int, *, create: bool, progress: Callable[[int], None]
    ) -> None:
        if isinstance(source, bytes):
            self._note(path, source)
        patience, flags = self.patience, FXF_WRITE | (FXF_CREAT | FXF_EXCL if create else 0)
        content = await asyncio.to_thread(Source, source)
        try:
            file = await self._ask(
                "open", patience.answer_s, lambda fs: fs.open(path.encode(), flags, asyncssh.SFTPAttrs())
            )
            for start in range(offset, content.size, transport.BLOCK_BYTES * transport.READ_AHEAD_BLOCKS):
                at = start
                for block in await asyncio.to_thread(content.read, start):
                    await self._ask(
                        "sending",
                        patience.for_bytes(len(block)),
                        lambda fs, at=at, block=block: fs.write(file, at, block),
                        up=len(block) + ASK_BYTES,
                    )
                    at += len(block)
                    progress(at)
            await self._ask("fsync", patience.for_disk(content.size), lambda fs: fs.fsync(file))
            await self._ask("close", patience.answer_s, lambda fs: fs.close(file))
        finally:
            content.close()

    async def rename(self, old: str, new: str) -> None:
        await self._ask("rename", self.patience.answer_s, lambda fs: fs.rename(old.encode(), new.encode()))

    async def remove(self, path: str) -> None:
        await self._ask("remove", self.patience.answer_s, lambda fs: fs.remove(path.encode()))

    def _note(self, path: str, document: bytes) -> None:
        """A manifest leaves its signer: two of one round are what must never be."""
        round = int(path.partition("_r")[2][:6]) if "_r" in path else -1
        line = hashlib.sha256(document.partition(b"\n")[0]).hexdigest()
        self.net.published.setdefault((self._wire.me, round), set()).add(line)
