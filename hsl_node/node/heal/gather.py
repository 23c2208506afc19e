"""All manifests that the peers list and this journal holds, read and judged: what counts, and what must not be.

What counts where a key was replaced: `counting.py`.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from hsl_node.errors import Equivocation, HslError, PeerDataError, escaped
from hsl_node.federation.keyring import Keyring
from hsl_node.federation.names import Peer, Round
from hsl_node.node.alarms import Alarms
from hsl_node.node.heal.counting import Held, counting, forged
from hsl_node.node.heal.counting import held as held_of
from hsl_node.node.heal.waiting import Waiting
from hsl_node.node.here import Here, Keys
from hsl_node.node.peers.fetch import HeldUp
from hsl_node.node.peers.links import Links
from hsl_node.sync import evidence
from hsl_node.sync.ask import read_documents
from hsl_node.sync.findings import givers_of_document, unread
from hsl_node.sync.manifest import Manifest, content_digest
from hsl_node.sync.offer import Listed, Offer
from hsl_node.sync.store.journal import Journal
from hsl_node.sync.store.store import Store
from hsl_node.sync.wire.transport import OperationFailed


@dataclass
class Gather:
    here: Here
    keys: Keys
    alarms: Alarms
    links: Links
    waiting: Waiting

    async def manifests(self, offers: Mapping[Peer, Offer]) -> dict[str, Held]:
        """Every verified manifest that the answers name, by the sha256 of the document; those of the journal too.

        Raises:
            Equivocation: two different ones of one round carry this node's signature.
            HeldUp: a peer does not give what it lists, or what it gives does not fit what another one signed.
        """
        named = {(m.round, Peer(m.peer)) for offer in offers.values() for m in offer.manifests}
        held = await asyncio.to_thread(self._known, named)
        for offer in offers.values():
            await self._read(offer, held)
        counts = await asyncio.to_thread(self._counting, held)
        self._tell_forged(held, counts, offers)
        self._require_one_signature(counts, offers)
        for one in counts.values():
            self._require_fitting(one, counts, offers)
        return counts

    def _known(self, named: Collection[tuple[Round, Peer]]) -> dict[str, Held]:
        """What the journal holds of what matters, however many rounds there were, by the sha256 of the document.

        The rounds since my last but one, what `signed` lacks of mine, and the rounds and peers that are `named`: what
        an answer lists and is here is not asked for, and what it says otherwise is seen.
        """
        me, ring, found = self.here.me, self.keys.ring, []
        with Journal.read_only(self.here.layout.journal) as journal:  # in a thread: parsing takes a while
            since = (journal.last_signed() or 1) - 1
            rows = journal.documents(since, me)
            rows += [row for round, peer in sorted(named) if round < since and (row := journal.manifest(round, peer))]
            for row in rows:
                manifest = Manifest.model_validate(row["content"])
                if manifest.federation != ring.federation.digest:
                    continue
                # What was brought by hand (`by_hand.py`) is worth as much as what a peer lists.
                certain = manifest.peer != me or journal.signed(Round(manifest.round)) is not None
                try:
                    found.append(held_of(manifest, row["document"], ring, certain=certain))
                except PeerDataError:  # with a key that an older keyring.toml, put back, does not know
                    found.append(Held(manifest, row["document"], certain=True))
        return {hashlib.sha256(h.document).hexdigest(): h for h in found}

    async def _read(self, offer: Offer, held: dict[str, Held]) -> None:
        """Raises: HeldUp: this peer's link broke, or it does not give a signature of this node that it lists."""
        here, ring, peer = self.here, self.keys.ring, Peer(offer.peer)
        wanted = unread(offer, held, here.federation.peers)

        def take(listed: Listed, manifest: Manifest, document: bytes) -> None:
            held[listed.document] = held_of(manifest, document, ring)

        def passes(listed: Listed, error: HslError) -> bool:
            """It has restarted since, say, and listed that in its last life; what I may have signed never passes."""
            if listed.peer == here.me and isinstance(error, OperationFailed):
                raise HeldUp(peer, f"it lists this node's signature of round {listed.round}, and does not give it")
            return True

        try:
            if wanted:
                await read_documents(
                    self.links.connected(peer),
                    peer,
                    wanted,
                    here.federation,
                    ring.chain,
                    most=None,
                    take=take,
                    passes=passes,
                    passed="not taken",
                    progress=lambda done: self.waiting.hold_up(
                        peer, f"its list is being read: {done} of {len(wanted)}"
                    ),
                )
        except HeldUp:
            raise
        except HslError as exc:
            raise HeldUp(peer, f"its list could not be read: {escaped(exc.message)}") from exc
        finally:
            self.waiting.go_on(peer)

    def _counting(self, held: Mapping[str, Held]) -> dict[str, Held]:
        me = self.here.me

        def known(round: Round, peer: Peer) -> dict[str, Any] | None:
            """Not what was brought by hand: see `_known`."""
            return journal.manifest(round, peer) if peer != me or journal.signed(round) is not None else None

        with Journal.read_only(self.here.layout.journal) as journal:  # in a thread
            return counting(held, self.keys.ring, me, known)

    def _tell_forged(self, held: Mapping[str, Held], counts: Mapping[str, Held], offers: Mapping[Peer, Offer]) -> None:
        """It is not taken, and holds nothing up; but somebody signs with a key that was replaced."""
        found: dict[Peer, set[str]] = {}
        for one in forged(held, counts):
            found.setdefault(one.peer, set()).update(_givers(one, offers))
        for peer, givers in sorted(found.items()):
            who = " and ".join(sorted(givers)) or "this node's journal"
            whom = " and ".join(sorted({*givers, peer} - {self.here.me}))
            self.alarms.sound(
                f"old key {peer}",
                f"{who} keeps a manifest of {peer} that a replaced key of {peer} signed and that does not fit what the "
                "newer key signed: it is not taken",
                f"somebody has that old key and uses it: call {whom}",
            )

    def _require_fitting(self, mine: Held, held: Mapping[str, Held], offers: Mapping[Peer, Offer]) -> None:
        """Whoever finds a replaced key on an old disk can sign anything. What I signed fits what the others signed.

        Raises:
            HeldUp: it does not; a person must find out who says something wrong.
        """
        round = mine.round - 1
        if mine.peer != self.here.me or not mine.doubtful or round < 1:
            return
        for offer in offers.values():
            named = mine.manifest.inputs.get(offer.peer)
            theirs = {h.manifest.digest for h in held.values() if (h.peer, h.manifest.round) == (offer.peer, round)}
            if known := self.here.journal.manifest(round, Peer(offer.peer)):  # of a round that nobody names any more
                theirs.add(content_digest(known["content"]))
            if named not in theirs and not offer.recovering:
                givers = _givers(mine, offers)
                raise HeldUp(
                    offer.peer,
                    f"its manifest of round {round} is not the one that this node's signature of round {round + 1} "
                    f"names, which {' and '.join(givers) or 'this node'} keeps and which was made with a key that has "
                    "been replaced since: one of them is wrong, or somebody has that key",
                )

    def _require_one_signature(self, held: Mapping[str, Held], offers: Mapping[Peer, Offer]) -> None:
        """
        Raises:
            Equivocation: two different ones of one round carry this node's signature.
            HeldUp: so it looks, but a key that was replaced made one of them, or both.
        """
        first: dict[Round, Held] = {}
        for one in held.values():
            round = one.round
            if one.peer != self.here.me or round == 0:
                continue
            before = first.setdefault(round, one)
            if before.manifest.digest == one.manifest.digest:
                continue
            for doubtful in (before, one):
                if doubtful.doubtful:
                    givers = sorted({*_givers(before, offers), *_givers(one, offers)})
                    raise HeldUp(
                        next(iter(_givers(doubtful, offers) or givers), ""),
                        f"{' and '.join(givers)} keep two different manifests of this node's round {round}, made with "
                        "a key that has been replaced since: somebody has that key, and one of them is forged",
                    )
            raise signed_twice(self.here.store, self.keys.ring, before, one)


def _givers(one: Held, offers: Mapping[Peer, Offer]) -> list[Peer]:
    return givers_of_document(hashlib.sha256(one.document).hexdigest(), offers)


def signed_twice(store: Store, ring: Keyring, first: Held, second: Held) -> Equivocation:
    """Two different manifests of one round carry this node's signature: both are kept. Gives what is to be raised."""
    evidence.keep(store, ring, first.round, first.peer, (first.document, second.document), own=True)
    return Equivocation(
        f"two different manifests of round {first.round} carry this node's signature: a clone or an old copy of it has "
        "signed one of them; both are in evidence/",
        remedy="find and stop the other copy; then agree with the other hospitals on a new federation",
    )
