"""A peer that is asked, before a node signs, for signatures that the node's journal does not know.

The peer is the test, behind a real inbox server; of the daemon there is what asks.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from pathlib import Path

from federations import Members
from memory_file import in_memory
from parts import Parts

from hsl_node.federation.identity import MANIFEST_NAMESPACE, OFFER_NAMESPACE
from hsl_node.federation.names import Digest, Peer
from hsl_node.node.before_signing import BeforeSigning
from hsl_node.sync.inbox.admission import Admission
from hsl_node.sync.inbox.server import InboxServer
from hsl_node.sync.manifest import Manifest
from hsl_node.sync.offer import Listed, Offer

ME, BIRCH = Peer("ash"), Peer("birch")


class Site:
    """ash was set back to round 4; birch lists ash's manifest of round 7. What it does with `document` is `answer`."""

    def __init__(self, members: Members, port: int, folder: Path) -> None:
        self.members, self.port, self.reads = members, port, 0
        self.document = members.identities[ME].sign(manifest(members, 7).content(), MANIFEST_NAMESPACE)
        self.shown: bytes | None = self.document  # None: it lists it and cannot open it
        self.listing = True
        self.more: list[str] = []  # digests of documents that are listed as well, and are not there
        self.folder = folder
        self.parts = Parts(members, folder / ME, ME)
        self.journal, self.alarms = self.parts.store.journal, self.parts.alarms
        self.journal.record_signed(4, Digest("a" * 64), b"document")

    def offer(self, asker: Peer, name: str, twice: bool) -> int:
        if len(name) == 64:
            self.reads += 1
            if name in self.more:
                return in_memory(b"rubbish")
            if self.shown is None:
                raise FileNotFoundError("not on the list")
            return in_memory(self.shown)
        documents = [*self.more, hashlib.sha256(self.document).hexdigest()] if self.listing else []
        listed = [Listed(peer=ME, round=7, sha256="7" * 64, document=document) for document in documents]
        content = Offer(
            federation=self.members.federation.digest, peer=BIRCH, asker=asker, nonce=name, recovering=False, round=7,
            phase="collect", twice=False, manifests=listed, files=[],
        ).content()  # fmt: skip
        return in_memory(self.members.identities[BIRCH].sign(content, OFFER_NAMESPACE))

    async def start(self) -> None:
        admission = Admission(
            federation=self.members.federation, me=BIRCH, data_bytes=1000,
            on_commit=lambda peer: None, on_connect=lambda peer: None, offer=self.offer,
        )  # fmt: skip
        self.server = InboxServer(admission, identity=self.members.identities[BIRCH], homes=self.folder / "homes")
        await self.server.start("127.0.0.1", self.port)

    async def __aenter__(self) -> Site:
        await self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.server.stop()
        self.parts.close()

    def before_signing(self) -> Counting:
        return Counting(*self.parts.all)


class Counting(BeforeSigning):
    asked = 0

    async def _answer_of(self, peer: Peer) -> Offer:
        self.asked += 1
        return await super()._answer_of(peer)


def manifest(members: Members, round: int) -> Manifest:
    return Manifest(
        federation=members.federation.digest, round=round, peer=ME, sha256="7" * 64, bytes=1000, base="b" * 64,
        inputs={ME: "c" * 64, BIRCH: "d" * 64}, samples=10, score=0.5, said={}, plateau=False, halted=False,
        anchor=None, schema="e" * 64, instance="f" * 16, software="test",
    )  # fmt: skip


def run(story: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(120):
            await story()

    asyncio.run(main())
