"""Connections that this node opens to ask: a peer's signed list, and whatever it names. The wire is `sync/ask.py`.

Who lost state (`recovery.py`), waits (`fetch_missing.py`), doubts (`equivocation.py`) or is about to sign
(`before_signing.py`) asks here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable
from functools import partial
from typing import TypeVar

from hsl_node.errors import HslError, KeyRefused, PeerDataError, TransportError, escaped
from hsl_node.federation.names import Peer
from hsl_node.node.here import Here, Keys
from hsl_node.sync.ask import ask
from hsl_node.sync.offer import Offer
from hsl_node.sync.wire.connect import connect
from hsl_node.sync.wire.login import RefusedKey
from hsl_node.sync.wire.toll import Toll
from hsl_node.sync.wire.transport import OperationFailed, Patience, Transport

log = logging.getLogger(__name__)
T = TypeVar("T")

AT_ONCE = 8  # peers asked at a time
BEFORE_SIGNING = Patience(connect_s=10, answer_s=10)  # a peer that hangs must not hold up what the others wait for


class Links:
    def __init__(self, here: Here, keys: Keys) -> None:
        self._here = here
        self._keys = keys
        self._slots = asyncio.Semaphore(AT_ONCE)
        self.refused = {p: RefusedKey(p, random.Random()) for p in here.others}
        self.tolls = {p: Toll() for p in here.others}  # for every connection to a peer, pushes included
        self.heard: list[Callable[[Offer], None]] = []  # each list that a peer gave; not those of a recovery
        self.open: Counter[Peer] = Counter()  # connections that are here, or begun
        self.greet: Callable[[Transport, Peer], Awaitable[None]] | None = None  # whoever asks gives its sign of life
        keys.changed.append(self._keys_changed)

    def _keys_changed(self, peers: Collection[Peer], ours: bool) -> None:
        for peer in self._here.others:
            if ours or peer in peers:
                self.refused[peer].drop()
                self.refused[peer] = RefusedKey(peer, random.Random())  # it was another key that was refused

    async def offer_of(self, peer: Peer, patience: Patience = Patience(), within_s: float | None = None) -> Offer:
        """Raises: TransportError, KeyRefused, PeerDataError: it gives no list, or, once asked, not `within_s`."""
        offer = (await self.signed_offer_of(peer, patience, within_s))[0]
        for hear in self.heard:
            hear(offer)
        return offer

    async def offers_of(self, peers: Iterable[Peer]) -> tuple[dict[Peer, Offer], set[Peer]]:
        """The lists of those that give one, and who was reached at all."""
        asked = list(peers)
        answers = await asyncio.gather(*(answer(peer, self.offer_of(peer)) for peer in asked))
        found = dict(zip(asked, answers, strict=True))
        offers = {peer: offer for peer, (_, offer) in found.items() if offer is not None}
        return offers, {peer for peer, (reached, _) in found.items() if reached}

    async def signed_offer_of(
        self, peer: Peer, patience: Patience = Patience(), within_s: float | None = None
    ) -> tuple[Offer, bytes]:
        """Its list, and the document that it signed."""
        async with self._slots:  # waiting for one counts for nothing: else who hangs would take the others' time
            try:
                async with asyncio.timeout(within_s):
                    kept = self.refused[peer].keeps_one
                    try:
                        return await self._asked(peer, patience)
                    except TransportError as exc:  # the network may have forgotten a connection that was kept
                        if not kept or isinstance(exc, OperationFailed):
                            raise
                        return await self._asked(peer, patience)
            except TimeoutError as exc:
                raise TransportError(f"{peer} has not given its list in {within_s:.0f} s") from exc

    async def _asked(self, peer: Peer, patience: Patience) -> tuple[Offer, bytes]:
        here = self._here
        async with self.connected(peer, patience) as link:
            found = await ask(link, here.federation, peer=peer, me=here.me, keys=self._keys.ring.keys(peer))
            if self.greet is not None:
                with contextlib.suppress(TransportError, PeerDataError):
                    await self.greet(link, peer)
            return found

    @contextlib.asynccontextmanager
    async def connected(self, peer: Peer, patience: Patience = Patience()) -> AsyncIterator[Transport]:
        here = self._here
        card = here.federation.get(peer)
        login = partial(
            connect,
            card,
            here.me,
            self._keys.identity,
            client=here.config.client,
            patience=patience,
            host_keys=self._keys.ring.host_keys(card),
            toll=self.tolls[peer],
        )
        self.open[peer] += 1
        try:
            async with self.refused[peer].login(login, patience.connect_s, patience) as link:
                yield link
        finally:
            self.open[peer] -= 1


async def answer(peer: Peer, question: Awaitable[T]) -> tuple[bool, T | None]:
    """Was it reached, and did its link hold; and what came of the question, if anything. Raises nothing of a peer's."""
    try:
        return True, await question
    except HslError as exc:  # who says "no" is there
        log.info("not asked", extra={"peer": peer, "reason": escaped(exc.message)})
        return not isinstance(exc, TransportError | KeyRefused) or isinstance(exc, OperationFailed), None
    except OSError as exc:  # no room, say; a disk that fails in a sync ends the process (`durable.py`)
        log.warning("not taken", extra={"peer": peer, "reason": str(exc)})
    except Exception:  # whatever a peer's link does, it is no answer
        log.exception("asking broke", extra={"peer": peer})
    return True, None
