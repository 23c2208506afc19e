"""When a push that failed is tried again, and that it can be cancelled."""

from __future__ import annotations

import asyncio
import itertools
import random
import threading
import time
from pathlib import Path

import asyncssh
import pytest
from hostile import until
from hypothesis import given
from hypothesis import strategies as st
from one_parcel import (
    CLIENTS,
    PEER,
    Patient,
    Receiver,
    pushing,
    run,
)
from ports import free_ports
from proxy import Proxy
from sender import Impatient

from hsl_node.federation.identity import Identity
from hsl_node.sync.send.deliver import Parcel, Transfer
from hsl_node.sync.send.push import BACKOFF, wait_for_peer
from hsl_node.sync.wire import login as refused_module
from hsl_node.sync.wire.login import RefusedKey
from hsl_node.sync.wire.transport import Client


@given(st.integers(1, 10_000), st.integers(0, 2**32))
def test_the_wait_grows_to_a_minute_and_is_drawn_over_its_whole_range(failures: int, seed: int) -> None:
    wait = BACKOFF.drawn(failures, random.Random(seed))
    assert 0 <= wait <= min(60, 2.0 ** min(failures - 1, 6))
    assert BACKOFF.drawn(failures, Patient()) == min(60, 2.0 ** min(failures - 1, 6))


def test_a_peer_that_shows_itself_is_tried_at_once(tmp_path: Path) -> None:
    async def scenario(receiver: Receiver, parcel: Parcel) -> None:
        (port,) = free_ports(1)
        wake = asyncio.Event()
        task = pushing(receiver, parcel, transfer := Transfer(PEER), port=port, wake=wake, rng=Patient())
        for _ in range(4):  # 1 s, 2 s, 4 s, 8 s: each wait is cut short
            before, since = transfer.retries, time.monotonic()
            await until(lambda n=before: transfer.retries > n)
            wake.set()
        await until(lambda: transfer.retries >= 5)
        assert transfer.state == "waiting to retry"
        assert transfer.next_try is not None and transfer.next_try - since > 8  # of 16 s
        net = Proxy(receiver.port)
        net.port = port
        async with net:
            wake.set()
            assert (await task).accepted
            assert transfer.retries == 5

    run(tmp_path, scenario)


@pytest.mark.parametrize("client", CLIENTS)
def test_after_a_refused_key_it_waits_five_minutes_and_a_peer_that_calls_ends_that_once(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refused_module, "CALLED_WAIT_S", 0.01)

    async def scenario(receiver: Receiver, parcel: Parcel) -> None:
        refused = RefusedKey(PEER, Impatient())
        stranger = Identity(asyncssh.generate_private_key("ssh-ed25519"))
        async with Proxy(receiver.port) as net:
            task = pushing(
                receiver,
                parcel,
                transfer := Transfer(PEER),
                port=net.port,
                refused=refused,
                client=client,
                identity=stranger,
            )
            for tries in (1, 2):
                since = time.monotonic()
                await until(lambda n=tries: (transfer.retries, transfer.state) == (n, "waiting to retry"))
                assert transfer.next_try is not None
                assert transfer.next_try - since > 300
                assert stranger.fingerprint in transfer.last_error
                refused.called()
            assert refused.left_s > 300, "the second call has changed nothing"
            assert net.connections == 2
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    run(tmp_path, scenario)


def test_a_server_that_says_no_is_asked_again_ever_more_rarely_though_its_node_calls_all_the_time(
    tmp_path: Path,
) -> None:
    """A full inbox: two nodes that connect to each other for other reasons must not retry once a second for it."""
    waits: list[tuple[float, float]] = []

    async def wait(seconds: float, wake: asyncio.Event, *, at_least: float) -> None:
        waits.append((seconds, at_least))
        if len(waits) == 5:
            raise asyncio.CancelledError

    async def scenario(receiver: Receiver, parcel: Parcel) -> None:
        receiver.path("parts").mkdir()  # no plain file: the server refuses each request about it
        task = pushing(receiver, parcel, transfer := Transfer(PEER), rng=Patient(), wait=wait)
        await asyncio.gather(task, return_exceptions=True)
        assert "was refused" in transfer.last_error

    run(tmp_path, scenario)
    assert waits == [(s, s) for s in (1.0, 2.0, 4.0, 8.0, 16.0)]


def test_a_peer_that_calls_does_not_shorten_a_wait_below_what_it_must_be() -> None:
    async def main() -> None:
        wake = asyncio.Event()
        wake.set()
        since = time.monotonic()
        await wait_for_peer(300, wake, at_least=0.1)
        assert time.monotonic() - since > 0.09

    asyncio.run(main())


class OnOurClock(RefusedKey):
    """The peer connects to us in every wait."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__(PEER, rng, lambda: self.clock)
        self.clock = 0.0
        self.tries: list[float] = []

    async def over(self) -> None:
        self.tries.append(self.clock)
        self.called()
        self.clock += self.left_s


@pytest.mark.parametrize("rng", [Impatient(), Patient()], ids=["shortest waits", "longest waits"])
def test_threat_30_a_refused_key_is_offered_at_most_twelve_times_an_hour_even_if_the_peer_calls_all_the_time(
    rng: random.Random, tmp_path: Path
) -> None:
    """Real logins that a real server refuses; only the waiting is done on a clock of our own."""

    async def scenario(receiver: Receiver, parcel: Parcel) -> None:
        refused = OnOurClock(rng)
        async with Proxy(receiver.port) as net:
            stranger = Identity(asyncssh.generate_private_key("ssh-ed25519"))
            task = pushing(receiver, parcel, Transfer(PEER), port=net.port, identity=stranger, refused=refused)
            await until(lambda: refused.clock > 3 * 3600)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            assert net.connections >= len(refused.tries)  # none of them was pretended
        waits = [b - a for a, b in itertools.pairwise(refused.tries)]
        assert waits[0] < 300  # woken, once
        assert min(waits[1:]) >= 300
        assert max(sum(start <= t < start + 3600 for t in refused.tries) for start in refused.tries) <= 12

    run(tmp_path, scenario)


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("state", ["sending", "waiting for receipt", "waiting to retry"])
def test_a_cancelled_push_leaves_nothing_behind(client: Client, state: str, tmp_path: Path) -> None:
    elsewhere = set(threading.enumerate())  # a library that another test used may keep one

    async def scenario(receiver: Receiver, parcel: Parcel) -> None:
        receiver.verdict = lambda data: None
        async with Proxy(receiver.port) as net:
            net.bits_per_s = 8e6 if state == "sending" else None
            if state == "waiting to retry":
                await net.down()
            task = pushing(receiver, parcel, transfer := Transfer(PEER), port=net.port, client=client, rng=Patient())
            await until(lambda: transfer.state == state)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await until(lambda: net.live == 0)
            mine = set(threading.enumerate()) - elsewhere
            assert not [t for t in mine if not t.name.startswith(("asyncio_", "MainThread", "inbox"))]

    run(tmp_path, scenario)
