"""A peer that receives, from end to end: embedded inbox or real sshd, the real checks behind it, signed receipts.

It can be killed and started again with the same files, as after a power cut.

async with receiving("sshd", tmp_path, blocks=6) as birch:
    birch.parcel, birch.data        # what ash has to deliver, and its bytes
    birch.part                      # where a part of it lies
    birch.arrived, birch.refused    # bytes that passed every check; codes of what did not
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
from federations import make_federation
from sshd import Sshd

from hsl_node.federation.config import PeerCard
from hsl_node.federation.identity import MANIFEST_NAMESPACE
from hsl_node.federation.keyring import Keyring
from hsl_node.federation.names import INBOX, PARTS, RECEIPTS, Digest, Kind, Peer
from hsl_node.host.layout import Layout
from hsl_node.sync.inbox.admission import Admission
from hsl_node.sync.inbox.receive import Arrival, Search, answer, scan
from hsl_node.sync.inbox.server import InboxServer
from hsl_node.sync.manifest import Manifest
from hsl_node.sync.send.deliver import Parcel
from hsl_node.sync.wire.transport import BLOCK_BYTES
from hsl_node.weights.checkpoint_file import schema_of, write_weights

ASH, BIRCH = Peer("ash"), Peer("birch")
MEMBERS = make_federation(2)
SERVERS = ("embedded", "sshd")
LOOK_S = 0.01  # between two looks into the inbox; only how soon a receipt comes depends on it


class Receiver:
    def __init__(self, kind: str, folder: Path, blocks: int) -> None:
        self.kind = kind
        self.homes = folder / "homes"
        self.port = 0
        self.silent = False  # True: takes nothing, answers nothing
        self.arrived: list[bytes] = []
        self.refused: list[str] = []
        self._layout = Layout(folder)
        self._server: InboxServer | None = None
        self._sshd: Sshd | None = None
        if kind == "sshd":
            accepts = MEMBERS.identities[ASH].public
            self._sshd = Sshd(folder / "sshd", accepts=accepts, home=self.homes / ASH)
        weights = {"w": np.random.default_rng(5).random(blocks * BLOCK_BYTES // 4 + 250, np.float32)}
        self._schema = schema_of(weights)
        path = folder / "outbox.safetensors"
        sha256 = write_weights(path, weights)
        self.data = path.read_bytes()
        manifest = Manifest(
            federation=MEMBERS.federation.digest,
            round=1,
            peer=ASH,
            sha256=sha256,
            bytes=len(self.data),
            base="0" * 64,
            inputs={},
            samples=10,
            score=None,
            said={},
            plateau=False,
            halted=False,
            anchor=None,
            schema=self._schema.digest,
            instance="test",
            software="test",
        )
        document = MEMBERS.identities[ASH].sign(manifest.content(), MANIFEST_NAMESPACE)
        self.parcel = Parcel(manifest.file_name().of(Kind.DATA), path, len(self.data), document)

    @property
    def part(self) -> Path:
        return self.homes / ASH / PARTS / str(self.parcel.name.as_part())

    def card(self, port: int) -> PeerCard:
        """The card of this peer behind a proxy at `port`."""
        update = {"address": f"127.0.0.1:{port}"}
        if self._sshd:
            update |= {"user": self._sshd.user, "host_key": self._sshd.host_key}
        return MEMBERS.federation.get(BIRCH).model_copy(update=update)

    async def start(self) -> None:
        if self._sshd:
            self._sshd.start()
            self.port = self._sshd.port
            return
        admission = Admission(
            federation=MEMBERS.federation,
            me=BIRCH,
            data_bytes=len(self.data),
            on_commit=lambda peer: None,
            on_connect=lambda peer: None,
        )
        self._server = InboxServer(admission, identity=MEMBERS.identities[BIRCH], homes=self.homes)
        self.port = await self._server.start("127.0.0.1", 0)

    async def kill(self) -> None:
        if self._sshd:
            self._sshd.kill()
        if self._server:
            await self._server.stop()
            self._server = None

    async def answer_for_ever(self) -> None:
        while True:
            if not self.silent:
                self._answer()
            await asyncio.sleep(LOOK_S)

    def _answer(self) -> None:
        search = Search(
            sender=ASH,
            me=BIRCH,
            homes=self.homes,
            layout=self._layout,
            federation=MEMBERS.federation,
            keyring=Keyring.of(MEMBERS.federation),
            current=1,
            schema=self._schema,
            anchor=None,
            foreign=self.kind == "sshd",
        )
        found = scan(search)
        for item in found:
            if isinstance(item, Arrival):
                assert item.data is not None
                self.arrived.append(item.data.read_bytes())
                item.data.unlink()
            else:
                self.refused.append(item.code)
            assert item.manifest is not None
            answer(
                ASH,
                item.manifest,
                homes=self.homes,
                me=BIRCH,
                identity=MEMBERS.identities[BIRCH],
                accepted=isinstance(item, Arrival),
                code="accepted" if isinstance(item, Arrival) else item.code,
                text="",
            )

    def answered(self) -> bool:
        """A receipt lies where the sender looks, and nothing else of the parcel is left."""
        home = self.homes / ASH
        left = [*(home / PARTS).iterdir(), *(home / INBOX).iterdir()]
        return not left and (home / RECEIPTS / str(self.parcel.name.of(Kind.RECEIPT))).exists()

    def holds_exactly_what_was_sent(self) -> bool:
        sha256 = Digest(hashlib.sha256(self.data).hexdigest())
        return self.arrived == [self.data] and self.parcel.name.sha256 == sha256


@asynccontextmanager
async def receiving(kind: str, folder: Path, *, blocks: int) -> AsyncIterator[Receiver]:
    receiver = Receiver(kind, folder, blocks)
    await receiver.start()
    daemon = asyncio.create_task(receiver.answer_for_ever())
    try:
        yield receiver
    finally:
        daemon.cancel()
        (ended,) = await asyncio.gather(daemon, return_exceptions=True)
        await receiver.kill()
    assert isinstance(ended, asyncio.CancelledError), ended
