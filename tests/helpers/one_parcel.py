"""One parcel, ash who pushes it, and birch who receives it: the real inbox server, real signed receipts."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from federations import make_federation
from hostile import until
from sender import Impatient

from hsl_node.federation.config import PeerCard
from hsl_node.federation.identity import MANIFEST_NAMESPACE, RECEIPT_NAMESPACE, Identity
from hsl_node.federation.names import Digest, FileName, Kind, Peer
from hsl_node.sync.inbox.admission import Admission
from hsl_node.sync.inbox.receive import answer
from hsl_node.sync.inbox.server import InboxServer
from hsl_node.sync.manifest import Manifest, Receipt
from hsl_node.sync.send.deliver import Known, Parcel, Transfer, deliver
from hsl_node.sync.send.push import push
from hsl_node.sync.send.receipts import Answer
from hsl_node.sync.wire.connect import connect
from hsl_node.sync.wire.login import RefusedKey
from hsl_node.sync.wire.transport import BLOCK_BYTES, Client

ME, PEER = Peer("ash"), Peer("birch")
MEMBERS = make_federation(2)
BLOCKS = 12
SIZE = BLOCKS * BLOCK_BYTES + 1000
SOON = 1024 * 1024  # bytes; what may be sent twice after a broken link, with all overhead
CLIENTS: tuple[Client, ...] = ("asyncssh", "paramiko")


def content(seed: int = 1, size: int = SIZE) -> bytes:
    return random.Random(seed).randbytes(size)


def parcel_of(folder: Path, data: bytes) -> tuple[Parcel, Manifest]:
    sha256 = hashlib.sha256(data).hexdigest()
    manifest = Manifest(
        federation=MEMBERS.federation.digest,
        round=1,
        peer=ME,
        sha256=sha256,
        bytes=len(data),
        base="0" * 64,
        inputs={},
        samples=10,
        score=None,
        said={},
        plateau=False,
        halted=False,
        anchor=None,
        schema="1" * 64,
        instance="test",
        software="test",
    )
    path = folder / "outbox"
    path.write_bytes(data)
    name = FileName(MEMBERS.federation.fed8, 1, ME, Digest(sha256), Kind.DATA)
    document = MEMBERS.identities[ME].sign(manifest.content(), MANIFEST_NAMESPACE)
    return Parcel(name, path, len(data), document), manifest


@dataclass
class Receiver:
    """A peer: the real inbox server, real signed receipts, and as much of a node as the sender can notice."""

    folder: Path
    manifest: Manifest
    name: FileName
    port: int = 0
    verdict: Callable[[bytes], tuple[bool, str] | None] | None = None  # data -> (accepted, code); None: no answer yet
    claims: bool = True
    took: list[bytes] = field(default_factory=list)

    @property
    def home(self) -> Path:
        return self.folder / "homes" / ME

    def path(self, folder: str, kind: Kind = Kind.DATA) -> Path:
        name = self.name.of(kind)
        return self.home / folder / str(name.as_part() if folder == "parts" else name)

    def card(self, port: int | None = None) -> PeerCard:
        return MEMBERS.federation.get(PEER).model_copy(update={"address": f"127.0.0.1:{port or self.port}"})

    def committed(self, peer: Peer) -> None:
        """Take the data, judge it, answer, as a node does."""
        if not self.claims:
            return
        if self.path("inbox").exists():
            self.took.append(self.path("inbox").read_bytes())
            self.path("inbox").unlink()
        found = hashlib.sha256(self.took[-1]).hexdigest() == self.manifest.sha256 if self.took else True
        judge = self.verdict or (lambda data: (found, "accepted" if found else "sha256"))
        verdict = judge(self.took[-1] if self.took else b"")
        if verdict is not None:
            self.answer(*verdict)

    def answer(self, accepted: bool, code: str) -> None:
        answer(
            ME,
            self.manifest,
            homes=self.folder / "homes",
            me=PEER,
            identity=MEMBERS.identities[PEER],
            accepted=accepted,
            code=code,
            text="told by the test",
        )

    def put_receipt(self, signer: Identity | None = None, **changes: Any) -> None:
        fields: dict[str, Any] = {
            "federation": MEMBERS.federation.digest,
            "round": 1,
            "peer": ME,
            "sha256": self.manifest.sha256,
            "receiver": PEER,
            "accepted": True,
            "code": "accepted",
            "text": "",
        }
        receipt = Receipt.model_construct(**(fields | changes))  # also one that our own code would not make
        signed = (signer or MEMBERS.identities[PEER]).sign(receipt.content(), RECEIPT_NAMESPACE)
        self.path("receipts", Kind.RECEIPT).write_bytes(signed)


@asynccontextmanager
async def receiving(folder: Path, parcel: Parcel, manifest: Manifest) -> AsyncIterator[Receiver]:
    receiver = Receiver(folder, manifest, parcel.name)
    admission = Admission(
        federation=MEMBERS.federation,
        me=PEER,
        data_bytes=manifest.bytes or SIZE,
        on_commit=lambda peer: receiver.committed(peer),
        on_connect=lambda peer: None,
    )
    server = InboxServer(admission, identity=MEMBERS.identities[PEER], homes=folder / "homes")
    receiver.port = await server.start("127.0.0.1", 0)
    try:
        yield receiver
    finally:
        await server.stop()


def run(folder: Path, scenario: Callable[[Receiver, Parcel], Any], data: bytes = content()) -> None:
    async def main() -> None:
        parcel, manifest = parcel_of(folder, data)
        async with receiving(folder, parcel, manifest) as receiver:
            await scenario(receiver, parcel)

    asyncio.run(main())


async def attempt(
    receiver: Receiver, parcel: Parcel, transfer: Transfer, known: Known, *, port: int | None = None, client: Client
) -> Receipt:
    card = receiver.card(port)
    async with connect(card, ME, MEMBERS.identities[ME], client=client) as link:
        return await deliver(link, parcel, card=card, federation=MEMBERS.federation, transfer=transfer, known=known)


def pushing(receiver: Receiver, parcel: Parcel, transfer: Transfer, **options: Any) -> asyncio.Task[Receipt]:
    settings: dict[str, Any] = {
        "me": ME,
        "identity": MEMBERS.identities[ME],
        "federation": MEMBERS.federation,
        "client": "asyncssh",
        "transfer": transfer,
        "wake": asyncio.Event(),
        "refused": RefusedKey(PEER, Impatient()),
        "rng": Impatient(),
    }
    port = options.pop("port", None)
    return asyncio.create_task(push(receiver.card(port), parcel, **(settings | options)))


class Patient(random.Random):
    """Draws the longest wait."""

    def uniform(self, a: float, b: float) -> float:
        return b


Looks = list[Answer | None]


async def in_vain(looks: Looks, count: int) -> None:
    """So many more looks from their beginning on, and no receipt that counts."""
    before = len(looks)
    await until(lambda: len(looks) > before + count)  # one may be under way already
    assert not any(looks)
