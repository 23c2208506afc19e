"""A node that lost its state, and its peers, each behind a real SFTP server with a list that the test made.

Of the daemon there is what asks.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncssh
from federations import Members
from hostile import AnyKey
from parts import Parts

from hsl_node.federation.identity import MANIFEST_NAMESPACE, OFFER_NAMESPACE, Identity
from hsl_node.federation.keyring import Keyring
from hsl_node.federation.names import Digest, Peer
from hsl_node.node.heal.mark import Mark
from hsl_node.node.heal.recovery import Recovery
from hsl_node.node.peers.fetch import Fetch
from hsl_node.sync.manifest import Manifest
from hsl_node.sync.offer import Listed, Offer

ME, BIRCH, CEDAR = Peer("ash"), Peer("birch"), Peer("cedar")
CUT = b"cut the link here"


class Giver:
    """A peer's inbox, of which only offer/ is read: lists what it is told to, and gives it, or not."""

    def __init__(self, members: Members, name: Peer, round: int) -> None:
        self.members, self.name, self.round = members, name, round
        self.listed: list[Listed] = []
        self.documents: dict[str, bytes] = {}

    def list(self, manifest: Manifest, document: bytes, gives: bytes | None = b"") -> None:
        """`gives`: something else instead of the document; None: nothing."""
        sha256 = hashlib.sha256(document).hexdigest()
        self.listed.append(Listed(peer=manifest.peer, round=manifest.round, sha256=manifest.sha256, document=sha256))
        if gives is not None:
            self.documents[sha256] = gives or document

    def offer(self, nonce: str = "0" * 16) -> Offer:
        return Offer(
            federation=self.members.federation.digest, peer=self.name, asker=ME, nonce=nonce, recovering=False,
            round=self.round, phase="collect", twice=False, manifests=self.listed, files=[],
        )  # fmt: skip

    def read(self, name: str, connection: asyncssh.SSHServerConnection) -> bytes:
        if name.endswith(".state"):
            return self.members.identities[self.name].sign(self.offer(name[:16]).content(), OFFER_NAMESPACE)
        content = self.documents.get(name)
        if content is None:
            raise asyncssh.SFTPNoSuchFile("not on the list")
        if content == CUT:
            connection.abort()
        return content

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        giver = self

        class Files(asyncssh.SFTPServer):
            def open(self, path: bytes, pflags: int, attrs: asyncssh.SFTPAttrs) -> object:
                return [giver.read(path.decode().rpartition("/")[2], self.channel.get_connection())]

            def read(self, file: Any, offset: int, size: int) -> bytes:
                return bytes(file[0][offset : offset + size])

            def close(self, file: object) -> None: ...

        port = int(self.members.federation.get(self.name).address.rpartition(":")[2])
        key = self.members.identities[self.name].key
        server = await asyncssh.listen(
            "127.0.0.1", port, server_factory=AnyKey, server_host_keys=[key], sftp_factory=Files, config=None
        )
        try:
            yield
        finally:
            server.close()
            await server.wait_closed()


class Site:
    """ash has lost its state; birch and cedar are in round 4."""

    def __init__(self, members: Members, folder: Path, keyring: Keyring) -> None:
        self.members = members
        self.givers = {p: Giver(members, p, 4) for p in (BIRCH, CEDAR)}
        self.parts = parts = Parts(members, folder, ME, keyring)
        self.here, self.alarms = parts.here, parts.alarms
        self.journal, self.evidence = parts.here.journal, parts.here.layout.state / "evidence"
        self.fetch = Fetch(parts.here, parts.alarms, parts.links, 1000)
        self.recovery = Recovery(*parts.all, self.fetch, Mark("its disk was lost"))
        for peer in self.givers:
            self.recovery.waiting.go_on(peer)  # has answered
        self.alarms.settle("recovering")

    def manifest(self, peer: Peer, round: int, inputs: Mapping[str, str] = {}, samples: int = 10) -> Manifest:
        return Manifest(
            federation=self.members.federation.digest, round=round, peer=peer, sha256=f"{round:064}", bytes=1000,
            base="b" * 64, inputs=dict(inputs), samples=samples, score=0.5, said={}, plateau=False, halted=False,
            anchor=None, schema="e" * 64, instance="f" * 16, software="test",
        )  # fmt: skip

    async def asked(self) -> Mapping[str, Any]:
        offers = {str(p): g.offer() for p, g in self.givers.items()}
        async with self.givers[BIRCH].serving(), self.givers[CEDAR].serving():
            return await self.recovery._gather.manifests(offers)


def run(story: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(120):
            await story()

    asyncio.run(main())


def by(identity: Identity, manifest: Manifest) -> bytes:
    return identity.sign(manifest.content(), MANIFEST_NAMESPACE)


class Long:
    """A journal of 40 rounds, as of a backup: what ash, birch and cedar signed."""

    def __init__(self, site: Site) -> None:
        self.journal, self.held = site.journal, {}
        for round in range(1, 41):
            for peer in (ME, BIRCH, CEDAR):
                before = {p: self.held[p, round - 1][0].digest for p in (ME, BIRCH, CEDAR)} if round > 1 else {}
                manifest = site.manifest(peer, round, before)
                self.held[peer, round] = manifest, by(site.members.identities[peer], manifest)
        with self.journal.transaction():
            for manifest, document in self.held.values():
                self.record(manifest, document)

    def record(self, manifest: Manifest, document: bytes) -> None:
        peer = Peer(manifest.peer)
        self.journal.record_manifest(manifest.round, peer, manifest.sha256, document, manifest.content())
        if peer == ME:
            self.journal.record_signed(manifest.round, Digest(manifest.sha256), document)
