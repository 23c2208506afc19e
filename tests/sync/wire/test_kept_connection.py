"""One connection after another to a peer is one connection: a login costs both ends a key exchange."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import pytest
from every_transport import ME, PEER, Inbox, serve
from hostile import until
from proxy import Proxy

from hsl_node.errors import TransportError
from hsl_node.sync.wire import login as login_module
from hsl_node.sync.wire.connect import connect
from hsl_node.sync.wire.login import RefusedKey
from hsl_node.sync.wire.transport import Client, Patience, Transport


class Node:
    """Whoever in this node connects to the peer, by way of `net`."""

    def __init__(self, inbox: Inbox, net: Proxy, client: Client) -> None:
        self.net = net
        self.logins = RefusedKey(PEER, random.Random(1))
        self._connect = partial(connect, inbox.via(net.port), ME, inbox.identity, client=client)

    async def ask(self, patience: Patience = Patience(), fail: bool = False) -> Transport:
        async with self.logins.login(self._connect, 60, patience) as link:
            if fail:
                raise TransportError("this connection is of no use")
            return link


Story = Callable[[Node], Awaitable[None]]


def run(story: Story, client: Client, folder: Path) -> None:
    async def main() -> None:
        async with serve("embedded", folder) as inbox, Proxy(inbox.port) as net:
            await story(Node(inbox, net, client))

    asyncio.run(main())


def test_who_connects_after_another_has_its_connection(client: Client, tmp_path: Path) -> None:
    async def story(node: Node) -> None:
        first = await node.ask()
        hurried = Patience(answer_s=7)
        assert await node.ask(hurried) is first and first.patience is hurried
        assert node.net.connections == 1

    run(story, client, tmp_path)


def test_who_connects_beside_another_has_one_of_its_own_and_one_is_kept(client: Client, tmp_path: Path) -> None:
    async def story(node: Node) -> None:
        async with node.logins.login(node._connect, 60):
            await node.ask()
        await until(lambda: node.net.live == 1)
        assert node.net.connections == 2

    run(story, client, tmp_path)


def test_a_connection_over_which_something_failed_is_closed(client: Client, tmp_path: Path) -> None:
    async def story(node: Node) -> None:
        with pytest.raises(TransportError):
            await node.ask(fail=True)
        await until(lambda: node.net.live == 0)
        await node.ask()
        assert node.net.connections == 2

    run(story, client, tmp_path)


def test_a_kept_connection_that_broke_is_not_used(client: Client, tmp_path: Path) -> None:
    async def story(node: Node) -> None:
        first = await node.ask()
        await node.net.down()
        await node.net.up()
        await until(lambda: not first.alive())
        assert await node.ask() is not first
        assert node.net.connections == 2

    run(story, client, tmp_path)


def test_a_connection_that_was_kept_a_thousand_times_can_be_closed(tmp_path: Path) -> None:
    """Each use must leave nothing behind: a pair of idle nodes asks so often in a day."""

    async def story(node: Node) -> None:
        first = await node.ask()
        for _ in range(1000):
            assert await node.ask() is first
        node.logins.drop()  # in the moment in which it was put aside
        await until(lambda: node.net.live == 0)

    run(story, "asyncssh", tmp_path)


def test_a_connection_that_nobody_uses_is_closed_after_a_while(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(login_module, "KEEP_S", 0.05)

    async def story(node: Node) -> None:
        await node.ask()
        await until(lambda: node.net.live == 0)
        await node.ask()
        assert node.net.connections == 2

    run(story, client, tmp_path)


def test_threat_17_a_connection_of_keys_that_were_replaced_is_closed_at_once_and_none_is_kept(
    client: Client, tmp_path: Path
) -> None:
    async def story(node: Node) -> None:
        await node.ask()
        async with node.logins.login(node._connect, 60):
            node.logins.drop()
        await until(lambda: node.net.live == 0)
        await node.ask()
        node.logins.drop()
        await until(lambda: node.net.live == 0)

    run(story, client, tmp_path)
