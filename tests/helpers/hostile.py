"""Hostile peers and servers: both ends of the protocol, misbehaving.

cedar = Hostile(Peer("cedar"), identity, federation, port, host_key)      # the owner of one peer's key
async with cedar.sftp() as client:                                        # at another peer's inbox
    await cedar.deliver(cedar.manifest(genuine, samples=10**12), data)    # signed, whatever it says

async with lying(Half, host.key, folder) as server:                       # a `Folder` that overrides one operation
    server.port, server.fired                                             # with a lie
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncssh

from hsl_node.federation.canonical import canonical_json
from hsl_node.federation.config import Federation
from hsl_node.federation.identity import MANIFEST_NAMESPACE, RECEIPT_NAMESPACE, Identity, verify
from hsl_node.federation.names import Digest, FileName, Kind, Peer
from hsl_node.sync.manifest import Receipt, content_digest, parse_receipt

# ---------------------------------------------------------------- a client


def log_in(port: int, user: str, key: asyncssh.SSHKey, host_key: asyncssh.SSHKey, **options: Any) -> Any:
    """What an honest peer says at an inbox on this machine; `options` change it."""
    arguments: dict[str, Any] = {
        "username": user,
        "client_keys": [key],
        "known_hosts": ([host_key], [], []),
        "config": None,
        "agent_path": None,
        "password": None,
        "preferred_auth": "publickey",
        "encryption_algs": ["aes128-gcm@openssh.com"],
    }
    return asyncssh.connect("127.0.0.1", port, **(arguments | options))


async def put(client: asyncssh.SFTPClient, name: FileName, content: bytes) -> None:
    """A file into inbox/, as an honest sender brings it."""
    async with client.open(f"parts/{name.as_part()}", "xb") as file:
        await file.write(content)
        await file.fsync()
    await client.rename(f"parts/{name.as_part()}", f"inbox/{name}")


@dataclass(frozen=True)
class Signed:
    """A manifest with a true signature under whatever it says; not one that our own code would make."""

    content: Mapping[str, Any]
    document: bytes
    name: FileName

    @property
    def digest(self) -> Digest:
        return content_digest(self.content)


@dataclass(frozen=True)
class Hostile:
    """The owner of one peer's key, at the inbox of another."""

    name: Peer
    identity: Identity
    federation: Federation
    port: int
    host_key: asyncssh.SSHKey  # of the victim, public

    def connect(self, user: str | None = None, key: asyncssh.SSHKey | None = None, **options: Any) -> Any:
        return log_in(self.port, user or self.name, key or self.identity.key, self.host_key, **options)

    @asynccontextmanager
    async def sftp(self) -> AsyncIterator[asyncssh.SFTPClient]:
        async with self.connect() as connection, connection.start_sftp_client() as client:
            yield client

    def manifest(self, genuine: Mapping[str, Any], signer: Identity | None = None, **changes: Any) -> Signed:
        content = {**genuine, **changes}
        line = canonical_json(content) + b"\n"
        key = (signer or self.identity).key
        document = line + asyncssh.create_sshsig(key, line, namespace=MANIFEST_NAMESPACE)
        name = FileName(self.federation.fed8, genuine["round"], self.name, Digest(content["sha256"]), Kind.MANIFEST)
        return Signed(content, document, name)

    def about(self, data: bytes, genuine: Mapping[str, Any], **changes: Any) -> Signed:
        """A manifest that names these bytes truthfully, whatever they are."""
        return self.manifest(genuine, sha256=hashlib.sha256(data).hexdigest(), bytes=len(data), **changes)

    async def deliver(self, manifest: Signed, data: bytes | None) -> None:
        async with self.sftp() as client:
            if data is not None:
                await put(client, manifest.name.of(Kind.DATA), data)
            await put(client, manifest.name, manifest.document)

    async def receipt(self, manifest: Signed, verifier: str) -> Receipt:
        """The victim's signed answer; waits for it. `verifier`: the victim's public key."""
        path = f"receipts/{manifest.name.of(Kind.RECEIPT)}"
        async with self.sftp() as client:
            while True:
                try:
                    async with client.open(path, "rb") as file:
                        return parse_receipt(verify(bytes(await file.read()), verifier, RECEIPT_NAMESPACE))
                except asyncssh.SFTPNoSuchFile:
                    await asyncio.sleep(0.02)


# ---------------------------------------------------------------- a server


class AnyKey(asyncssh.SSHServer):
    """Lets everybody in."""

    def begin_auth(self, username: str) -> bool:
        return True

    def public_key_auth_supported(self) -> bool:
        return True

    def validate_public_key(self, username: str, key: asyncssh.SSHKey) -> bool:
        return True


class Folder(asyncssh.SFTPServer):
    """A plain, honest SFTP server over one folder. A lie overrides one method; `fired` counts how often it was told."""

    root: Path
    port = 0
    fired = 0

    def __init__(self, channel: asyncssh.SSHServerChannel[bytes]) -> None:
        super().__init__(channel, chroot=str(self.root).encode())

    @classmethod
    def lie(cls) -> None:
        cls.fired += 1


@asynccontextmanager
async def lying(folder: type[Folder], key: asyncssh.SSHKey, root: Path, **options: Any) -> AsyncIterator[type[Folder]]:
    """A server that shows `root` through a class of its own, made of `folder`, under the host key `key`."""
    served = type(folder.__name__, (folder,), {"root": root})
    settings: dict[str, Any] = {"server_factory": AnyKey, "server_host_keys": [key], "sftp_factory": served}
    server = await asyncssh.listen("127.0.0.1", 0, config=None, **(settings | options))
    served.port = server.get_port()
    try:
        yield served
    finally:
        server.close()
        await server.wait_closed()


async def until(condition: Callable[[], object]) -> None:
    """What never comes runs into the test's time limit."""
    while not condition():  # noqa: ASYNC110  (nothing tells us)
        await asyncio.sleep(0.01)
