"""What a list that a peer signed says against what is known here. Pure.

It is that peer's word and no more: who asks reads the documents, or the files, that a finding names (`ask.py`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from hsl_node.federation.names import Digest, Peer, Round

if TYPE_CHECKING:
    from hsl_node.sync.offer import Listed, Offer


def newer_of_mine(offer: Offer, me: Peer, last_signed: Round | None) -> list[Listed]:
    """Signatures of mine that my journal does not know: this node was set back, or somebody has its key."""
    return [m for m in offer.of(me) if m.round > (last_signed or 0)]


def lacking(offer: Offer, round: Round, missing: Collection[str]) -> list[Listed]:
    """Checkpoints of this round that are waited for, and that it has."""
    return [m for m in offer.manifests if m.round == round and m.peer in missing]


def unread(offer: Offer, known: Collection[str], members: Collection[str]) -> list[Listed]:
    """Documents of members that are not `known` by their sha256."""
    return [m for m in offer.manifests if m.document not in known and m.peer in members]


def differing(
    offer: Offer, ours: Mapping[tuple[Round, Peer], str], disputed: Collection[tuple[Round, Peer]] = ()
) -> list[Listed]:
    """What it holds otherwise than `ours`, a document's sha256 by round and peer: what is disputed, then the newest."""
    found = [m for m in offer.manifests if ours.get((Round(m.round), Peer(m.peer)), m.document) != m.document]
    return sorted(found, key=lambda m: ((m.round, m.peer) not in disputed, -m.round))


def forgotten(offer: Offer, me: Peer, acknowledged: Collection[Round]) -> frozenset[Round]:
    """Rounds of mine that it needs, lacks and has `acknowledged`: it was set back. Who recovers says so itself."""
    listed = {m.round for m in offer.of(me)}
    needed = () if offer.recovering else (offer.round, offer.round + 1)
    return frozenset(r for r in acknowledged if r in needed and r not in listed)


def givers_of_document(document: str, offers: Mapping[Peer, Offer]) -> list[Peer]:
    return sorted(Peer(o.peer) for o in offers.values() if any(m.document == document for m in o.manifests))


def givers_of_file(sha256: Digest, offers: Mapping[Peer, Offer]) -> list[Peer]:
    return sorted(Peer(o.peer) for o in offers.values() if sha256 in o.files)
