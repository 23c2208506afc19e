"""Before each signature: does anybody hold one of ours that we don't know of, or see another process with our key?"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

from hsl_node.errors import HslError, KeyRefused, LocalStateError, PeerDataError, TransportError, escaped
from hsl_node.federation.identity import MANIFEST_NAMESPACE, verify
from hsl_node.federation.names import Peer, Round
from hsl_node.host.pace import Pace
from hsl_node.node.alarms import Alarms
from hsl_node.node.heal.mark import Mark, set_mark
from hsl_node.node.here import Here, Keys
from hsl_node.node.peers.links import BEFORE_SIGNING, Links
from hsl_node.sync.ask import READ_MAX, read_documents
from hsl_node.sync.clones import ALONE_S, believed
from hsl_node.sync.findings import newer_of_mine
from hsl_node.sync.offer import Listed, Offer
from hsl_node.sync.wire.transport import OperationFailed

log = logging.getLogger(__name__)

RETRY = Pace(2, 30)  # what a peer said must be settled before a signature
LIST_S = 60.0  # for one list, however slowly it is given, and however many addresses the peer's name has
SOON_S = 5.0  # whoever has not answered by then is named as the one we wait for
READ_S = 60.0  # for all that one list has of ours: one document settles it, where the peer is honest


@dataclass
class BeforeSigning:
    here: Here
    keys: Keys
    alarms: Alarms
    links: Links

    def __post_init__(self) -> None:
        self._one_at_a_time = asyncio.Lock()  # a third connection to a peer would cut the first, and its answer
        self._saying: dict[Peer, float] = {}  # who says that our key is at work twice, since when
        self._unread: dict[Peer, Round] = {}  # who lists a signature of ours that we don't know, and has not shown it
        self.waiting_for: tuple[Peer, ...] = ()  # whose word keeps us from signing at this moment

    async def check(self) -> None:
        """Does anybody hold a signature of ours that we don't know of, or see another process with our key?

        Whoever cannot be reached is not waited for, but who has listed such a signature must show it, or list it no
        more; it is named from then on. Returns only when nobody objects.

        Raises:
            LocalStateError: this node was set back. The journal is marked: the next start asks everybody.
        """
        async with self._one_at_a_time:
            self._unread = {}
            try:
                for pause_s in RETRY.waits():
                    offers = await self._answers()
                    self._unread = {p: r for p, r in self._unread.items() if not self.keys.ring.is_revoked(p)}
                    self._tell_unread()
                    self.waiting_for = tuple(sorted({*self._twice(offers), *self._unread}))
                    if not self.waiting_for:
                        return
                    await asyncio.sleep(pause_s)
            finally:
                self.waiting_for = ()

    async def _answers(self) -> Sequence[Offer]:
        """All are asked at once, so that a slow one costs no more time than its own; who is slow is named meanwhile.

        Raises: LocalStateError: see `check`.
        """
        questions = {p: asyncio.create_task(self._answer_of(p)) for p in self.here.others}
        try:
            _, slow = await asyncio.wait(questions.values(), timeout=SOON_S)
            self.waiting_for = tuple(sorted({*self.waiting_for, *(p for p, q in questions.items() if q in slow)}))
            answers = await asyncio.gather(*questions.values(), return_exceptions=True)
        finally:
            for question in questions.values():
                question.cancel()
            await asyncio.gather(*questions.values(), return_exceptions=True)
        for answer in answers:
            if isinstance(answer, LocalStateError):
                raise answer
            if isinstance(answer, Exception) and not isinstance(answer, HslError):
                log.error("asking broke", exc_info=answer)
        return [a for a in answers if isinstance(a, Offer)]

    async def _answer_of(self, peer: Peer) -> Offer:
        """Its list, after what that has of ours was read.

        Raises:
            LocalStateError: see `check`.
            TransportError, PeerDataError, KeyRefused: it gives no list.
        """
        here = self.here
        offer = await self.links.offer_of(peer, BEFORE_SIGNING, LIST_S)
        if newer := newer_of_mine(offer, here.me, here.journal.last_signed()):
            self._unread[peer] = last = Round(max(m.round for m in newer))
            self._tell_unread()  # before it is read: that takes as long as the peer likes
            try:
                if await self._is_ours(offer, newer):
                    self._set_back(peer, last)
            except (TransportError, PeerDataError, KeyRefused) as exc:
                log.warning("not read", extra={"peer": offer.peer, "reason": escaped(exc.message)})
                return offer
        self._unread.pop(peer, None)
        return offer

    def _twice(self, offers: Sequence[Offer]) -> Sequence[Peer]:
        """Whose word that our key is at work twice keeps us from signing: see `sync/clones.py`. Each word is told."""
        now = time.monotonic()
        saying = sorted(Peer(offer.peer) for offer in offers if offer.twice)
        denying = sorted(Peer(offer.peer) for offer in offers if not offer.twice)
        before = {p: since for p, since in self._saying.items() if p not in denying}  # silence takes nothing back
        self._saying = before | {peer: before.get(peer, now) for peer in saying}
        if not saying:
            self.alarms.settle("twice")
            return ()
        who, others = ", ".join(saying), ", ".join(denying)
        text = f"another process with this node's key is at work, says {who}: a clone, or a copy of the state directory"
        fix = "stop the one that is not meant to run, then restart the other: it asks its peers and goes on"
        held = believed(len(saying), len(denying), now - self._saying[saying[0]])
        if held:
            text += ". This node signs nothing more"
            if len(saying) == 1 and denying:
                text += f" for {ALONE_S / 60:.0f} minutes; {others}, asked as well, so far saw one process only"
        else:
            text += f". Not believed any more: {others}, asked as often, saw one process only. This node signs"
        self.alarms.sound("twice", text, f"{fix}. If there is no second one, call {who}: its word holds the round up")
        return saying if held else ()

    def _tell_unread(self) -> None:
        """Who lists a signature of ours that we don't know, and has not shown it."""
        alarms = self.alarms
        if self._unread:
            what = "; ".join(f"{peer} (round {round})" for peer, round in sorted(self._unread.items()))
            alarms.sound(
                "not shown",
                f"a peer lists a signature of this node that its own journal does not know, and has not shown it: "
                f"{what}. This node signs nothing before that is settled",
                "see that the hospital's node runs and can be reached; if it goes on, call that hospital",
            )
        else:
            alarms.settle("not shown")

    async def _is_ours(self, offer: Offer, newer: Sequence[Listed]) -> bool:
        """A list is a peer's word; our own signature is proof. What is shown and is no signature of ours is none.

        Raises:
            TransportError, KeyRefused: it cannot be read now, or not in READ_S.
            PeerDataError: what is given is not what is listed; or more is listed than is read.
        """
        peer = Peer(offer.peer)
        link, federation = self.links.connected(peer, BEFORE_SIGNING), self.here.federation
        try:
            async with asyncio.timeout(READ_S):
                shown = await read_documents(
                    link, peer, newer, federation, self._my_keys, take=lambda *_: True, passes=_was_shown
                )
        except TimeoutError as exc:
            raise TransportError(f"what it lists of this node takes longer than {READ_S:.0f} s to read") from exc
        if not shown and len(newer) > READ_MAX:
            raise PeerDataError(
                f"it lists {len(newer)} signatures of this node; none of the first {READ_MAX} is one", code="offer"
            )
        return bool(shown)

    def _my_keys(self, me: str) -> tuple[str, ...]:
        """Those that can have signed what is newer than the journal. Whoever finds a replaced key may sign anything."""
        journal, ring = self.here.journal, self.keys.ring
        last = journal.last_signed()
        document = None if last is None else journal.signed(last)
        with contextlib.suppress(PeerDataError):
            if document is not None:
                verify(document[1], ring.newest(me), MANIFEST_NAMESPACE)
                return ring.keys(me)
        return ring.chain(me)

    def _set_back(self, peer: Peer, last: Round) -> None:
        why = f"{peer} holds its signed round {last}, of which its own journal knows nothing"
        set_mark(self.here.journal, Mark(why))
        raise LocalStateError(
            f"this node was set back: {why}",
            remedy="start it again: it asks all peers and goes on. If a second copy of it runs, stop that one first",
        )


def _was_shown(listed: Listed, error: HslError) -> bool:
    """It is what the list names, whatever that proves."""
    return not isinstance(error, OperationFailed) and not (isinstance(error, PeerDataError) and error.code == "sha256")
