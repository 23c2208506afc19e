"""What a peer that cannot be asked knows of this node, carried by hand: the folder of `verify --export` made there.

Each document carries this node's own signature, so nobody has to be believed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hsl_node.errors import FederationMismatch, PeerDataError, UsageError
from hsl_node.federation.identity import MANIFEST_NAMESPACE, verify
from hsl_node.federation.keyring import Keyring
from hsl_node.federation.names import Peer
from hsl_node.node.heal.counting import Held, counting, forged
from hsl_node.node.heal.counting import held as held_of
from hsl_node.node.heal.gather import signed_twice
from hsl_node.sync.manifest import MANIFEST_MAX_BYTES, Manifest, content_digest, parse_manifest
from hsl_node.sync.store.journal import Journal
from hsl_node.sync.store.store import Store


def take(folder: Path, store: Store, ring: Keyring, me: Peer) -> int:
    """Put into the journal what `me` signed, as the peer of that folder holds it; gives the count.

    Raises:
        UsageError: nothing there was signed by this node.
        PeerDataError: a document is not what its name says.
        FederationMismatch: of another federation.
        Equivocation: the journal holds another manifest of the same round.
    """
    found = [
        (path, int(match[1]))
        for path in sorted(folder.glob("*.manifest"))
        if (match := re.fullmatch(rf"r([0-9]{{6}})_{re.escape(me)}\.manifest", path.name, re.ASCII))
    ]
    if not found:
        raise UsageError(
            f"{folder} holds no manifest of {me}", remedy="ask that hospital for the folder of `verify --export` there"
        )
    held: dict[str, Held] = {}
    for path, round in found:
        document = _read(path) + _read(path.with_name(path.name + ".sig"))
        manifest = parse_manifest(verify(document, ring.chain(me), MANIFEST_NAMESPACE))
        if manifest.federation != ring.federation.digest:
            raise FederationMismatch(
                f"{path.name} is of federation {manifest.federation[:8]}, ours is {ring.federation.fed8}",
                remedy="ask for an export of this federation",
            )
        if (manifest.peer, manifest.round) != (me, round):
            raise PeerDataError(f"{path.name} is about something else than its name says", code="name")
        held[path.name] = held_of(manifest, document, ring)
    counts = _counting(held, store.journal, ring, me)
    for one in counts:
        known = store.journal.manifest(one.round, me)
        if known is None:
            store.journal.record_manifest(one.round, me, one.sha256, one.document, one.manifest.content())
        elif one.round > 0 and content_digest(known["content"]) != one.manifest.digest:
            raise signed_twice(store, ring, _of_journal(known, ring), one)
    return len(counts)


def _counting(held: Mapping[str, Held], journal: Journal, ring: Keyring, me: Peer) -> list[Held]:
    """Without what a replaced key signed and nothing newer names: of no use, as no such round is signed any more.

    Raises:
        PeerDataError: somebody else has signed it with that key: see `counting.py`.
    """
    rows = [journal.last_manifest(me), *(journal.manifest(round, me) for round in {h.round for h in held.values()})]
    here = [_of_journal(row, ring) for row in rows if row]
    found = {**held, **{f"round {one.round} of the journal": one for one in here}}
    counts = counting(found, ring, me, journal.manifest)
    if wrong := {id(one) for one in forged(found, counts)}:
        name = next(name for name, one in found.items() if id(one) in wrong)
        raise PeerDataError(
            f"{name} is signed with a key of this node that was replaced, and what its newer key signed contradicts it",
            code="key",
            remedy="call the hospital that sent the folder: somebody has that old key; nothing was taken",
        )
    return [counts[name] for name in held if name in counts]


def _of_journal(row: Mapping[str, Any], ring: Keyring) -> Held:
    return held_of(Manifest.model_validate(row["content"]), row["document"], ring, certain=True)


def _read(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(MANIFEST_MAX_BYTES)
    except OSError as exc:
        raise UsageError(f"{path} cannot be read: {exc.strerror}", remedy="take the whole folder") from exc
