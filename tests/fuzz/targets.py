"""What reads bytes from outside, one target each: a target takes any bytes and says whether they were a valid document.

A valid value writes itself as the bytes it was read from (or, where a document has comments, reads back as the same
value); everything else is refused with an error of ours. Any other exception leaves the target: that is a finding.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import asyncssh
import mutate
import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from hsl_node.admin.enrol import settings_text
from hsl_node.errors import ConfigError, PeerDataError
from hsl_node.federation.canonical import canonical_json
from hsl_node.federation.config import AnchorCard, Federation, PeerCard, card_text, federation_text, load_card
from hsl_node.federation.identity import MANIFEST_NAMESPACE, Identity, verify
from hsl_node.federation.names import Digest, FileName, Kind, Peer, parse_file_name
from hsl_node.federation.node_toml import NodeConfig
from hsl_node.federation.plan import Plan, load_plan
from hsl_node.federation.toml_file import read_toml
from hsl_node.sync.manifest import Manifest, Receipt, find_heading, parse_manifest, parse_receipt
from hsl_node.train.bundle import Card, Computed, Decision, parse_card
from hsl_node.train.data.preprocessing import Preprocessing, Window
from hsl_node.weights.checkpoint_file import HEADER_MAX_BYTES, parse_header, schema_of

SHA = "a" * 64


def _key(number: int) -> Identity:
    """The same key in every process: a corpus of signed documents is worth keeping."""
    raw = Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32)
    return Identity(asyncssh.import_private_key(raw.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())))


KEYS = (_key(1), _key(2))
MESSAGE_MAX = 20_000  # characters of an error: a person reads it, a log keeps it


@dataclass(frozen=True)
class Target:
    accepts: Callable[[bytes], bool]
    mutate: Callable[[bytes, random.Random], bytes]
    seeds: tuple[bytes, ...]  # all of them valid


# ---------------------------------------------------------------- documents of peers


def manifest(data: bytes) -> bool:
    heading = find_heading(data)
    assert heading is None or str(heading.file_name())
    try:
        value = parse_manifest(data)
    except PeerDataError as error:
        return refused(error)
    assert heading is not None and heading.file_name() == value.file_name()
    assert canonical_json(value.content()) + b"\n" == data
    assert str(value.file_name())
    return True


def receipt(data: bytes) -> bool:
    try:
        value = parse_receipt(data)
    except PeerDataError as error:
        return refused(error)
    assert canonical_json(value.content()) + b"\n" == data
    return True


def signature(data: bytes) -> bool:
    """A signature holds for the line that was signed and for no other, and has one spelling."""
    try:
        verify(data, KEYS[0].public, MANIFEST_NAMESPACE)
    except PeerDataError as error:
        return refused(error)
    assert data in TARGETS["signature"].seeds
    return True


def header(data: bytes) -> bool:
    try:
        schema = parse_header(data)
    except PeerDataError as error:
        return refused(error)
    assert len(data) <= 8 + HEADER_MAX_BYTES
    assert schema.header == data
    ends = [spec.offset + spec.bytes for spec in schema.tensors]
    assert [spec.offset for spec in schema.tensors] == [len(data), *ends[:-1]]  # no gap, no overlap
    assert schema.file_bytes == ends[-1]
    entries = {
        spec.name: {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [spec.offset - len(data), spec.offset - len(data) + spec.bytes],
        }
        for spec in schema.tensors
    }
    assert json.loads(data[8:]) == entries  # nothing was read otherwise than it stands there, nothing was left out
    return True


def file_name(data: bytes) -> bool:
    text = os.fsdecode(data)  # as a folder's listing gives it
    try:
        name = parse_file_name(text)
    except PeerDataError as error:
        return refused(error)
    assert str(name) == text
    return True


# ---------------------------------------------------------------- files of people


def card(data: bytes) -> bool:
    path = written(data)
    try:
        value = load_card(path)
    except ConfigError as error:
        return refused(error)
    path.write_text(card_text(value), encoding="utf-8")
    assert load_card(path) == value
    return True


def federation(data: bytes) -> bool:
    path = written(data)
    try:
        value = read_toml(path, Federation)
    except ConfigError as error:
        return refused(error)
    text = federation_text(value)
    path.write_text(text, encoding="utf-8")
    again = read_toml(path, Federation)
    assert (again.digest, federation_text(again)) == (value.digest, text)
    return True


def node(data: bytes) -> bool:
    try:
        value = read_toml(written(data), NodeConfig)
    except ConfigError as error:
        return refused(error)
    assert NodeConfig.model_validate(value.model_dump()) == value
    return True


def model_card(data: bytes) -> bool:
    try:
        value = parse_card(data, Path("model/model.json"))
    except ConfigError as error:
        return refused(error)
    assert parse_card(value.model_dump_json().encode(), Path("model.json")) == value
    return True


def plan(data: bytes) -> bool:
    try:
        value = load_plan(written(data))
    except ConfigError as error:
        return refused(error)
    assert Plan.model_validate(value.model_dump()) == value
    return True


# ---------------------------------------------------------------- how


def refused(error: ConfigError | PeerDataError) -> bool:
    text = str(error)
    assert len(text) < MESSAGE_MAX
    assert all(c.isprintable() or c == "\n" for c in text), text  # nothing that a terminal obeys
    return False


def written(data: bytes) -> Path:
    SCRATCH.write_bytes(data)
    return SCRATCH


# A file in memory alone: libFuzzer ends its process without any cleaning up.
SCRATCH = Path(f"/proc/self/fd/{os.memfd_create('card, federation, node or plan')}")
CARDS = tuple(
    PeerCard(name=name, address=address, key=key.public, **more)
    for name, address, key, more in (
        ("ash", "ash.example.org:8922", KEYS[0], {}),
        ("birch", "[::1]:22", KEYS[1], {"host_key": KEYS[0].public, "user": "hsl-{sender}", "root": "srv/hsl/"}),
    )
)


def _manifest(**changes: object) -> Manifest:
    fields = {
        "federation": SHA, "round": 3, "peer": "ash", "sha256": SHA, "bytes": 1000, "base": SHA,
        "inputs": {"ash": SHA, "birch": SHA}, "samples": 120, "score": 0.75, "said": {}, "plateau": False,
        "halted": False, "anchor": None, "schema": SHA, "instance": "0123", "software": "hsl-node 0.1.0",
    }  # fmt: skip
    return Manifest.model_validate(fields | changes)


def _receipt(accepted: bool) -> Receipt:
    return Receipt(
        federation=SHA, round=3, peer="ash", sha256=SHA, receiver="birch", accepted=accepted,
        code="accepted" if accepted else "header", text="" if accepted else "not a checkpoint",
    )  # fmt: skip


_STATEMENT = _manifest(bytes=0, round=0, inputs={}, score=None, anchor=SHA, halted=True)
_MODEL = {"a.bias": np.zeros(3, np.float32), "a.weight": np.zeros((3, 2), np.float16), "n": np.array(7)}
_NAME = FileName("0123abcd", 12, Peer("mercy-north"), Digest(SHA), Kind.DATA)
_HSL = Federation(
    name="grove", anchor=AnchorCard(name="rsna", fingerprint=SHA, images=100, image_size=224), plan=Plan(), peer=CARDS
)
_CARD = Card(
    classes=("negative", "positive"),
    decision=Decision(threshold=0.4, rule="largest Youden's J"),
    preprocessing=Preprocessing.of(Plan(), Window(center=40, width=400)),
    plan=Plan(),
    hardware=Computed(precision="float32", threads=2, device="cpu", processor="any"),
    round=3,
    source_weights_sha256=SHA,
)
_NODE = """\
name = "ash"
address = "ash.example.org:8922"
client = "paramiko"
[data]
path = "/srv/images"
filter = { scanner = "Canon" }
exclude = ["broken.png"]
window_width = 400.0
[train]
device = "cuda:0"
threads = 2
[inbox]
kind = "directory"
directory = "/srv/hsl/inbox"
quota_mib = 512
"""


def _encoded(*texts: str) -> tuple[bytes, ...]:
    return tuple(text.encode() for text in texts)


TARGETS = {
    "manifest": Target(
        manifest, mutate.json_line, tuple(canonical_json(m.content()) + b"\n" for m in (_manifest(), _STATEMENT))
    ),
    "receipt": Target(
        receipt, mutate.json_line, tuple(canonical_json(_receipt(yes).content()) + b"\n" for yes in (True, False))
    ),
    "signature": Target(
        signature,
        mutate.signed,
        tuple(KEYS[0].sign(m.content(), MANIFEST_NAMESPACE) for m in (_manifest(), _STATEMENT)),
    ),
    "header": Target(header, mutate.header, (schema_of(_MODEL).header, schema_of({"n": _MODEL["n"]}).header)),
    "file_name": Target(
        file_name, mutate.bytes_of, _encoded(str(_NAME), str(_NAME.of(Kind.MANIFEST)), str(_NAME.as_part()))
    ),
    "card": Target(card, mutate.toml, _encoded(*(card_text(c) for c in CARDS))),
    "federation": Target(
        federation,
        mutate.toml,
        _encoded(
            federation_text(Federation(name="g", plan=Plan(method="fedavg"), peer=CARDS)),
            federation_text(_HSL),
        ),
    ),
    "node": Target(
        node,
        mutate.toml,
        _encoded(_NODE, settings_text(name="ash", address="a.org:1", listen=None, data=None)),
    ),
    "model_card": Target(
        model_card,
        mutate.json_line,
        tuple(
            canonical_json({**card.model_dump(mode="json"), "format": 2, "versions": {"hsl_node": "0.1.0"}}) + b"\n"
            for card in (_CARD, _CARD.model_copy(update={"decision": None}))
        ),
    ),
    "plan": Target(plan, mutate.toml, _encoded('method = "fedavg"\nrounds = 3\nclasses = ["a", "b"]\n', "")),
}
