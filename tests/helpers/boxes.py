"""A running inbox for tests, and ways to log in to it. ash receives, birch is hostile, cedar is honest."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import logging
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncssh
from federations import Members, make_federation
from hostile import log_in, put, until

from hsl_node.federation.names import Digest, FileName, Kind, Peer
from hsl_node.sync.inbox.admission import Admission
from hsl_node.sync.inbox.limits import Limits
from hsl_node.sync.inbox.server import InboxServer
from hsl_node.sync.store.room import Quota

__all__ = ["inbox", "on_loop", "put", "tree", "until"]

DATA_BYTES = 600 * 1024
DATA = random.Random(5).randbytes(DATA_BYTES)
SHA = Digest(hashlib.sha256(DATA).hexdigest())
ASH, BIRCH, CEDAR = Peer("ash"), Peer("birch"), Peer("cedar")


def on_loop(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        asyncio.run(asyncio.wait_for(test(*args, **kwargs), 60))

    return run


class Counted:
    """What an inbox told of strangers and peers, also beyond its budget of log lines."""

    def __init__(self, admission: Admission) -> None:
        self.rejected: Counter[tuple[str, str]] = Counter()  # (peer, code)
        self._events: Counter[str] = Counter()
        self._admission, self._note = admission, admission.note
        admission.note = self._count  # type: ignore[method-assign]

    def _count(self, who: str, event: str, level: int = logging.WARNING, **fields: Any) -> None:
        self._events[event] += 1
        if event == "request refused":
            self.rejected[who, fields["code"]] += 1
        self._note(who, event, level, **fields)

    @property
    def evicted(self) -> int:
        return self._events["unauthenticated connection closed to make room"]

    @property
    def flooded(self) -> int:
        return self._events["unauthenticated connection cut: it sends too much"]

    @property
    def auth_failures(self) -> int:
        return self._events["login refused"]

    @property
    def unauthenticated(self) -> int:
        return sum(link.peer is None for link in self._admission.links)


@dataclass
class Box:
    """A running inbox and how to log in to it."""

    server: InboxServer
    port: int
    members: Members
    homes: Path
    commits: list[Peer] = field(default_factory=list)
    connects: list[Peer] = field(default_factory=list)
    counted: Counted = field(init=False)

    def connect(self, user: Peer = BIRCH, key: asyncssh.SSHKey | None = None, **options: Any) -> Any:
        host_key = self.members.identities[ASH].key.convert_to_public()
        return log_in(self.port, user, key or self.members.identities[user].key, host_key, **options)

    @asynccontextmanager
    async def sftp(self, user: Peer = BIRCH) -> AsyncIterator[asyncssh.SFTPClient]:
        async with self.connect(user) as connection, connection.start_sftp_client() as client:
            yield client

    @property
    def admission(self) -> Admission:
        return self.server.admission

    def name(self, peer: Peer = BIRCH, round: int = 1, sha256: str = SHA, kind: Kind = Kind.DATA) -> FileName:
        return FileName(self.members.federation.fed8, round, peer, Digest(sha256), kind)

    async def honest(self) -> None:
        """cedar delivers a checkpoint and a manifest, as on any other day; then its inbox is emptied again.

        As a push does, it comes again where the lot fell on it among strangers, before its login.
        """
        before, name, done = self.commits.count(CEDAR), self.name(CEDAR), False
        while not done:
            with suppress(ConnectionError, asyncssh.ConnectionLost):
                async with self.sftp(CEDAR) as client:
                    for each, content in ((name, DATA), (name.of(Kind.MANIFEST), b"signed")):
                        await put(client, each, content)
                done = True
        assert self.commits.count(CEDAR) == before + 1
        assert self.delivered(CEDAR) == SHA
        for each in (name, name.of(Kind.MANIFEST)):
            (self.homes / CEDAR / "inbox" / str(each)).unlink()

    def delivered(self, peer: Peer = BIRCH) -> str:
        """sha256 of the checkpoint in its inbox/."""
        return hashlib.sha256((self.homes / peer / "inbox" / str(self.name(peer))).read_bytes()).hexdigest()

    def rejected(self, code: str) -> int:
        return self.counted.rejected[BIRCH, code]


@asynccontextmanager
async def inbox(
    tmp_path: Path,
    *,
    addresses: Mapping[str, str] = {},
    lot: random.Random = random.SystemRandom(),
    host: str = "127.0.0.1",
    **limits: Any,
) -> AsyncIterator[Box]:
    """`addresses`: of the federation file. `lot` draws who makes room."""
    members = make_federation(3, addresses=addresses)
    homes = tmp_path / "homes"
    tmp_path.mkdir(exist_ok=True)
    box = Box(None, 0, members, homes)  # type: ignore[arg-type]
    limits.setdefault("quota", Quota(reserve_bytes=0))
    admission = Admission(
        federation=members.federation,
        me=ASH,
        data_bytes=DATA_BYTES,
        on_commit=box.commits.append,
        on_connect=box.connects.append,
        limits=Limits(**limits),
        lot=lot,
    )
    box.counted = Counted(admission)
    box.server = InboxServer(admission, identity=members.identities[ASH], homes=homes)
    box.port = await box.server.start(host, 0)
    try:
        yield box
    finally:
        await box.server.stop()


def tree(folder: Path) -> dict[str, tuple[int, int, float]]:
    """Every path below `folder` with mode, size and time: what an attack must not change."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        found[str(path)] = (status.st_mode, status.st_size, status.st_mtime)
    return found
