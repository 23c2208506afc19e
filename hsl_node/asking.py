"""Asks peers what they hold: lists, manifests, files. And, before each signature, whether anybody objects.

The wire is `sync/ask.py`. Who lost state (`recovery.py`), waits (`missing.py`) or doubts (`proof.py`) asks here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from hsl_node.errors import HslError, KeyRefused, LocalStateError, PeerDataError, TransportError, escaped
from hsl_node.recover_mark import Mark, set_mark
from hsl_node.sync.ask import ask, fetch_file, fetch_manifest
from hsl_node.sync.names import Digest, Peer, Round
from hsl_node.sync.offer import Offer
from hsl_node.sync.tensors import sha256_of
from hsl_node.sync.transport import OperationFailed, Patience, Transport, connect

if TYPE_CHECKING:
    from hsl_node.node import Node

log = logging.getLogger(__name__)

AT_ONCE = 8  # peers asked at a time
KEY_REFUSED_WAIT_S = 300.0  # as a push waits: more looks like an attack
TWICE_RETRY_S = 30.0
BEFORE_SIGNING = Patience(connect_s=10, answer_s=10)  # a peer that hangs must not hold up what the others wait for


class Asking:
    """One for each daemon."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._not_before: dict[Peer, float] = {}  # after a refused key
        self._slots = asyncio.Semaphore(AT_ONCE)

    async def offer_of(self, peer: Peer, patience: Patience = Patience()) -> Offer:
        node = self._node
        if time.monotonic() < self._not_before.get(peer, 0):
            raise TransportError(f"{peer} refused our key; it is asked again later")
        try:
            async with self._slots, self.connected(peer, patience) as link:
                return await ask(link, node.federation, peer=peer, me=node.me, keys=node.keyring.keys(peer))
        except KeyRefused:
            self._not_before[peer] = time.monotonic() + KEY_REFUSED_WAIT_S
            raise

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
        """A file that is here already, or that a peer has. False: nobody has it."""
        if await asyncio.to_thread(holds, target, sha256):
            return True
        for offer in offers.values():
            if sha256 in offer.files:
                try:
                    async with self.connected(Peer(offer.peer)) as link:
                        await fetch_file(link, sha256, self._node.known_schema().file_bytes, target)
                    log.info("taken from a peer", extra={"peer": offer.peer, "sha256": sha256[:12]})
                    return True
                except (OperationFailed, PeerDataError, KeyRefused) as exc:  # gone by now, or not what it should be
                    log.warning("not taken", extra={"peer": offer.peer, "reason": escaped(exc.message)})
        return False

    # -------------------------------------------------------------- before each signature

    async def check(self) -> None:
        """Does anybody hold a signature of ours that we don't know of, or see another process with our key?

        Whoever cannot be reached is not waited for. Returns only when nobody objects.

        Raises:
            LocalStateError: this node was set back. The journal is marked: the next start asks everybody.
        """
        node = self._node
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
                if any(m.round > max(known, 0) for m in offer.of(node.me)) and await self._is_ours(offer, known):
                    self._set_back(offer)
            twice = sorted(offer.peer for offer in offers if offer.twice)
            if not twice:
                return node.alarms.settle("twice")
            node.alarms.sound(
                "twice",
                f"another process with this node's key is at work, says {', '.join(twice)}: a clone, or a second copy "
                "of the state directory. This node signs nothing more",
                "stop the one that is not meant to run, then restart the other: it asks its peers and goes on",
            )
            await asyncio.sleep(TWICE_RETRY_S)

    async def _is_ours(self, offer: Offer, known: Round) -> bool:
        """A list is a peer's word; our own signature is proof."""
        with contextlib.suppress(HslError):
            async with self.connected(Peer(offer.peer), BEFORE_SIGNING) as link:
                for listed in offer.of(self._node.me):
                    if listed.round > max(known, 0):
                        await fetch_manifest(link, listed, self._node.federation, self._node.keyring.chain(listed.peer))
                        return True
        return False

    def _set_back(self, offer: Offer) -> None:
        last = max(m.round for m in offer.of(self._node.me))
        why = f"{offer.peer} holds its signed round {last}, of which its own journal knows nothing"
        set_mark(self._node.journal, Mark(why))
        raise LocalStateError(
            f"this node was set back: {why}",
            remedy="start it again: it asks all peers and goes on. If a second copy of it runs, stop that one first",
        )


def holds(path: Path, sha256: str) -> bool:
    """Is this the file? It may go at any moment: the intake moves what it claims."""
    with contextlib.suppress(FileNotFoundError):
        return sha256_of(path) == sha256
    return False
