"""A name with several addresses: a dead one costs a quarter of a second, and another machine's is not the peer."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import asyncssh
import pytest
from every_transport import ME, MEMBERS, PEER, serve
from federations import stranger
from hostile import AnyKey
from ports import free_ports

from hsl_node.errors import HslError, KeyRefused, TransportError
from hsl_node.federation.strings import fingerprint
from hsl_node.sync.wire import dial
from hsl_node.sync.wire.connect import connect
from hsl_node.sync.wire.transport import Client, Login, Patience

NAME = "birch.example.org"
CARD = MEMBERS.federation.get(PEER).model_copy(update={"address": f"{NAME}:8922"})


def named(monkeypatch: pytest.MonkeyPatch, *places: tuple[str, int]) -> None:
    """The name has these addresses, in this order. All of IPv4: not every machine that tests has the other kind."""
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", place) for place in places]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **more: found)


@contextmanager
def black_hole() -> Iterator[int]:
    """A port that answers no SYN: nobody takes from its queue, which is full."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.2", 0), backlog=0))
        for _ in range(2):
            sock = stack.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]


@asynccontextmanager
async def another_server(host: str = "127.0.0.1") -> AsyncIterator[tuple[str, int]]:
    """Of another hospital, say: it lets anybody in."""
    listener = await asyncssh.listen(host, 0, server_factory=AnyKey, server_host_keys=[stranger().key], config=None)
    yield host, listener.get_port()
    listener.close()
    await listener.wait_closed()


def connected(client: Client, **options: Any) -> Any:
    return connect(CARD, ME, MEMBERS.identities[ME], client=client, **options)


def test_an_address_that_does_not_answer_is_passed_by_at_once(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It took half of the minute that a login has: 30 s for each connection."""

    async def main() -> None:
        async with serve("embedded", tmp_path) as inbox:
            with black_hole() as hole:
                named(monkeypatch, ("127.0.0.2", hole), ("127.0.0.1", inbox.port))
                async with asyncio.timeout(20), connected(client, patience=Patience(connect_s=3600)):
                    pass

    asyncio.run(main())


def test_an_address_where_nobody_listens_is_passed_by(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        monkeypatch.setattr(dial, "NEXT_S", 3600.0)  # a refusal need not wait for the moment
        async with serve("embedded", tmp_path) as inbox:
            named(monkeypatch, ("127.0.0.1", *free_ports(1)), ("127.0.0.1", inbox.port))
            async with asyncio.timeout(20), connected(client):
                pass

    asyncio.run(main())


def test_threat_01_an_address_with_another_host_key_is_not_the_peer_and_the_next_one_is_tried(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with another_server() as other, serve("embedded", tmp_path) as inbox:
            named(monkeypatch, other, ("127.0.0.1", inbox.port))
            async with connected(client):
                pass

    asyncio.run(main())


async def failure(client: Client) -> HslError:
    with pytest.raises(HslError) as caught:
        async with connected(client):
            pass
    return caught.value


def test_a_peer_of_which_every_address_is_wrong_is_told_with_each_of_them(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with another_server("127.0.0.2") as one, another_server() as two:
            named(monkeypatch, one, two)
            error = await failure(client)
        assert isinstance(error, KeyRefused)
        shown = f"shows the host key {fingerprint(stranger().public)}"
        assert f"birch at {NAME}:8922 (127.0.0.2) {shown}" in error.message
        assert f"birch at {NAME}:8922 (127.0.0.1) {shown}" in error.message

    asyncio.run(main())


def test_a_peer_that_is_away_while_another_machine_has_its_other_address_is_tried_again_soon(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A refused key is tried again after minutes, a link that broke after seconds."""

    async def main() -> None:
        async with another_server() as other:
            named(monkeypatch, other, ("127.0.0.1", *free_ports(1)))
            error = await failure(client)
        assert isinstance(error, TransportError)
        assert "shows the host key" in error.message and "cannot be reached" in error.message

    asyncio.run(main())


def test_threat_01_of_a_name_with_hundreds_of_addresses_few_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """The name is the peer's: each address may be anybody's, and takes a login's time. Of both kinds some are."""
    four = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (f"127.0.1.{n}", 1)) for n in range(1, 201)]
    six = [(socket.AF_INET6, socket.SOCK_STREAM, 6, "", (f"::{n:x}", 1, 0, 0)) for n in range(2, 202)]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **more: [*four, *six])
    login = Login.of(CARD, ME)
    found = asyncio.run(dial._look_up(login, 5.0))
    assert found == [each for pair in zip(four[:4], six[:4], strict=True) for each in pair]


def test_an_address_that_this_machine_has_no_way_to_says_nothing_of_the_peer(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine without IPv6: the other address is wrong, so the peer is."""
    connect_to = dial._connect

    async def no_way(place: Any) -> socket.socket:
        if place[4][0] == "192.0.2.1":
            raise OSError(errno.ENETUNREACH, "Network is unreachable")
        return await connect_to(place)

    async def main() -> None:
        async with another_server() as other:
            named(monkeypatch, ("192.0.2.1", 8922), other)
            assert isinstance(await failure(client), KeyRefused)
        named(monkeypatch, ("192.0.2.1", 8922))
        error = await failure(client)
        assert isinstance(error, TransportError) and "no way to its addresses" in error.message

    monkeypatch.setattr(dial, "_connect", no_way)
    asyncio.run(main())
