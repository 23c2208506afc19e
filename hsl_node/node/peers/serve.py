"""What this node keeps for a peer that may have lost its state: lists it, signed, and opens what the list names.

Only what every peer was sent anyway: signed manifests, checkpoints of the rounds that are kept, fused models. And what
the asker itself has delivered and nobody has looked at yet: it must not sign that round a second time. Who waits, or
doubts, asks too: see `equivocation.py` and `fetch_missing.py`.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hsl_node.errors import PeerDataError
from hsl_node.federation.identity import OFFER_NAMESPACE
from hsl_node.federation.names import INBOX, Kind, Peer, Round, is_digest, parse_file_name
from hsl_node.node.here import Here, Keys
from hsl_node.sync.manifest import MANIFEST_MAX_BYTES
from hsl_node.sync.offer import ROUNDS_MAX, Listed, Offer
from hsl_node.sync.round import State
from hsl_node.sync.store.plain_files import open_folder, open_plain

UNSEEN_MAX = 8  # delivered and not looked at yet; an honest sender has two


@dataclass(frozen=True)
class InJournal:
    round: Round
    peer: Peer


@dataclass(frozen=True)
class InInbox:
    sender: Peer
    name: str


Place = Path | InJournal | InInbox


class Serve:
    """Keeps the last list of every peer, to open what it names."""

    def __init__(self, here: Here, keys: Keys, state: Callable[[], State | None]) -> None:
        """`state`: None while this node recovers, or starts."""
        self._here = here
        self._keys = keys
        self._state = state
        self._named: dict[Peer, dict[str, Place]] = {}

    def open(self, peer: Peer, name: str, twice: bool) -> int:
        """A descriptor to read `name` below offer/: see `sync/offer.py`.

        Raises:
            FileNotFoundError: it is not on the last list that this peer was given, or gone since.
        """
        if not is_digest(name):
            return _in_memory(self._list(peer, name, twice))
        match self._named.get(peer, {}).get(name):
            case None:
                raise FileNotFoundError(errno.ENOENT, "not on the list")
            case InJournal(round, whose):
                row = self._here.journal.manifest(round, whose)
                return _in_memory(row["document"] if row else b"")
            case InInbox(sender, file):
                with open_folder(self._here.homes, sender, INBOX) as folder:
                    return open_plain(file, os.O_RDONLY, folder)
            case Path() as path:
                return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)

    def _list(self, asker: Peer, nonce: str, twice: bool) -> bytes:
        """The signed list; remembers where everything on it lies."""
        here, state = self._here, self._state()
        round = state.round if state else 0
        listed: dict[str, Listed] = {}
        places: dict[str, Place] = {}
        for row in here.journal.offered((asker, here.me), max(0, round - 2), ROUNDS_MAX):
            digest = _add(listed, row, row["document"])
            places[digest] = InJournal(row["round"], Peer(row["peer"]))
            if row["round"] >= round - 1:
                path = here.layout.checkpoint(row["round"], Peer(row["peer"]), here.me)
                if path.exists():
                    places[row["sha256"]] = path
        kept = here.layout.fused_files()  # few, however many rounds there were
        for fused, sha256 in here.journal.fused_digests([r for r in kept if r > 0]).items():
            places[sha256] = kept[fused]
        for row, document, manifest, data in self._unseen(asker):
            places.setdefault(_add(listed, row, document), manifest)
            if data is not None:
                places.setdefault(row["sha256"], data)
        self._named[asker] = places
        offer = Offer(
            federation=here.federation.digest,
            peer=here.me,
            asker=asker,
            nonce=nonce,
            recovering=state is None,
            round=round,
            phase=str(state.phase) if state else "",
            twice=twice,
            manifests=list(listed.values()),
            files=sorted(places.keys() - listed.keys()),
        )
        return self._keys.identity.sign(offer.content(), OFFER_NAMESPACE)

    def _unseen(self, asker: Peer) -> list[tuple[dict[str, Any], bytes, InInbox, InInbox | None]]:
        """What lies in the asker's inbox/: delivered, but not checked. The asker knows its own signature."""
        found: list[tuple[dict[str, Any], bytes, InInbox, InInbox | None]] = []
        try:
            with open_folder(self._here.homes, asker, INBOX) as folder:
                present = set(os.listdir(folder))
                for text in sorted(present, reverse=True):
                    try:
                        name = parse_file_name(text)
                        if name.kind is not Kind.MANIFEST or name.part or name.peer != asker:
                            continue
                        with os.fdopen(open_plain(text, os.O_RDONLY, folder), "rb") as file:
                            document = file.read(MANIFEST_MAX_BYTES)
                    except (PeerDataError, FileNotFoundError):
                        continue
                    data = str(name.of(Kind.DATA))
                    row = {"peer": asker, "round": name.round, "sha256": name.sha256}
                    there = InInbox(asker, data) if data in present else None
                    found.append((row, document, InInbox(asker, text), there))
                    if len(found) == UNSEEN_MAX:
                        break
        except FileNotFoundError:
            pass  # another server's folders, not made yet
        return found


def _add(listed: dict[str, Listed], row: dict[str, Any], document: bytes) -> str:
    digest = hashlib.sha256(document).hexdigest()
    listed[digest] = Listed(peer=row["peer"], round=row["round"], sha256=row["sha256"], document=digest)
    return digest


def _in_memory(content: bytes) -> int:
    descriptor = os.memfd_create("offer", os.MFD_CLOEXEC)
    try:
        os.write(descriptor, content)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor
