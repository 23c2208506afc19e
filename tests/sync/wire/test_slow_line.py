"""A slow line is no dead one: what is on its way follows what it carries, and whatever it brings is a sign of life."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from boxes import inbox as open_inbox
from boxes import until
from every_transport import ME, PART, content, ignore, serve
from proxy import Proxy

from hsl_node.sync.inbox.limits import Limits
from hsl_node.sync.wire import flow
from hsl_node.sync.wire.connect import connect
from hsl_node.sync.wire.flow import LEAST_BYTES, LEAST_PIECE_BYTES, MOST_BYTES, MOST_PIECE_BYTES, Flow
from hsl_node.sync.wire.transport import BLOCK_BYTES, Client, Patience

# 32 kbit/s and its minutes, scaled down: a second without a byte ends a connection here, 2 MiB take sixteen.
RATE_BITS_PER_S = 1e6
BYTES = 500_000
PATIENCE = Patience(answer_s=1.0, slowest_bytes_per_s=600_000, keepalive_s=0.25, keepalives=3)


def test_what_a_slow_line_is_sent_stays_answered(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once there were 2 MiB on their way: the first 255 KiB had their answer after 2 s, a keepalive after all of it."""
    monkeypatch.setattr(flow, "QUEUE_S", 0.2)

    async def main() -> None:
        async with serve("embedded", tmp_path, size=BYTES) as inbox, Proxy(inbox.port) as net:
            net.bits_per_s = RATE_BITS_PER_S
            card = inbox.via(net.port)
            async with connect(card, ME, inbox.identity, client=client, patience=PATIENCE) as link:
                await link.write(PART, content(BYTES), 0, create=True, progress=ignore)
                assert await link.read(PART, 0, BLOCK_BYTES) == content(BYTES)[:BLOCK_BYTES]
            assert net.connections == 1
            assert net.bytes_up < 1.03 * BYTES + 10_000  # and nothing was sent twice; 10,000: the login

    asyncio.run(main())


class Line:
    """A line that carries so much and takes so long by itself; what is on its way waits for what was there before."""

    def __init__(self, bytes_per_s: float, round_trip_s: float = 0.0) -> None:
        self.bytes_per_s, self.round_trip_s = bytes_per_s, round_trip_s
        self.now = 0.0

    def carry(self, flow: Flow, total: int) -> None:
        waiting: list[tuple[int, float, float]] = []  # (bytes, sent, answered)
        free, on_its_way = self.now, 0
        while total > 0 or waiting:
            while total > 0 and (not waiting or on_its_way + flow.piece_bytes <= flow.most_bytes):
                free = max(free, self.now) + flow.piece_bytes / self.bytes_per_s
                waiting.append((flow.piece_bytes, self.now, free + self.round_trip_s))
                on_its_way, total = on_its_way + flow.piece_bytes, total - flow.piece_bytes
            count, sent, self.now = waiting.pop(0)
            on_its_way -= count
            flow.answered(count, self.now - sent)


@pytest.mark.parametrize(
    ("bits_per_s", "round_trip_s", "least", "most"),
    [
        (32e3, 0.0, LEAST_BYTES, 40_000),  # 4,000 a second: ten seconds at most
        (4e6, 0.04, 500_000, 1_600_000),
        (100e6, 0.04, MOST_BYTES, MOST_BYTES),
        (1e9, 0.0, MOST_BYTES, MOST_BYTES),
        (100e6, 4.0, MOST_BYTES, MOST_BYTES),  # a line that is long, and not full
    ],
)
def test_some_seconds_of_what_the_line_carries_are_on_their_way(
    bits_per_s: float, round_trip_s: float, least: int, most: int
) -> None:
    flow = Flow()
    Line(bits_per_s / 8, round_trip_s).carry(flow, int(bits_per_s / 8 * 60) + 10 * MOST_BYTES)
    assert least <= flow.most_bytes <= most


def test_a_line_that_is_long_all_of_a_sudden_is_no_full_one_for_ever() -> None:
    flow, line = Flow(), Line(12.5e6, 0.02)
    line.carry(flow, 10 * MOST_BYTES)
    line.round_trip_s = 5.0
    line.carry(flow, 30 * MOST_BYTES)
    assert flow.most_bytes == MOST_BYTES


def test_a_block_goes_in_pieces_that_follow_the_line() -> None:
    flow = Flow()
    pieces = list(flow.pieces(bytes(30_000)))
    assert [(at, len(piece)) for at, piece in pieces] == [(0, LEAST_PIECE_BYTES), (12_288, 12_288), (24_576, 5424)]
    for _ in range(20):
        flow.answered(MOST_PIECE_BYTES, 0.01)
    assert [len(piece) for _, piece in flow.pieces(bytes(BLOCK_BYTES))] == [BLOCK_BYTES]


def test_any_byte_is_a_sign_of_life_for_the_inbox(tmp_path: Path) -> None:
    """Not only the answer to its own question, which waits behind all that the peer has on its way to us."""

    async def main() -> None:
        async with open_inbox(tmp_path) as box, box.connect() as connection:
            (link,) = box.admission.links
            link.conn._keepalive_count = 4  # questions without an answer; the fifth ends the connection
            connection._transport.write(b"\0")  # the begin of a packet, no more
            await until(lambda: link.conn._keepalive_count == 0)

    asyncio.run(main())


def test_both_ends_give_a_login_as_long() -> None:
    """A round trip of 4 s makes a login of 28 s: with 20 s at the inbox the client's 60 were of no use."""
    assert Limits().login_timeout_s == Patience().connect_s >= 8 * 4
