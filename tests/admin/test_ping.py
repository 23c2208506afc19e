"""`peer ping` sends something heavy both ways: a line may let a login pass and lose every large packet."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from every_transport import ME, MEMBERS, serve
from proxy import Proxy

from hsl_node.admin import ping
from hsl_node.federation.keyring import Keyring
from hsl_node.federation.node_toml import NodeConfig
from hsl_node.sync.wire.transport import Client

LARGEST_BYTES = 6000  # a login's are smaller


@pytest.fixture(params=["asyncssh", "paramiko"])
def client(request: pytest.FixtureRequest) -> Client:
    return request.param  # type: ignore[no-any-return]


def pinged(client: Client, folder: Path, **line: int) -> tuple[ping.Answer, list[Path]]:
    """The answer, and what is left in parts/."""

    async def main() -> tuple[ping.Answer, list[Path]]:
        async with serve("embedded", folder) as inbox, Proxy(inbox.port) as net:
            for what, value in line.items():
                setattr(net, what, value)
            node = NodeConfig(name=ME, address="127.0.0.1:1", client=client)
            ring = Keyring.of(MEMBERS.federation)
            card, fed8 = inbox.via(net.port), MEMBERS.federation.fed8
            answer = await ping._one(card, node, MEMBERS.identities[ME], ring, fed8)
            assert bool(net.swallowed) == bool(line)
            return answer, list((inbox.home / "parts").iterdir())

    return asyncio.run(main())


def test_64_kib_go_there_and_come_back_and_nothing_is_left(client: Client, tmp_path: Path) -> None:
    answer, left = pinged(client, tmp_path)
    assert answer.exit_code == 0 and answer.weight_s is not None and left == []
    assert "logged in" in ping.text(answer) and "; 64 KiB there and back, " in ping.text(answer)


@pytest.mark.parametrize(("line", "way"), [("largest_up", "sent there"), ("largest_down", "asked for")])
def test_a_line_that_loses_large_packets_is_called_that(
    client: Client, line: str, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A black hole for packets above its MTU: the login passed, pushes said "nothing moved" for ever."""
    monkeypatch.setattr(ping, "ANSWER_S", 1.0)
    answer, _ = pinged(client, tmp_path, **{line: LARGEST_BYTES})
    assert answer.exit_code == 13 and answer.seconds is None
    assert f"small packets pass, large ones {way} do not (MTU)" in answer.error
    assert "mtu 1280" in answer.remedy and "FAILED: small packets pass" in ping.text(answer)


@pytest.mark.parametrize("line", ["largest_up", "largest_down"])
def test_what_a_broken_line_leaves_in_the_inbox_is_no_more_after_many_pings(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A site has 16 places there: a ping every few minutes filled them, and its checkpoint was refused for a day."""
    monkeypatch.setattr(ping, "ANSWER_S", 0.5)
    left = [{part.name for part in pinged("asyncssh", tmp_path, **{line: LARGEST_BYTES})[1]} for _ in range(3)]
    assert left[0] == left[2] and len(left[0]) <= ping.PARTS_SENT


def test_a_server_that_takes_no_such_file_is_reached_all_the_same(client: Client, tmp_path: Path) -> None:
    (tmp_path / "homes" / ME / "parts").mkdir(parents=True)
    for number in range(64):  # as many as the inbox has places
        name = f"hsl1_{MEMBERS.federation.fed8}_r000001_ash_{number:064x}.manifest.part"
        (tmp_path / "homes" / ME / "parts" / name).touch()
    answer, left = pinged(client, tmp_path)
    assert answer.exit_code == 0 and answer.weight_s is None and len(left) == 64
