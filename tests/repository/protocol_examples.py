"""The examples of docs/protocol.md, made by the code with keys that anybody can make again (`make docs`).

In the page `<!-- example: NAME -->` stands before the block that holds what `examples()[NAME]` gives.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from functools import cache
from pathlib import Path

import asyncssh
import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from hsl_node.federation.config import AnchorCard, Federation, PeerCard
from hsl_node.federation.identity import (
    LIFE_NAMESPACE,
    MANIFEST_NAMESPACE,
    OFFER_NAMESPACE,
    RECEIPT_NAMESPACE,
    Identity,
)
from hsl_node.federation.keyring import Keyring, sign_update
from hsl_node.federation.names import Digest, Kind, Peer
from hsl_node.federation.plan import Plan
from hsl_node.sync.life import Life
from hsl_node.sync.manifest import Manifest, Receipt
from hsl_node.sync.offer import Listed, Offer
from hsl_node.weights.checkpoint_file import Schema, schema_of, write_weights

PAGE = Path(__file__).resolve().parents[2] / "docs" / "protocol.md"
WEIGHTS = {
    "head.bias": np.array([0.5, -0.5], dtype=np.float32),
    "head.weight": np.array([[1, 2, 3], [4, 5, 6]], dtype=np.float32),
    "norm.num_batches_tracked": np.array(7, dtype=np.int64),
}
_BLOCK = re.compile(r"(<!-- example: ([a-z ]+) -->\n```\n)(?:(?!```).*\n)*```\n")


def identity(name: str) -> Identity:
    """The ed25519 key whose seed is the sha256 of the name."""
    key = Ed25519PrivateKey.from_private_bytes(hashlib.sha256(name.encode()).digest())
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    return Identity(asyncssh.import_private_key(pem))


def federation() -> Federation:
    cards = [PeerCard(name=n, address=f"{n}.example.org:8922", key=identity(n).public) for n in ("ash", "birch")]
    anchor = AnchorCard(name="digits", fingerprint=_sha("anchor set"), images=1797, image_size=224)
    return Federation(name="the grove", anchor=anchor, plan=Plan(), peer=tuple(cards))


def manifest(sha256: Digest, schema: Schema) -> Manifest:
    """Ash's of round 2."""
    return Manifest(
        federation=federation().digest,
        round=2,
        peer="ash",
        sha256=sha256,
        bytes=schema.file_bytes,
        base=_sha("the fused model of round 1"),
        inputs={p: _sha(f"the manifest of {p}, round 1") for p in ("ash", "birch")},
        samples=412,
        score=0.8125,
        said={},
        plateau=False,
        halted=False,
        anchor=_sha("anchor set"),
        schema=schema.digest,
        instance="5b1f0a9c",
        software="hsl-node 0.1.0, torch 2.9.0",
    )


@cache
def examples() -> dict[str, str]:
    fed, ash, birch = federation(), identity("ash"), identity("birch")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint"
        sha256 = write_weights(path, WEIGHTS)
        data = path.read_bytes()
    schema = schema_of(WEIGHTS)
    claim = manifest(sha256, schema)
    document = ash.sign(claim.content(), MANIFEST_NAMESPACE)
    receipt = Receipt(
        federation=fed.digest, round=2, peer="ash", sha256=sha256, receiver="birch", accepted=True, code="accepted",
        text="",
    )  # fmt: skip
    listed = Listed(peer="ash", round=2, sha256=sha256, document=hashlib.sha256(document).hexdigest())
    offer = Offer(
        federation=fed.digest, peer="birch", asker="ash", nonce="00112233aabbccdd", recovering=False, round=2,
        phase="collect", twice=False, manifests=[listed], files=[sha256],
    )  # fmt: skip
    life = Life(federation=fed.digest, peer="birch", at=1_767_225_600, paused_s=None)
    files = [claim.file_name().of(kind) for kind in (Kind.DATA, Kind.MANIFEST, Kind.RECEIPT)]
    return {
        "federation": _wrapped(fed.agreed_json.decode()),
        "federation digest": fed.digest,
        "names": "\n".join(map(str, [files[0].as_part(), *files])),
        "header": _wrapped(schema.header[8:].decode().rstrip(" ")),
        "checkpoint": f"length   {schema.header[:8].hex()}   ({len(schema.header) - 8} bytes of header)\n"
        f"tensors  {data[len(schema.header) :].hex()}\n"
        f"file     {len(data)} bytes, sha256 {sha256}\n"
        f"schema   sha256 of length and header: {schema.digest}",
        "manifest": _shown(document),
        "manifest digest": claim.digest,
        "receipt": _shown(birch.sign(receipt.content(), RECEIPT_NAMESPACE)),
        "offer": _shown(birch.sign(offer.content(), OFFER_NAMESPACE)),
        "sign of life": _shown(birch.sign(life.content(), LIFE_NAMESPACE)),
        "key update": _shown(sign_update(Keyring.of(fed), Peer("ash"), ash, identity("ash 2").public).encode()),
    }


def render(page: str) -> str:
    """The page with its examples as they are now."""
    return _BLOCK.sub(lambda m: f"{m[1]}{examples()[m[2]]}\n```\n", page)


def shown(page: str) -> set[str]:
    return {m[2] for m in _BLOCK.finditer(page)}


def _sha(text: str) -> Digest:
    return Digest(hashlib.sha256(text.encode()).hexdigest())


def _shown(document: bytes) -> str:
    line, _, signature = document.decode("ascii").rstrip("\n").partition("\n")
    return f"{_wrapped(line)}\n{signature}"


def _wrapped(line: str, width: int = 118) -> str:
    """One line, broken where the page is too narrow; never beside a space, so that joining gives it back."""
    rows = []
    while len(line) > width:
        at = next(n for n in range(width, 0, -1) if " " not in line[n - 1 : n + 1])
        rows.append(line[:at])
        line = line[at:]
    return "\n".join([*rows, line])


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text()))
