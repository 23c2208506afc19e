"""A key that a peer refuses is offered to it at most twelve times an hour, whoever in the node would connect."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import chaos_sim
import pytest
from boxes import inbox, on_loop
from chaos_link import Connected
from chaos_plan import identity_of, undisturbed
from chaos_site import Life
from federations import ASH, BIRCH, stranger
from virtual_time import BEGIN_S, OWNER, VirtualLoop

from hsl_node.errors import KeyRefused, TransportError
from hsl_node.federation.names import Peer
from hsl_node.node.daemon import Daemon
from hsl_node.sync.wire.connect import connect
from hsl_node.sync.wire.login import RefusedKey
from hsl_node.sync.wire.transport import Client

WAIT_S = (330.0, 396.0)  # between two tries
HOUR_S = 3600.0


def most_in_an_hour(tries: list[float]) -> int:
    return max(sum(start <= t < start + HOUR_S for t in tries) for start in tries)


# ---------------------------------------------------------------- a whole node, by a clock that jumps


@dataclass
class Door:
    """birch's, in a simulated federation of real nodes: shut to ash from the fifth second on. Times from the start."""

    monkeypatch: pytest.MonkeyPatch
    opens_s: float = float("inf")
    calls: bool = True  # False: birch cannot reach ash either
    change: Callable[[Daemon], None] | None = None  # done at ash 100 s after the first refusal
    refused: list[float] = field(default_factory=list)
    let_in: list[float] = field(default_factory=list)
    by: set[str] = field(default_factory=set)  # which of ash's tasks was refused

    def simulate(self, rounds: int) -> chaos_sim.Outcome:
        door = self

        class AtTheDoor(Connected):
            def __init__(self, net: Any, card: Any, me: Peer, *args: Any, **more: Any) -> None:
                super().__init__(net, card, me, *args, **more)
                self.way = me, card.name

            async def __aenter__(self) -> Connected:
                await asyncio.sleep(0.3)  # a login takes its time: others begin meanwhile
                now = self.net.loop.now - BEGIN_S
                try:
                    if self.way == (ASH, BIRCH) and 5 < now < door.opens_s:
                        door.note(now)
                        raise KeyRefused("birch does not accept our key")
                    if self.way == (BIRCH, ASH) and 5 < now < door.opens_s and not door.calls:
                        raise TransportError("ash cannot be reached")
                except BaseException:
                    self._wire.leave()
                    raise
                link = await super().__aenter__()
                if self.way == (ASH, BIRCH):
                    door.let_in.append(now)
                return link

        self.monkeypatch.setattr(chaos_sim, "Connected", AtTheDoor)
        return chaos_sim.simulate(undisturbed((3, rounds, "weighted_mean")), "", expected=None)

    def note(self, now: float) -> None:
        task, life = asyncio.current_task(), OWNER.get()
        assert task is not None and isinstance(life, Life) and life.node is not None
        self.by.add(task.get_name())
        if self.change is not None and not self.refused:
            asyncio.get_running_loop().call_later(100, self.change, life.node)
        self.refused.append(now)


@pytest.mark.sample(2)
@pytest.mark.parametrize("calls", [True, False], ids=["the peer calls", "the peer is silent"])
def test_threat_30_a_node_offers_a_refused_key_at_most_twelve_times_an_hour_over_several_rounds(
    calls: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each round brings another push; the node asks before it signs, looks for proof and for what is missing."""
    door = Door(monkeypatch, calls=calls)
    outcome = door.simulate(rounds=5)
    assert len(outcome.fused) > 4, "the rounds went on, with birch's checkpoints from cedar"
    assert len(door.by) > 2, "more than one task was refused"
    waits = [b - a for a, b in itertools.pairwise(door.refused)]
    assert sum(waits) > 2.5 * HOUR_S
    assert most_in_an_hour(door.refused) <= 12
    assert sum(wait < WAIT_S[0] for wait in waits) <= 1, "one that a call has ended"
    assert max(waits) < WAIT_S[1] + 2


@pytest.mark.parametrize("calls", [True, False], ids=["the peer calls", "the peer is silent"])
def test_a_peer_that_takes_our_key_again_is_reached_within_one_wait(
    calls: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    door = Door(monkeypatch, opens_s=3000.0, calls=calls)
    outcome = door.simulate(rounds=3)
    assert outcome.problems == [], "every round was fused by all"
    assert len(door.refused) >= 7
    first = min(t for t in door.let_in if t > 5)
    assert first <= min(door.opens_s, door.refused[-1]) + WAIT_S[1] + 2
    assert all(t < first for t in door.refused)


def own_key(daemon: Daemon) -> None:
    """As it is read anew from its file."""
    daemon.keys.change(daemon.keys.ring, identity_of("another"))


def revoked_and_back(daemon: Daemon) -> None:
    before = daemon.keys.ring
    daemon.keys.change(before.revoking(BIRCH, ""), daemon.keys.identity)
    daemon.keys.change(before, daemon.keys.identity)


@pytest.mark.sample(2)
@pytest.mark.parametrize("change", [own_key, revoked_and_back])
def test_another_key_ends_the_wait(change: Callable[[Daemon], None], monkeypatch: pytest.MonkeyPatch) -> None:
    nonces: list[str] = []

    def changed(daemon: Daemon) -> None:
        nonces.append(daemon.keys.identity.run)
        change(daemon)
        nonces.append(daemon.keys.identity.run)

    door = Door(monkeypatch, calls=False, change=changed)
    door.simulate(rounds=1)
    assert nonces[0] == nonces[1], "peers know it by that: another one would be a clone beside it"
    first, second, third = door.refused[:3]
    assert 100 <= second - first < 130
    assert third - second >= WAIT_S[0]


# ---------------------------------------------------------------- one peer's refusals alone


class Spent(str):
    """A connection that cannot be kept for another use."""

    def alive(self) -> bool:
        return False


@contextlib.asynccontextmanager
async def knock(letting_in: Callable[[], bool], tries: list[float]) -> AsyncIterator[Any]:
    """In place of a connection to the peer."""
    await asyncio.sleep(0.1)
    tries.append(asyncio.get_running_loop().time())
    if not letting_in():
        raise KeyRefused("refused", remedy="mend it")
    yield Spent("link")


def run(story: Callable[[VirtualLoop], Awaitable[None]]) -> None:
    with VirtualLoop(random.Random(1)) as loop:
        loop.run_until_complete(story(loop))


def test_of_many_that_connect_at_once_one_offers_the_key_and_all_are_told_why() -> None:
    tries: list[float] = []

    async def story(loop: VirtualLoop) -> None:
        refused = RefusedKey(BIRCH, random.Random(1))

        async def one() -> None:
            async with refused.login(lambda: knock(lambda: False, tries), 60):
                raise AssertionError("it was let in")

        for n in (1, 2):
            told = await asyncio.gather(*(one() for _ in range(5)), return_exceptions=True)
            assert [(type(t), t.remedy) for t in told if isinstance(t, KeyRefused)] == [(KeyRefused, "mend it")] * 5
            assert len(tries) == n
            await refused.over()

    run(story)
    assert WAIT_S[0] < tries[1] - tries[0] < WAIT_S[1] + 1


def test_a_login_that_hangs_is_waited_for_no_longer_than_the_caller_has_patience() -> None:
    async def story(loop: VirtualLoop) -> None:
        refused = RefusedKey(BIRCH, random.Random(1))

        @contextlib.asynccontextmanager
        async def black_hole() -> AsyncIterator[Any]:
            await asyncio.sleep(60)
            raise TransportError("silent")
            yield

        async def push() -> None:
            async with refused.login(black_hole, 60):
                pass

        pushing, begin = asyncio.create_task(push()), loop.now
        await asyncio.sleep(1)
        with pytest.raises(TransportError, match="birch: another login there"):
            async with refused.login(lambda: knock(lambda: True, []), 10):
                pass
        assert loop.now - begin == pytest.approx(11)
        with pytest.raises(TransportError, match="silent"):
            await pushing
        async with refused.login(lambda: knock(lambda: True, []), 10) as link:
            assert link == "link", "that was no refusal"

    run(story)


@pytest.mark.parametrize("seed", range(20))
def test_threat_30_whatever_the_peer_does_it_refuses_us_at_most_twelve_times_an_hour(seed: int) -> None:
    """It takes our key, refuses it, calls, all by the dice; several tasks of ours want to connect all the time."""
    chance = random.Random(seed)
    tries: list[float] = []
    refusals: list[float] = []
    calls = chance.choice((1.0, 60.0, 900.0))
    takes = chance.choice((0.0, 0.1, 0.5, 0.9))

    async def story(loop: VirtualLoop) -> None:
        refused = RefusedKey(BIRCH, chance)

        def letting_in() -> bool:
            if chance.random() < takes:
                return True
            refusals.append(loop.now)
            return False

        async def connecting(pause: float) -> None:
            while True:
                with contextlib.suppress(KeyRefused):
                    async with refused.login(lambda: knock(letting_in, tries), 60):
                        pass
                await asyncio.sleep(pause)

        async def calling() -> None:
            while True:
                refused.called()
                await asyncio.sleep(chance.uniform(0, 2 * calls))

        tasks = [asyncio.create_task(t) for t in (connecting(7), connecting(50), connecting(51), calling())]
        await asyncio.sleep(4 * HOUR_S)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    run(story)
    assert refusals
    assert most_in_an_hour(refusals) <= 12
    early = [(a, b) for a, b in itertools.pairwise(refusals) if b - a < WAIT_S[0]]
    for (before, _), (_, after) in itertools.pairwise(early):
        assert after - before >= HOUR_S, "a call ends a wait once an hour at most"


@pytest.mark.parametrize("client", ["asyncssh", "paramiko"])
@on_loop
async def test_either_host_key_of_the_overlap_is_taken_and_no_third(tmp_path: Path, client: Client) -> None:
    first, second, third = stranger(), stranger(1), stranger(2)
    async with inbox(tmp_path) as box:
        card = box.members.federation.get("ash").model_copy(update={"address": f"127.0.0.1:{box.port}"})
        me = box.members.identities[BIRCH]
        for shown in (box.members.identities[ASH], first):
            box.server.show(shown)  # for new connections; the port stays
            async with connect(card, BIRCH, me, client=client, host_keys=(first.public, card.key)):
                assert box.admission.connected() == {BIRCH}
        with pytest.raises(KeyRefused) as caught:
            async with connect(card, BIRCH, me, client=client, host_keys=(second.public, third.public)):
                raise AssertionError("a key that nobody pinned was taken")
        for key in (first, second, third):
            assert key.fingerprint in caught.value.message
