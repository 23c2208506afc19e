"""A login for whoever in this node connects to one peer: one wait after a refused key, one connection after another.

A login costs both ends a key exchange, and many at once behind one address push each other out. So the connection that
was of use is kept for who comes next: a push leaves it to a question, and a round to the next.

async with refused.login(lambda: connect(card, me, identity), 60) as link:   # KeyRefused: just now, or not yet time
    ...
await refused.over()  # it may be tried again
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field

from hsl_node.errors import KeyRefused, TransportError
from hsl_node.sync.wire.transport import Patience, Transport

# At most 12 tries an hour, the one for a call included: more looks like an attack to the peer's defences.
KEY_REFUSED_WAIT_S, KEY_REFUSED_JITTER = 330.0, 1.2
CALLED_WAIT_S = 1.0  # two nodes that refuse each other must not call each other at the speed of the network
HOUR_S = 3600.0
KEEP_S = 300.0  # without use; the inbox itself closes what asks nothing for twice as long


@dataclass(eq=False)
class _Kept:
    """A connection that nobody uses now."""

    link: Transport
    opened: AbstractAsyncContextManager[Transport]  # what gave it, and closes it
    end: asyncio.Task[None] | None = None
    taken: bool = False
    unwanted: asyncio.Event = field(default_factory=asyncio.Event)

    async def close_later(self) -> None:
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(KEEP_S):
                    await self.unwanted.wait()
        finally:
            if not self.taken:
                self.taken = True
                await self.close()

    async def close(self) -> None:
        await self.opened.__aexit__(None, None, None)


class RefusedKey:
    """One for each peer and pair of keys: when either side's changes, another one takes its place."""

    def __init__(self, peer: str, rng: random.Random, now: Callable[[], float] = lambda: time.monotonic()) -> None:
        self._peer, self._rng, self._now = peer, rng, now
        self._one_at_a_time = asyncio.Lock()  # else all who connect would be refused at once
        self._why: KeyRefused | None = None  # None: the last login succeeded, or there was none
        self._since = -math.inf  # when the first of these refusals came
        self._not_before = -math.inf
        self._called = -math.inf  # when a call last ended a wait
        self._sooner = asyncio.Event()
        self._kept: _Kept | None = None
        self._keeps = True

    @asynccontextmanager
    async def login(
        self,
        connect: Callable[[], AbstractAsyncContextManager[Transport]],
        seconds: float,
        patience: Patience | None = None,
    ) -> AsyncIterator[Transport]:
        """A connection that was kept, else what `connect` gives, if it is time. It is yours alone.

        `seconds`: so long another login to this peer is waited for. `patience`: for what is asked over it.

        Raises:
            KeyRefused: the peer refuses, or has refused and the wait is not over.
            TransportError: it cannot be reached, or another login is under way for too long.
        """
        try:
            async with asyncio.timeout(seconds):
                await self._one_at_a_time.acquire()
        except TimeoutError as exc:
            raise TransportError(
                f"{self._peer}: another login there has not come to an end in {seconds:.0f} s",
                remedy="the daemon tries again by itself; check network and peer",
            ) from exc
        async with AsyncExitStack() as stack:
            try:
                if self._why is not None and self.left_s > 0:
                    raise KeyRefused(self._why.message, remedy=self._why.remedy)
                if kept := await self._take():
                    link, opened = kept.link, kept.opened
                    stack.push_async_exit(opened)
                    link.patience = patience or link.patience
                else:
                    opened = connect()
                    try:
                        link = await stack.enter_async_context(opened)
                    except KeyRefused as exc:
                        self._refuse(exc)
                        raise
                self._why = None
            finally:
                self._one_at_a_time.release()
            yield link  # whoever fails over it has spoilt it
            if self._keeps and self._kept is None and link.alive():
                stack.pop_all()
                self._kept = _Kept(link, opened)
                self._kept.end = asyncio.create_task(self._kept.close_later())

    def drop(self) -> None:
        """A key was replaced: what is kept is closed, and no more is."""
        self._keeps = False
        if self._kept is not None:
            self._kept.unwanted.set()  # not `cancel`: a task that has not begun would close nothing
        self._kept = None

    async def _take(self) -> _Kept | None:
        kept, self._kept = self._kept, None
        if kept is None or kept.taken or kept.end is None:
            return None
        kept.taken = True
        kept.end.cancel()
        if not kept.link.alive():
            await kept.close()
            return None
        return kept

    @property
    def keeps_one(self) -> bool:
        """A connection, which whoever connects next gets; nobody knows whether it still leads anywhere."""
        return self._kept is not None and not self._kept.taken

    @property
    def left_s(self) -> float:
        """Of the wait."""
        return max(0.0, self._not_before - self._now())

    async def over(self) -> None:
        """Wait until it is time."""
        while (left := self.left_s) > 0:
            self._sooner.clear()
            try:
                async with asyncio.timeout(left):
                    await self._sooner.wait()
            except TimeoutError:
                pass

    def called(self) -> None:
        """The peer connects to us: it may have been started again with the right key.

        That ends a wait once; after a success once more, but not in the same hour.
        """
        now = self._now()
        if self.left_s > 0 and self._called < min(self._since, now - HOUR_S):
            self._called, self._not_before = now, min(self._not_before, now + CALLED_WAIT_S)
            self._sooner.set()

    def _refuse(self, error: KeyRefused) -> None:
        now = self._now()
        if self._why is None:
            self._since = now
        self._why = error
        self._not_before = now + KEY_REFUSED_WAIT_S * self._rng.uniform(1, KEY_REFUSED_JITTER)
