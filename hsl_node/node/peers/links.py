"""Asks peers what they hold: lists, manifests, files. And, before each signature, whether anybody objects.

The wire is `sync/ask.py`. Who lost state (`recovery.py`), waits (`fetch_missing.py`) or doubts (`equivocation.py`)
asks here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from hsl_node.errors import (
    FederationMismatch,
    HslError,
    KeyRefused,
    LocalStateError,
    PeerDataError,
    TransportError,
    escaped,
)
from hsl_node.federation.identity import MANIFEST_NAMESPACE, verify
from hsl_node.federation.names import Digest, Peer, Round
from hsl_node.host import durable
from hsl_node.host.log_limit import one_line
from hsl_node.node.heal.mark import Mark, set_mark
from hsl_node.sync.ask import ask, fetch_file, fetch_manifest
from hsl_node.sync.clones import ALONE_S, believed
from hsl_node.sync.offer import Listed, Offer
from hsl_node.sync.wire.connect import connect
from hsl_node.sync.wire.transport import OperationFailed, Patience, Transport
from hsl_node.weights.checkpoint_file import holds

if TYPE_CHECKING:
    from hsl_node.node.daemon import Node

log = logging.getLogger(__name__)

AT_ONCE = 8  # peers asked at a time
RETRY_S = (2.0, 30.0)  # doubles: what a peer said must be settled before a signature
BEFORE_SIGNING = Patience(connect_s=10, answer_s=10)  # a peer that hangs must not hold up what the others wait for
SOON_S = 5.0  # whoever has not answered by then is named as the one we wait for
READ_S = 60.0  # for all that one list has of ours: one document settles it, where the peer is honest
READ_MAX = 16  # documents of one list; a hostile one names hundreds
DOUBLED_MAX = 3  # times; what a turn brought is kept, so short ones cost a slow line nothing
FAIR_S, FAIR_BYTES_PER_S = 60.0, 256 * 1024  # a file takes no longer from a fair giver; else the next has its turn


class HeldUp(TransportError):
    """One peer keeps us from going on; the operator must know which, and why."""

    def __init__(self, peer: str, why: str) -> None:
        super().__init__(why)
        self.peer = Peer(peer)


class Asking:
    """One for each daemon."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._slots = asyncio.Semaphore(AT_ONCE)
        self._checking = asyncio.Lock()  # a third connection to a peer would cut the first, and its answer
        self._saying: dict[Peer, float] = {}  # who says that our key is at work twice, since when
        self._unread: dict[Peer, Round] = {}  # who lists a signature of ours that we don't know, and has not shown it
        self._slow: Counter[Peer] = Counter()  # how often a giver took longer than is fair
        self._wrong: set[Peer] = set()  # whose bytes were not what it listed
        self.held_by: tuple[Peer, ...] = ()  # whose word keeps us from signing at this moment

    async def offer_of(self, peer: Peer, patience: Patience = Patience()) -> Offer:
        offer = (await self.signed_offer_of(peer, patience))[0]
        self._node.set_back.heard(offer)
        return offer

    async def signed_offer_of(self, peer: Peer, patience: Patience = Patience()) -> tuple[Offer, bytes]:
        """Its list, and the document that it signed."""
        node = self._node
        async with self._slots, self.connected(peer, patience) as link:
            return await ask(link, node.federation, peer=peer, me=node.me, keys=node.keyring.keys(peer))

    def connected(
        self, peer: Peer, patience: Patience = Patience()
    ) -> contextlib.AbstractAsyncContextManager[Transport]:
        node = self._node
        card = node.federation.get(peer)
        login = partial(
            connect,
            card,
            node.me,
            node.identity,
            client=node.config.client,
            patience=patience,
            host_keys=node.keyring.host_keys(card),
            toll=node.delivery.transfers[peer].toll,
        )
        return node.refused[peer].login(login, patience.connect_s)

    async def get(
        self,
        sha256: Digest,
        target: Path,
        offers: Mapping[str, Offer],
        tell: Callable[[Peer, str], None] = lambda giver, how_far: None,
        *,
        patient: bool = True,
    ) -> bool:
        """A file that is here already, or that a peer has. False: nobody has it.

        Who was slow, or gave wrong bytes, is asked after the others from then on. While there is another giver, one has
        its turn for as long as is fair for the size, then twice as long; what it gave is gone on with. The last one
        may take as long as its line needs. Not `patient`: it has a turn too, the caller asks again.
        `tell(giver, how far)`: with each block.

        Raises: HeldUp: nobody else has it, and the link to one that has broke; or its turn is over.
        """
        if await asyncio.to_thread(holds, target, sha256):
            await asyncio.to_thread(durable.accept, target)
            return True
        size = self._node.known_schema().file_bytes
        givers = sorted((Peer(o.peer) for o in offers.values() if sha256 in o.files), key=self._last)
        broke: HeldUp | None = None
        while givers:
            giver = givers.pop(0)
            fair_s = self._turn_s(giver, size)
            alone = not givers and broke is None and patient
            try:
                async with asyncio.timeout(None if alone else fair_s), self.connected(giver) as link:
                    folder = self._node.layout.fetched / giver
                    progress = partial(_tell_progress, tell, giver, sha256, size)
                    await fetch_file(link, sha256, size, folder, target, progress)
                log.info("taken from a peer", extra={"peer": giver, "sha256": sha256[:12]})
                self._excuse(giver)
                return True
            except TimeoutError:
                self._slow[giver] += 1
                why = f"it took longer than {fair_s:.0f} s to give {sha256[:12]}"
                log.warning("not taken", extra={"peer": giver, "reason": why})
                if givers:
                    givers.append(giver)
                else:
                    broke = HeldUp(giver, f"{giver}: {why}")
            except (OperationFailed, PeerDataError, KeyRefused) as exc:  # gone by now, or not what it should be
                log.warning("not taken", extra={"peer": giver, "reason": escaped(exc.message)})
                if isinstance(exc, PeerDataError):
                    self._name_wrong(giver, exc)
            except TransportError as exc:
                why = escaped(exc.message)
                log.warning("not taken", extra={"peer": giver, "reason": why})
                broke = HeldUp(giver, f"the link broke while it gave {sha256[:12]}, which it lists: {why}")
        if broke is not None:
            raise broke
        return False

    def _turn_s(self, giver: Peer, size: int) -> float:
        return float((FAIR_S + size / FAIR_BYTES_PER_S) * 2 ** min(self._slow[giver], DOUBLED_MAX))

    def _last(self, giver: Peer) -> tuple[bool, int, Peer]:
        return giver in self._wrong, self._slow[giver], giver

    def _excuse(self, giver: Peer) -> None:
        """It gave what it listed."""
        self._slow.pop(giver, None)
        self._wrong.discard(giver)
        self._node.alarms.settle(f"wrong bytes {giver}")

    def forget(self) -> None:
        """Another round is fused: whoever was slow, or gave wrong bytes, is asked like the others again."""
        for giver in self._node.others:
            self._excuse(giver)

    def _name_wrong(self, giver: Peer, error: PeerDataError) -> None:
        self._wrong.add(giver)
        self._node.alarms.sound(
            f"wrong bytes {giver}",
            f"{giver} listed a file and gave other bytes ({escaped(error.message)}): it is asked after all others now",
            f"call {giver}: its disk may fail, or somebody changes what its node sends",
        )

    # -------------------------------------------------------------- before each signature

    async def check(self) -> None:
        """Does anybody hold a signature of ours that we don't know of, or see another process with our key?

        Whoever cannot be reached is not waited for, but who has listed such a signature must show it, or list it no
        more; it is named from then on. Returns only when nobody objects.

        Raises:
            LocalStateError: this node was set back. The journal is marked: the next start asks everybody.
        """
        async with self._checking:
            try:
                await self._until_nobody_objects()
            finally:
                self.held_by = ()

    async def _until_nobody_objects(self) -> None:
        node, pause = self._node, RETRY_S[0]
        self._unread = {}
        while True:
            offers = await self._answers()
            self._unread = {p: r for p, r in self._unread.items() if not node.keyring.is_revoked(p)}
            self._tell_unread()
            self.held_by = tuple(sorted({*self._twice(offers), *self._unread}))
            if not self.held_by:
                return
            await asyncio.sleep(pause)
            pause = min(2 * pause, RETRY_S[1])

    async def _answers(self) -> Sequence[Offer]:
        """All are asked at once, so that a slow one costs no more time than its own; who is slow is named meanwhile.

        Raises: LocalStateError: see `check`.
        """
        questions = {p: asyncio.create_task(self._answer_of(p)) for p in self._node.others}
        try:
            _, slow = await asyncio.wait(questions.values(), timeout=SOON_S)
            self.held_by = tuple(sorted({*self.held_by, *(p for p, q in questions.items() if q in slow)}))
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
        node = self._node
        offer = await self.offer_of(peer, BEFORE_SIGNING)
        signed = node.journal.last_signed()
        known = 0 if signed is None else signed
        newer = [m for m in offer.of(node.me) if m.round > known]
        if newer:
            self._unread[peer] = max(m.round for m in newer)
            self._tell_unread()  # before it is read: that takes as long as the peer likes
            try:
                if await self._is_ours(offer, newer):
                    self._set_back(offer)
            except (TransportError, PeerDataError, KeyRefused) as exc:
                log.warning("not read", extra={"peer": offer.peer, "reason": escaped(exc.message)})
                return offer
        self._unread.pop(peer, None)
        return offer

    def _twice(self, offers: Sequence[Offer]) -> Sequence[Peer]:
        """Whose word that our key is at work twice keeps us from signing: see `sync/clones.py`. Each word is told."""
        node, now = self._node, time.monotonic()
        saying = sorted(Peer(offer.peer) for offer in offers if offer.twice)
        denying = sorted(Peer(offer.peer) for offer in offers if not offer.twice)
        before = {p: since for p, since in self._saying.items() if p not in denying}  # silence takes nothing back
        self._saying = before | {peer: before.get(peer, now) for peer in saying}
        if not saying:
            node.alarms.settle("twice")
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
        node.alarms.sound("twice", text, f"{fix}. If there is no second one, call {who}: its word holds the round up")
        return saying if held else ()

    def _tell_unread(self) -> None:
        """Who lists a signature of ours that we don't know, and has not shown it."""
        alarms = self._node.alarms
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
        try:
            async with (
                asyncio.timeout(READ_S),
                one_line("proves nothing", peer) as worthless,
                self.connected(peer, BEFORE_SIGNING) as link,
            ):
                for listed in newer[:READ_MAX]:
                    try:
                        await fetch_manifest(link, listed, self._node.federation, self._my_keys())
                        return True
                    except (PeerDataError, FederationMismatch) as exc:
                        if isinstance(exc, PeerDataError) and exc.code == "sha256":
                            raise
                        worthless(exc)
        except TimeoutError as exc:
            raise TransportError(f"what it lists of this node takes longer than {READ_S:.0f} s to read") from exc
        if len(newer) > READ_MAX:
            raise PeerDataError(
                f"it lists {len(newer)} signatures of this node; none of the first {READ_MAX} is one", code="offer"
            )
        return False

    def _my_keys(self) -> tuple[str, ...]:
        """Those that can have signed what is newer than the journal. Whoever finds a replaced key may sign anything."""
        node = self._node
        last = node.journal.last_signed()
        document = None if last is None else node.journal.signed(last)
        with contextlib.suppress(PeerDataError):
            if document is not None:
                verify(document[1], node.keyring.newest(node.me), MANIFEST_NAMESPACE)
                return node.keyring.keys(node.me)
        return node.keyring.chain(node.me)

    def _set_back(self, offer: Offer) -> None:
        last = max(m.round for m in offer.of(self._node.me))
        why = f"{offer.peer} holds its signed round {last}, of which its own journal knows nothing"
        set_mark(self._node.journal, Mark(why))
        raise LocalStateError(
            f"this node was set back: {why}",
            remedy="start it again: it asks all peers and goes on. If a second copy of it runs, stop that one first",
        )


def _tell_progress(tell: Callable[[Peer, str], None], giver: Peer, sha256: Digest, size: int, at: int) -> None:
    tell(giver, f"it gives {sha256[:12]}: {at / 2**20:.1f} of {size / 2**20:.1f} MiB")


def is_away(error: HslError) -> bool:
    """It gave no answer, or lets us in no more; who says "no" is there."""
    return isinstance(error, TransportError | KeyRefused) and not isinstance(error, OperationFailed)
