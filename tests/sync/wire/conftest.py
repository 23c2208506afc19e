"""Every client with every server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from every_transport import ME, Scenario, serve

from hsl_node.sync.wire.connect import connect
from hsl_node.sync.wire.transport import Client


@pytest.fixture(params=["asyncssh", "paramiko"])
def client(request: pytest.FixtureRequest) -> Client:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(params=["embedded", "sshd"])
def server(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def over(client: Client, server: str, tmp_path: Path) -> Callable[..., None]:
    """Run a scenario over one connection of `client` to a fresh `server`."""

    def run(scenario: Scenario, **options: Any) -> None:
        async def main() -> None:
            async with (
                serve(server, tmp_path, **options) as inbox,
                connect(inbox.card, ME, inbox.identity, client=client) as link,
            ):
                await scenario(link, inbox)

        asyncio.run(main())

    return run
