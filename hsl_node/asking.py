"""Asks peers what they hold: lists, manifests, files. And, before each signature, whether anybody objects.

The wire is `sync/ask.py`. Who lost state (`recovery.py`), waits (`missing.py`) or doubts (`proof.py`) asks here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Mapping, Sequence
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
from hsl_node.identity import MANIFEST_NAMESPACE, verify
from hsl_node.recover_mark import Mark, set_mark
from hsl_node.sync.ask import ask, fetch_file, fetch_manifest
from hsl_node.sync.names import Digest, Peer, Round
from hsl_node.sync.offer import Listed, Offer
from hsl_node.sync.runs import ALONE_S, believed
from hsl_node.sync.tensors import sha256_of
from hsl_node.sync.transport import OperationFailed, Patience, Transport, connect

if TYPE_CHECKING:
    from hsl_node.node import Node

log = logging.getLogger(__name__)

AT_ONCE = 8  # peers asked at a time
KEY_REFUSED_WAIT_S = 300.0  # as a push waits: more looks like an attack
RETRY_S = (2.0, 30.0)  # doubles: what a peer said must be settled before a signature
BEFORE_SIGNING = Patience(connect_s=10, answer_s=10)  # a peer that hangs must not hold up what the others wait for


class Asking:
    """One for each daemon."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._refused: dict[Peer, tuple[float, KeyRefused]] = {}  # not before then; why
        self._slots = asyncio.Semaphore(AT_ONCE)
        self._checking = asyncio.Lock()  # a third connection to a peer would cut the first, and its answer
        self._saying: dict[Peer, float] = {}  # who says that our key is at work twice, since when
        self.held_by: tuple[Peer, ...] = ()  # whose word keeps us from signing at this moment

    async def offer_of(self, peer: Peer, patience: Patience = Patience()) -> Offer:
        node = self._node
        not_before, refused = self._refused.get(peer, (0.0, None))
        if refused is not None and time.monotonic() < not_before:
            raise KeyRefused(refused.message, remedy=refused.remedy)
        try:
            async with self._slots, self.connected(peer, patience) as link:
                return await ask(link, node.federation, peer=peer, me=node.me, keys=node.keyring.keys(peer))
        except KeyRefused as exc:
            self._refused[peer] = time.monotonic() + KEY_REFUSED_WAIT_S, exc
            raise

    def forgive(self, peer: Peer) -> None:
        """Another key counts now: it is asked at once."""
        self._refused.pop(peer, None)

    def connected(
        self, peer: Peer, patience: Patience = Patience()
    ) -> contextlib.AbstractAsyncContextManager[Transport]:
        node = self._node
        card = node.federation.get(peer)
        return connect(
            card,
            node.me,
            node.identity,
            client=node.config.client,
            patience=patience,
            host_keys=node.keyring.host_keys(card),
        )

    async def get(self, sha256: Digest, target: Path, offers: Mapping[str, Offer]) -> bool:
        """A file that is here already, or that a peer has. False: nobody has it.

        Raises: TransportError: nobody else has it, and the link to one that has broke.
        """
        if await asyncio.to_thread(holds, target, sha256):
            return True
        broke: TransportError | None = None
        for offer in offers.values():
            if sha256 in offer.files:
                giver = Peer(offer.peer)
                folder = self._node.layout.fetched / giver
                try:
                    async with self.connected(giver) as link:
                        await fetch_file(link, sha256, self._node.known_schema().file_bytes, folder, target)
                    log.info("taken from a peer", extra={"peer": offer.peer, "sha256": sha256[:12]})
                    return True
                except (OperationFailed, PeerDataError, KeyRefused) as exc:  # gone by now, or not what it should be
                    log.warning("not taken", extra={"peer": offer.peer, "reason": escaped(exc.message)})
                except TransportError as exc:
                    log.warning("not taken", extra={"peer": offer.peer, "reason": escaped(exc.message)})
                    broke = exc
        if broke is not None:
            raise broke
        return False

    # -------------------------------------------------------------- before each signature

    async def check(self) -> None:
        """Does anybody hold a signature of ours that we don't know of, or see another process with our key?

        Whoever cannot be reached is not waited for, but who has listed such a signature must show it, or list it no
        more. Returns only when nobody objects.

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
        unread: dict[Peer, Round] = {}
        while True:
            answers = await asyncio.gather(
                *(self.offer_of(p, BEFORE_SIGNING) for p in node.others), return_exceptions=True
            )
            offers = [a for a in answers if isinstance(a, Offer)]
            for answer in answers:
                if isinstance(answer, Exception) and not isinstance(answer, HslError):
                    log.error("asking broke", exc_info=answer)
            signed = node.journal.last_signed()
            known = -1 if signed is None else signed
            for offer in offers:
                unread.pop(Peer(offer.peer), None)
                if not (newer := [m for m in offer.of(node.me) if m.round > max(known, 0)]):
                    continue
                try:
                    is_ours = await self._is_ours(offer, newer)
                except HslError as exc:
                    log.warning("not read", extra={"peer": offer.peer, "reason": escaped(exc.message)})
                    unread[Peer(offer.peer)] = max(m.round for m in newer)
                else:
                    if is_ours:
                        self._set_back(offer)
            unread = {p: r for p, r in unread.items() if not node.keyring.is_revoked(p)}
            self.held_by = tuple(sorted({*self._twice(offers), *self._unread(unread)}))
            if not self.held_by:
                return
            await asyncio.sleep(pause)
            pause = min(2 * pause, RETRY_S[1])

    def _twice(self, offers: Sequence[Offer]) -> Sequence[Peer]:
        """Whose word that our key is at work twice keeps us from signing: see `sync/runs.py`. Each word is told."""
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

    def _unread(self, unread: Mapping[Peer, Round]) -> Sequence[Peer]:
        """Who lists a signature of ours that we don't know, and does not show it."""
        alarms = self._node.alarms
        if unread:
            what = "; ".join(f"{peer} (round {round})" for peer, round in sorted(unread.items()))
            alarms.sound(
                "not shown",
                f"a peer lists a signature of this node that its own journal does not know, and does not show it: "
                f"{what}. This node signs nothing before that is settled",
                "see that the hospital's node runs and can be reached; if it goes on, call that hospital",
            )
        else:
            alarms.settle("not shown")
        return tuple(unread)

    async def _is_ours(self, offer: Offer, newer: Sequence[Listed]) -> bool:
        """A list is a peer's word; our own signature is proof.

        Raises: TransportError, KeyRefused: it cannot be read now.
        """
        async with self.connected(Peer(offer.peer), BEFORE_SIGNING) as link:
            for listed in newer:
                try:
                    await fetch_manifest(link, listed, self._node.federation, self._my_keys())
                    return True
                except (PeerDataError, FederationMismatch) as exc:
                    log.warning("proves nothing", extra={"peer": offer.peer, "reason": escaped(exc.message)})
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


def is_away(error: HslError) -> bool:
    """It gave no answer, or lets us in no more; who says "no" is there."""
    return isinstance(error, TransportError | KeyRefused) and not isinstance(error, OperationFailed)


def holds(path: Path, sha256: str) -> bool:
    """Is this the file? It may go at any moment: the intake moves what it claims."""
    with contextlib.suppress(FileNotFoundError):
        return sha256_of(path) == sha256
    return False
