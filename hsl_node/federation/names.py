"""Names of peers, rounds and files. One regular expression builds and checks every file name. Pure.

A file of the exchange is called

    hsl1_<fed8>_r000012_<peer>_<sha256>.safetensors | .manifest | .receipt      (a part: the same + ".part")

and nothing else is ever accepted from, or sent to, a peer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import NewType

from hsl_node.errors import PeerDataError

Peer = NewType("Peer", str)  # lower-case name of one hospital's node, unique in its federation
Round = int  # from 1; round 0 names the initial weights
Digest = NewType("Digest", str)  # sha256 as 64 lower-case hex digits

PEER_PATTERN = r"[a-z][a-z0-9-]{0,30}[a-z0-9]"  # short enough to be a login name everywhere (32), no "_"
ROUND_MAX = 999_999

_PEER = re.compile(PEER_PATTERN)
_DIGEST = re.compile(r"[0-9a-f]{64}")
_FILE = re.compile(
    rf"hsl1_(?P<fed8>[0-9a-f]{{8}})_r(?P<round>[0-9]{{6}})_(?P<peer>{PEER_PATTERN})_(?P<sha256>[0-9a-f]{{64}})"
    r"\.(?P<kind>safetensors|manifest|receipt)(?P<part>\.part)?",
    re.ASCII,
)

PARTS, INBOX, RECEIPTS = "parts", "inbox", "receipts"  # the three folders of a sender's home


class Kind(StrEnum):
    DATA = "safetensors"
    MANIFEST = "manifest"
    RECEIPT = "receipt"


@dataclass(frozen=True, order=True)
class FileName:
    """One file of the exchange. `peer` is the sender of the checkpoint, also in a receipt's name."""

    fed8: str
    round: Round
    peer: Peer
    sha256: Digest
    kind: Kind
    part: bool = False

    def __str__(self) -> str:
        name = f"hsl1_{self.fed8}_r{self.round:06d}_{self.peer}_{self.sha256}.{self.kind}"
        name += ".part" if self.part else ""
        if not _FILE.fullmatch(name):
            raise ValueError(f"not a file name of the exchange: {name!r}")  # a bug on our side
        return name

    def of(self, kind: Kind) -> FileName:
        return replace(self, kind=kind, part=False)

    def as_part(self) -> FileName:
        return replace(self, part=True)


def parse_file_name(name: str) -> FileName:
    """Read a file name that came from outside.

    Raises:
        PeerDataError: code `name`; the name is not of the form above.
    """
    found = _FILE.fullmatch(name)
    if not found:
        raise PeerDataError(f"{name[:120]!r} is not a file name of the exchange", code="name", remedy="remove the file")
    return FileName(
        fed8=found["fed8"],
        round=int(found["round"]),
        peer=Peer(found["peer"]),
        sha256=Digest(found["sha256"]),
        kind=Kind(found["kind"]),
        part=found["part"] is not None,
    )


def parse_peer(name: str) -> Peer:
    """A peer's name: 2 to 32 of a-z, 0-9 and "-", a letter first, no "-" at the end.

    Raises:
        ValueError: anything else.
    """
    if not _PEER.fullmatch(name):
        raise ValueError(
            f"{name!r} is not a peer name: "
            'use 2 to 32 lower-case letters, digits and "-", starting with a letter, e.g. "mercy-north"'
        )
    return Peer(name)


def is_digest(text: str) -> bool:
    return _DIGEST.fullmatch(text) is not None
