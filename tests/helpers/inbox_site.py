"""ash receives from birch, in a plain folder as any SFTP server would leave it (`foreign`) and in our own."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from federations import Members, make_federation
from weights import weights

from hsl_node.federation.identity import MANIFEST_NAMESPACE
from hsl_node.federation.keyring import Keyring
from hsl_node.federation.names import FileName, Kind, Peer
from hsl_node.host.layout import Layout
from hsl_node.sync.inbox import receive
from hsl_node.sync.inbox.receive import Arrival, Refusal
from hsl_node.sync.manifest import Manifest
from hsl_node.weights.checkpoint_file import Schema, schema_of, write_weights

ASH, BIRCH, CEDAR = Peer("ash"), Peer("birch"), Peer("cedar")
ROUND = 3


@dataclass
class Site:
    """ash's folders, and birch's hands in one of them."""

    root: Path
    members: Members
    schema: Schema
    foreign: bool

    @property
    def homes(self) -> Path:
        return self.root / "quarantine/homes"

    @property
    def claimed(self) -> Path:
        return self.root / "quarantine/claimed"

    @property
    def inbox(self) -> Path:
        return self.homes / BIRCH / "inbox"

    def manifest(self, data: bytes, **changes: Any) -> Manifest:
        content: dict[str, Any] = {
            "federation": self.members.federation.digest,
            "round": ROUND,
            "peer": "birch",
            "sha256": hashlib.sha256(data).hexdigest(),
            "bytes": len(data),
            "base": "b" * 64,
            "inputs": {p: "c" * 64 for p in self.members.peers},
            "samples": 10,
            "score": 0.5,
            "said": {},
            "plateau": False,
            "halted": False,
            "anchor": None,
            "schema": self.schema.digest,
            "instance": "i",
            "software": "hsl-node 0.1",
        }
        return Manifest.model_validate(content | changes)

    def sign(self, manifest: Manifest, signer: Peer = BIRCH, namespace: str = MANIFEST_NAMESPACE) -> bytes:
        return self.members.identities[signer].sign(manifest.content(), namespace)

    def good_data(self, value: float = 1.0) -> bytes:
        path = self.root / "made.safetensors"
        write_weights(path, weights(value))
        return path.read_bytes()

    def deliver(self, data: bytes | None, manifest: Manifest, document: bytes | None = None) -> FileName:
        name = manifest.file_name()
        if data is not None:
            (self.inbox / str(name.of(Kind.DATA))).write_bytes(data)
        (self.inbox / str(name)).write_bytes(document if document is not None else self.sign(manifest))
        return name

    def scan(self, **options: Any) -> list[Arrival | Refusal]:
        arguments: dict[str, Any] = {
            "sender": BIRCH,
            "keyring": Keyring.of(self.members.federation),
            "homes": self.homes,
            "layout": Layout(self.root),
            "federation": self.members.federation,
            "current": ROUND,
            "schema": self.schema,
            "anchor": None,
            "me": ASH,
            "foreign": self.foreign,
        }
        return receive.scan(receive.Search(**(arguments | options)))

    def answer(self, manifest: Manifest, *, accepted: bool = True, code: str = "accepted", text: str = "") -> None:
        receive.answer(
            BIRCH, manifest, homes=self.homes, me=ASH, identity=self.members.identities[ASH],
            accepted=accepted, code=code, text=text,
        )  # fmt: skip

    def honest(self) -> None:
        """birch delivers as it should, and that is all there is afterwards."""
        data = self.good_data(2.0)
        manifest = self.manifest(data)
        self.deliver(data, manifest)
        (arrival,) = self.scan()
        assert isinstance(arrival, Arrival) and arrival.data is not None
        assert arrival.data.read_bytes() == data and arrival.manifest == manifest
        arrival.data.unlink()
        self.answer(manifest)
        assert not list(self.inbox.iterdir()) and not list((self.claimed / BIRCH).iterdir())


def make_site(folder: Path, kind: str) -> Site:
    """`kind`: "embedded" or "foreign"."""
    site = Site(folder, make_federation(3), schema_of(weights()), kind == "foreign")
    for name in ("parts", "inbox", "receipts"):
        (site.homes / BIRCH / name).mkdir(parents=True)
    return site


def flipped(site: Site, data: bytes) -> bytes:
    return data[:-9] + b"\x55" + data[-8:]
