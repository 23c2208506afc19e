"""A server of each kind, which every client can talk to: our own inbox, and OpenSSH's sshd."""

from __future__ import annotations

import hashlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from federations import make_federation
from sshd import REQUESTS, Sshd

from hsl_node.federation.config import PeerCard
from hsl_node.federation.identity import Identity
from hsl_node.federation.names import Digest, FileName, Kind, Peer
from hsl_node.sync.inbox.admission import Admission
from hsl_node.sync.inbox.server import InboxServer
from hsl_node.sync.wire.transport import BLOCK_BYTES, Patience, Transport

ME, PEER = Peer("ash"), Peer("birch")
MEMBERS = make_federation(2)
SIZE = 3 * BLOCK_BYTES + 1000
HURRIED = Patience(answer_s=1, slowest_bytes_per_s=1024**2, keepalive_s=1000)


@dataclass
class Inbox:
    """A running server, and where its files really lie."""

    card: PeerCard
    home: Path
    port: int

    @property
    def identity(self) -> Identity:
        return MEMBERS.identities[ME]

    def via(self, port: int) -> PeerCard:
        return self.card.model_copy(update={"address": f"127.0.0.1:{port}"})


@asynccontextmanager
async def serve(server: str, folder: Path, *, size: int = SIZE, requests: str = REQUESTS) -> AsyncIterator[Inbox]:
    card = MEMBERS.federation.get(PEER)
    if server == "sshd":
        with Sshd(folder / "sshd", accepts=MEMBERS.identities[ME].public, requests=requests) as sshd:
            update = {"address": f"127.0.0.1:{sshd.port}", "user": sshd.user, "host_key": sshd.host_key}
            yield Inbox(card.model_copy(update=update), sshd.home, sshd.port)
        return
    admission = Admission(
        federation=MEMBERS.federation,
        me=PEER,
        data_bytes=size,
        on_commit=lambda peer: None,
        on_connect=lambda peer: None,
    )
    inbox = InboxServer(admission, identity=MEMBERS.identities[PEER], homes=folder / "homes")
    port = await inbox.start("127.0.0.1", 0)
    try:
        yield Inbox(card.model_copy(update={"address": f"127.0.0.1:{port}"}), folder / "homes" / ME, port)
    finally:
        await inbox.stop()


Scenario = Callable[[Transport, Inbox], Awaitable[None]]


def ignore(end: int) -> None:
    pass


def content(size: int = SIZE, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


def names(seed: int = 1) -> tuple[str, str]:
    """(part, final) of one checkpoint."""
    sha256 = Digest(hashlib.sha256(bytes([seed])).hexdigest())
    name = FileName(MEMBERS.federation.fed8, 1, ME, sha256, Kind.DATA)
    return f"parts/{name.as_part()}", f"inbox/{name}"


PART, FINAL = names()
