"""Proof that a peer signed two different manifests for one round: both documents, side by side in evidence/.

    r000007_cedar_first.manifest      what this node had        r000007_cedar_second.manifest      what differs from it
    r000007_ash_own_1.manifest        what a recovery of this node, ash, found signed by itself: own_2, too

Anybody who has the federation file can check it, with stock ssh-keygen too (`hsl-node verify --export`). A document
without the peer's signature, or about something else, proves nothing.

And what each peer said, signed, when this node recovered: who left out a signature of this node then, and shows it
later, has made it sign that round twice. The lists of the last recovery lie in the journal.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hsl_node.errors import PeerDataError
from hsl_node.federation.config import Federation
from hsl_node.federation.identity import MANIFEST_NAMESPACE, verify
from hsl_node.federation.keyring import Keyring
from hsl_node.federation.names import PEER_PATTERN, Peer, Round
from hsl_node.host import durable
from hsl_node.sync.manifest import Manifest, parse_manifest
from hsl_node.sync.store.journal import Journal
from hsl_node.sync.store.store import Store

_FIRST = re.compile(rf"(r([0-9]{{6}})_({PEER_PATTERN}))_(first|own_1)\.manifest", re.ASCII)
_OTHER = {"first": "second", "own_1": "own_2"}


@dataclass(frozen=True)
class Proof:
    """Two documents of one peer and round, as they lie in evidence/."""

    round: Round
    peer: Peer
    paths: tuple[Path, Path]
    own: bool = False  # found by a recovery, which also reads what a key of this node signed that is replaced by now

    def documents(self) -> tuple[bytes, bytes]:
        first, second = self.paths
        return first.read_bytes(), second.read_bytes()


def names(round: Round, peer: Peer, *, own: bool = False) -> tuple[str, str]:
    """Of the two files. `own`: this node's signatures, found while recovering."""
    first = "own_1" if own else "first"
    return f"r{round:06d}_{peer}_{first}.manifest", f"r{round:06d}_{peer}_{_OTHER[first]}.manifest"


def kept(folder: Path) -> list[Proof]:
    """What a node has collected, unchecked, in the order of the rounds."""
    found = []
    for path in sorted(folder.glob("*.manifest")):
        if match := _FIRST.fullmatch(path.name):
            other = path.with_name(f"{match[1]}_{_OTHER[match[4]]}.manifest")
            if other.exists():
                found.append(Proof(int(match[2]), Peer(match[3]), (path, other), match[4] == "own_1"))
    return found


def require_proof(proof: Proof, keys: Sequence[str], federation: Federation) -> tuple[Manifest, Manifest]:
    """Check a proof. `keys`: all that the peer ever had.

    Raises:
        PeerDataError: it is none: not this peer's signature, another federation, round or peer, or twice the same.
    """
    first, second = (parse_manifest(verify(d, keys, MANIFEST_NAMESPACE)) for d in proof.documents())
    for manifest in (first, second):
        about = (manifest.federation, manifest.round, manifest.peer)
        if about != (federation.digest, proof.round, proof.peer):
            raise PeerDataError("a document of it is about something else", code="evidence")
    if first.digest == second.digest or proof.round == 0:
        raise PeerDataError("both documents say the same, or may differ: it is no proof", code="evidence")
    return first, second


def keep(
    store: Store, ring: Keyring, round: Round, peer: Peer, documents: tuple[bytes, bytes], *, own: bool = False
) -> None:
    """Keep two manifests of one round, both verified, that differ. A proof that lies there stays: not hundreds.

    What lies there and proves nothing is replaced, file by file: a kill came between the two, and what is found later
    need not be the same two in the same order; or the disk has altered one.
    """
    folder = store.layout.evidence
    first, second = (folder / name for name in names(round, peer, own=own))
    try:
        require_proof(Proof(round, peer, (first, second)), ring.chain(peer), ring.federation)
    except (PeerDataError, FileNotFoundError):
        for path, document in zip((first, second), documents, strict=True):
            store.keep_evidence(path.name, document)
    else:
        durable.accept(first)
        durable.accept(second)


def keep_told(journal: Journal, lists: Mapping[Peer, bytes]) -> None:
    """What each peer answered a recovery. Within the transaction that ends it."""
    for peer, document in lists.items():
        journal.set_meta(f"told {peer}", document.decode("ascii"))


def told(journal: Journal, peers: Sequence[Peer]) -> dict[Peer, bytes]:
    """Those documents, of the last recovery that each peer answered."""
    found = {peer: journal.meta(f"told {peer}") for peer in peers}
    return {peer: text.encode("ascii") for peer, text in found.items() if text}


def left_out(journal: Journal, peers: Sequence[Peer], me: Peer, round: Round) -> dict[Peer, Round]:
    """Who signed then that it held nothing of `me` for `round` or a later one; and the newest that it listed, or 0."""
    found = {}
    for peer, document in told(journal, peers).items():
        listed = json.loads(document.partition(b"\n")[0])["manifests"]
        newest = max((Round(m["round"]) for m in listed if m["peer"] == me), default=Round(0))
        if newest < round:
            found[peer] = newest
    return found
