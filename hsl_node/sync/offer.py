"""What a node offers a peer that may have lost its state: a signed list, and the files in it. No network, no files.

The asker reads `offer/<nonce>.state`, the list, signed for it and for this nonce. Whatever the list names by sha256 it
reads as `offer/<sha256>`: signed manifests and the checkpoints and fused models of the rounds that are kept. All of
that was sent to every peer once; nothing else can be named here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

from pydantic import Field

from hsl_node.errors import PeerDataError
from hsl_node.federation.config import Federation
from hsl_node.federation.identity import OFFER_NAMESPACE, verify
from hsl_node.federation.names import PEER_PATTERN, ROUND_MAX, Peer
from hsl_node.federation.strings import Sha256
from hsl_node.sync.manifest import Signed, parse_signed

OFFER = "offer"  # the folder's name
ROUNDS_MAX = 350  # manifests of asker and offerer, the newest: 200 bytes each, and 64 peers x 3 rounds, fit in a block
OFFER_MAX_BYTES = 255 * 1024  # read in one request: two reads could see two lists
_STATE = re.compile(r"([0-9a-f]{16})\.state")
_LIFE = re.compile(r"[0-9a-z-]{8,60}\.life")  # what it says: see `life.py`
_NAME = Annotated[str, Field(pattern=rf"^{PEER_PATTERN}$")]


class Listed(Signed):
    """One signed manifest that the offering node holds."""

    peer: _NAME
    round: int = Field(ge=0, le=ROUND_MAX)
    sha256: Sha256  # of the checkpoint it names
    document: Sha256  # of the manifest itself, signature included


class Offer(Signed):
    """What `peer` holds, told to `asker`."""

    version: Literal[1] = 1
    federation: Sha256
    peer: _NAME
    asker: _NAME
    nonce: str = Field(pattern=r"^[0-9a-f]{16}$")  # of the question: an old answer is none
    recovering: bool  # lost its own state, and asks too: what is listed is all it has
    round: int = Field(ge=0, le=ROUND_MAX)
    phase: str = Field(max_length=20)
    twice: bool  # two processes with the asker's key take turns in connecting: see `clones.py`
    manifests: list[Listed]
    files: list[Sha256]  # checkpoints and fused models that can be read

    def of(self, peer: Peer) -> Iterator[Listed]:
        return (m for m in self.manifests if m.peer == peer)


def state_path(nonce: str) -> str:
    return f"{OFFER}/{nonce}.state"


def file_path(sha256: str) -> str:
    return f"{OFFER}/{sha256}"


def parse_path(path: bytes) -> str | None:
    """What a client's path asks for below `offer/`: 64 hex digits; 16 for the list; a sign of life. None: elsewhere.

    Raises:
        PeerDataError: code `name`; below `offer/`, but neither.
    """
    text = path.decode("latin-1").removeprefix("/")
    if not text.startswith(OFFER + "/"):
        return None
    name = text.removeprefix(OFFER + "/")
    if re.fullmatch(r"[0-9a-f]{64}", name, re.ASCII) or _LIFE.fullmatch(name):
        return name
    if found := _STATE.fullmatch(name):
        return found[1]
    raise PeerDataError("not a name below offer/", code="name")


def parse_offer(
    document: bytes,
    federation: Federation,
    *,
    peer: Peer,
    asker: Peer,
    nonce: str,
    keys: Sequence[str],
) -> Offer:
    """Check a list that came from `peer`'s server. `keys`: one of these signed it.

    Raises:
        PeerDataError: not signed by `peer`, or not the answer to this question.
    """
    offer = parse_signed(verify(document, keys, OFFER_NAMESPACE), Offer)
    says = (offer.federation, offer.peer, offer.asker, offer.nonce)
    if says != (federation.digest, peer, asker, nonce):
        raise PeerDataError(f"{peer} answers something else than was asked", code="offer")
    return offer
