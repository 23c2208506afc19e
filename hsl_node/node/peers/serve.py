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
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hsl_node.errors import PeerDataError
from hsl_node.federation.identity import OFFER_NAMESPACE
from hsl_node.federation.names import INBOX, FileName, Kind, Peer, Round, is_digest, parse_file_name
from hsl_node.node.here import Here, Keys
from hsl_node.sync.life import Sign, find_sign
from hsl_node.sync.manifest import MANIFEST_MAX_BYTES
from hsl_node.sync.offer import ROUNDS_MAX, Listed, Offer
from hsl_node.sync.round import State
from hsl_node.sync.store.plain_files import open_folder, open_plain

UNSEEN_MAX = 8  # delivered and not looked at yet; an honest sender has two


Open = Callable[[], int]  # gives a descriptor to read


@dataclass
class Serve:
    """Keeps the last list of every peer, to open what it names."""

    here: Here
    keys: Keys
    state: Callable[[], State | None]  # None while this node recovers, or starts
    life: Callable[[Peer, Sign], bytes] | None = None  # takes a peer's sign of life, gives ours, signed

    def __post_init__(self) -> None:
        self._named: dict[Peer, dict[str, Open]] = {}

    def open(self, peer: Peer, name: str, twice: bool) -> int:
        """A descriptor to read `name` below offer/: see `sync/offer.py`.

        Raises:
            FileNotFoundError: it is not on the last list that this peer was given, or gone since.
        """
        if name.endswith(".life"):
            if self.life is None or (sign := find_sign(name)) is None:
                raise FileNotFoundError(errno.ENOENT, "no sign of life")
            return _in_memory(self.life(peer, sign))
        if not is_digest(name):
            return _in_memory(self._list(peer, name, twice))
        found = self._named.get(peer, {}).get(name)
        if found is None:
            raise FileNotFoundError(errno.ENOENT, "not on the list")
        return found()

    def _list(self, asker: Peer, nonce: str, twice: bool) -> bytes:
        """The signed list; remembers where everything on it lies."""
        here, state = self.here, self.state()
        round = state.round if state else 0
        listed: dict[str, Listed] = {}
        places: dict[str, Open] = {}
        for row in here.journal.offered((asker, here.me), max(0, round - 2), ROUNDS_MAX):
            digest = _add(listed, row, row["document"])
            places[digest] = partial(self._in_journal, row["round"], Peer(row["peer"]))
            if row["round"] >= round - 1:
                path = here.layout.checkpoint(row["round"], Peer(row["peer"]), here.me)
                if path.exists():
                    places[row["sha256"]] = partial(_on_disk, path)
        kept = here.layout.fused_files()  # few, however many rounds there were
        for fused, sha256 in here.journal.fused_digests([r for r in kept if r > 0]).items():
            places[sha256] = partial(_on_disk, kept[fused])
        for name, document, has_data in self._unseen(asker):
            row = {"peer": asker, "round": name.round, "sha256": name.sha256}
            places.setdefault(_add(listed, row, document), partial(self._in_inbox, asker, name))
            if has_data:
                places.setdefault(name.sha256, partial(self._in_inbox, asker, name.of(Kind.DATA)))
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
        return self.keys.identity.sign(offer.content(), OFFER_NAMESPACE)

    def _unseen(self, asker: Peer) -> list[tuple[FileName, bytes, bool]]:
        """What lies in the asker's inbox/: delivered, but not checked. The asker knows its own signature.

        Name and content of each manifest, and whether its checkpoint lies there.
        """
        found: list[tuple[FileName, bytes, bool]] = []
        with suppress(FileNotFoundError), open_folder(self.here.homes, asker, INBOX) as folder:  # not made yet
            present = set(os.listdir(folder))
            for text in sorted(present, reverse=True):
                with suppress(PeerDataError, FileNotFoundError):
                    name = parse_file_name(text)
                    if name.kind is Kind.MANIFEST and not name.part and name.peer == asker:
                        with os.fdopen(open_plain(text, os.O_RDONLY, folder), "rb") as file:
                            found.append((name, file.read(MANIFEST_MAX_BYTES), str(name.of(Kind.DATA)) in present))
                if len(found) == UNSEEN_MAX:
                    break
        return found

    def _in_journal(self, round: Round, peer: Peer) -> int:
        row = self.here.journal.manifest(round, peer)
        return _in_memory(row["document"] if row else b"")

    def _in_inbox(self, sender: Peer, name: FileName) -> int:
        with open_folder(self.here.homes, sender, INBOX) as folder:
            return open_plain(str(name), os.O_RDONLY, folder)


def _on_disk(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)


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
