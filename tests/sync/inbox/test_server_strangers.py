"""Strangers at the embedded inbox: they make room for an honest peer, whatever their number and their addresses."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import asyncssh
import pytest
from boxes import ASH, CEDAR, Box, inbox, on_loop, until
from hostile import log_in as connect

from hsl_node.sync.inbox.limits import source_of


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [("192.0.2.1", "192.0.2.2", False), ("::ffff:192.0.2.1", "192.0.2.1", True), ("2001:db8::1", "2001:db8::f", True),
     ("::ffff:192.0.2.1", "::ffff:192.0.2.2", False), ("2001:db8::1", "2001:db8:0:1::1", False),
     ("fe80::1%eth0", "fe80::2", True)],
)  # fmt: skip
def test_threat_05_a_source_is_an_ipv4_address_or_an_ipv6_network(one: str, other: str, same: bool) -> None:
    assert (source_of(one) == source_of(other)) == same


@on_loop
async def test_threat_05_silent_strangers_make_room_for_an_honest_peer(tmp_path: Path) -> None:
    """200 connections that say nothing, from the address that the honest peer uses too."""
    async with inbox(tmp_path) as box:
        silent = [await asyncio.open_connection("127.0.0.1", box.port) for _ in range(200)]
        await box.honest()
        assert box.counted.unauthenticated <= box.admission.limits.strangers_per_source
        assert box.counted.evicted >= 200 - box.admission.limits.strangers_per_source
        for _, writer in silent:
            writer.close()
        await until(lambda: box.counted.unauthenticated == 0)


@on_loop
async def test_threat_05_a_burst_of_strangers_is_capped_at_once(tmp_path: Path) -> None:
    async with inbox(tmp_path) as box:
        most = 0
        real = box.admission.admit

        def admit(link: Any) -> None:
            nonlocal most
            real(link)
            most = max(most, box.counted.unauthenticated)

        box.admission.admit = admit  # type: ignore[method-assign]
        burst = await asyncio.gather(*(asyncio.open_connection("127.0.0.1", box.port) for _ in range(90)))
        await until(lambda: box.counted.evicted == 90 - box.admission.limits.strangers_per_source)
        assert most == box.admission.limits.strangers_per_source
        await box.honest()
        for _, writer in burst:
            writer.close()


@on_loop
async def test_threat_05_strangers_are_capped_in_total_as_well(tmp_path: Path) -> None:
    async with inbox(tmp_path, strangers=5, strangers_per_source=100) as box:
        silent = [await asyncio.open_connection("127.0.0.1", box.port) for _ in range(20)]
        await until(lambda: box.counted.evicted == 15)
        await box.honest()
        assert box.counted.unauthenticated <= 5
        for _, writer in silent:
            writer.close()


class Newest(random.Random):
    """A lot that falls on the last; `crowds` tells among how many."""

    def __init__(self) -> None:
        super().__init__(0)
        self.crowds: list[int] = []

    def choice(self, seq: Any) -> Any:
        self.crowds.append(len(seq))
        return seq[-1]


ELSEWHERE = {name: f"{name}.example.org:2222" for name in ("ash", "birch", "cedar")}


@on_loop
async def test_threat_05_a_source_that_a_peer_logged_in_from_has_places_of_its_own(tmp_path: Path) -> None:
    """cedar's line is slow: a hundred strangers of as many sources come between its connection and its login."""
    async with inbox(tmp_path, addresses=ELSEWHERE, strangers=8, sweep_s=3600) as box:
        await box.honest()
        async with slow_login(box) as login, flood(box, 100):
            await until(lambda: box.counted.evicted == 92)
            assert await login() == "logged in"


@on_loop
async def test_threat_05_the_address_of_the_federation_file_has_them_from_the_start(tmp_path: Path) -> None:
    """The daemon was just started, so nobody logged in yet."""
    addresses = ELSEWHERE | {"cedar": "127.0.0.1:9"}
    async with (
        inbox(tmp_path, addresses=addresses, strangers=8, sweep_s=3600) as box,
        slow_login(box) as login,
        flood(box, 100),
    ):
        await until(lambda: box.counted.evicted == 92)
        assert await login() == "logged in"


@on_loop
async def test_threat_05_who_makes_room_is_drawn_by_lot_among_the_busiest_sources(tmp_path: Path) -> None:
    """Nobody has logged in yet. The oldest is as good as the newest; here the lot always falls on the newest."""
    lot = Newest()
    async with (
        inbox(tmp_path, addresses=ELSEWHERE, lot=lot, strangers=8, sweep_s=3600) as box,
        slow_login(box) as login,
        flood(box, 4, "127.0.9.1"),
        flood(box, 10),
    ):
        await until(lambda: box.counted.evicted == 7)
        assert lot.crowds == [4, 3, 2, 9, 9, 9, 9]
        assert await login() == "logged in"


@asynccontextmanager
async def slow_login(box: Box) -> AsyncIterator[Callable[[], Awaitable[str]]]:
    """A connection of cedar's from 127.0.0.1 that the inbox has taken; the login goes on when it is called for."""
    go, there = asyncio.Event(), asyncio.Event()

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
        writer.close()

    async def held(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ours, theirs = await asyncio.open_connection("127.0.0.1", box.port)
        await until(lambda: box.counted.unauthenticated == 1)
        there.set()
        await go.wait()
        await asyncio.gather(carry(reader, theirs), carry(ours, writer))

    async def log_in() -> str:
        key = box.members.identities[CEDAR].key
        host_key = box.members.identities[ASH].key.convert_to_public()
        async with connect(proxy.sockets[0].getsockname()[1], CEDAR, key, host_key):
            return "logged in"

    proxy = await asyncio.start_server(held, "127.0.0.1", 0)
    task = asyncio.create_task(log_in())
    await there.wait()

    def login() -> Awaitable[str]:
        go.set()
        return task

    try:
        yield login
    finally:
        task.cancel()
        proxy.close()


@asynccontextmanager
async def flood(box: Box, count: int, source: str = "") -> AsyncIterator[None]:
    """Silent connections, each from a source of its own, or all from one."""
    writers = []
    for number in range(count):
        address = source or f"127.0.{1 + number // 200}.{1 + number % 200}"
        _, writer = await asyncio.open_connection("127.0.0.1", box.port, local_addr=(address, 0))
        writers.append(writer)
    try:
        yield
    finally:
        for writer in writers:
            writer.close()


@on_loop
async def test_all_peers_behind_one_gateway_log_in_at_once(tmp_path: Path) -> None:
    """From 24 on they pushed each other out. Here one more than the lot spares: twice as many as there are peers."""
    async with inbox(tmp_path, strangers=1, strangers_per_source=1, sweep_s=3600) as box, flood(box, 4, "127.0.9.1"):
        await until(lambda: box.counted.unauthenticated == 4)
        assert box.counted.evicted == 0
        async with flood(box, 1, "127.0.9.1"):
            await until(lambda: box.counted.evicted == 1)


@on_loop
async def test_threat_05_a_stranger_has_so_long_to_log_in(tmp_path: Path) -> None:
    async with inbox(tmp_path, login_timeout_s=0.2) as box:
        reader, writer = await asyncio.open_connection("127.0.0.1", box.port)
        await reader.read()  # ends when the server closes it
        writer.close()
        await until(lambda: box.counted.unauthenticated == 0)


@on_loop
async def test_threat_20_strangers_of_many_addresses_share_one_budget_of_log_lines(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Each address had twenty lines a minute of its own; an IPv6 /48 has 65,536 of what counts as one."""
    key = asyncssh.generate_private_key("ssh-ed25519")
    async with inbox(tmp_path, addresses=ELSEWHERE, log_lines_per_minute=5, sweep_s=3600) as box:
        await box.honest()  # from 127.0.0.1
        for number in range(12):
            with pytest.raises(asyncssh.PermissionDenied):
                await box.connect(key=key, local_addr=(f"127.0.9.{1 + number}", 0))
        for _ in range(2):
            with pytest.raises(asyncssh.PermissionDenied):
                await box.connect(key=key)
        refused = [r.__dict__["source"] for r in caplog.records if r.getMessage() == "login refused"]
        assert refused == [f"127.0.9.{1 + number}" for number in range(5)] + ["127.0.0.1"] * 2
        assert box.counted.auth_failures == 14
        box.admission.lines._until = 0.0  # the minute is over
        box.admission.lines.flush()
        (told,) = [r for r in caplog.records if r.getMessage() == "and more like these"]
        assert (told.__dict__["about"], told.__dict__["lines"]) == ("all strangers", 7)
