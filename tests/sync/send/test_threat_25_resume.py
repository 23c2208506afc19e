"""Threat 25: whatever lies at the receiver, and whoever falls over where, the file arrives and little is sent twice.

Both clients against both servers, with the receiver's real checks and signed receipts.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from boxes import on_loop, until
from proxy import Proxy
from receiver import BIRCH, SERVERS, Receiver, receiving
from sender import sender_process, sending

from hsl_node.sync.send.deliver import REWIND_BLOCKS, Transfer
from hsl_node.sync.wire.transport import BLOCK_BYTES, Client

BLOCKS = 6
TWICE_MAX = (REWIND_BLOCKS + 1) * BLOCK_BYTES  # after one broken transfer: two whole blocks and the torn one
TALK_BYTES = 64 * 1024  # of one connection beside the file: keys, questions, the manifest, packet headers

both_clients = pytest.mark.parametrize("client", ["asyncssh", "paramiko"])
both_servers = pytest.mark.parametrize("server", SERVERS)


PRESENT: dict[str, Callable[[int], int]] = {
    "0": lambda size: 0,
    "1": lambda size: 1,
    "1 KiB": lambda size: 1024,
    "block-1": lambda size: BLOCK_BYTES - 1,
    "block": lambda size: BLOCK_BYTES,
    "block+1": lambda size: BLOCK_BYTES + 1,
    "middle": lambda size: 4 * BLOCK_BYTES + 5,
    "size-1": lambda size: size - 1,
    "size": lambda size: size,
    "size+1": lambda size: size + 1,
}


@pytest.mark.sample(5)
@both_clients
@both_servers
@pytest.mark.parametrize("present", PRESENT)
@on_loop
async def test_threat_25_a_part_of_any_size_is_finished(
    client: Client, server: str, present: str, tmp_path: Path
) -> None:
    async with receiving(server, tmp_path, blocks=BLOCKS) as birch, Proxy(birch.port) as net:
        size = len(birch.data)
        there = PRESENT[present](size)
        birch.part.write_bytes((birch.data + b"x")[:there])
        transfer = Transfer(BIRCH)
        assert (await sending(birch, net.port, transfer, client=client)).accepted
        assert birch.holds_exactly_what_was_sent() and birch.answered() and transfer.retries == 0
        if there <= size:
            assert transfer.resumed_from == max(0, there // BLOCK_BYTES - REWIND_BLOCKS) * BLOCK_BYTES
            assert transfer.resent_bytes == there - transfer.resumed_from < TWICE_MAX
        else:
            assert transfer.resumed_from == 0  # no prefix of ours: begun anew
        assert net.bytes_up < size - transfer.resumed_from + TALK_BYTES


@pytest.mark.sample(3)
@both_clients
@both_servers
@pytest.mark.parametrize(
    ("where", "at", "refused", "sent_times"),
    [
        ("early", 1000, ["sha256"], 2),  # only the hash can find it
        ("late", 3 * BLOCK_BYTES - 1, [], 1),  # in the block before the resume point, which is compared
        ("last block", 5 * BLOCK_BYTES - 1, [], 0),  # in what is sent again anyhow
    ],
)
@on_loop
async def test_threat_25_one_other_byte_in_a_part_of_the_right_length_never_reaches_the_model(
    client: Client, server: str, where: str, at: int, refused: list[str], sent_times: int, tmp_path: Path
) -> None:
    """`sent_times`: how often the file is sent from its first byte; 0: only its last blocks."""
    async with receiving(server, tmp_path, blocks=BLOCKS) as birch, Proxy(birch.port) as net:
        wrong = bytearray(birch.data[: 5 * BLOCK_BYTES])
        wrong[at] ^= 1
        birch.part.write_bytes(wrong)
        transfer = Transfer(BIRCH)
        assert (await sending(birch, net.port, transfer, client=client)).accepted
        assert birch.holds_exactly_what_was_sent() and birch.answered()
        assert birch.refused == refused
        assert transfer.resumed_from == (0 if sent_times else 3 * BLOCK_BYTES)
        tail = len(birch.data) - 3 * BLOCK_BYTES
        expected = {0: tail, 1: len(birch.data), 2: tail + len(birch.data)}[sent_times]
        assert expected < net.bytes_up < expected + 2 * TALK_BYTES


@pytest.mark.sample(9)
@both_clients
@both_servers
@pytest.mark.parametrize("tenth", range(1, 10))
@pytest.mark.parametrize("falls", ["the line", "the receiver", "the sender"])
@on_loop
async def test_threat_25_whoever_falls_over_at_any_tenth_of_the_file_the_rest_goes_on_where_it_was(
    client: Client, server: str, falls: str, tenth: int, tmp_path: Path
) -> None:
    """The line is reset; sshd and the sender get SIGKILL; the embedded inbox drops all it holds open."""
    async with receiving(server, tmp_path, blocks=BLOCKS) as birch, Proxy(birch.port) as net:
        size = len(birch.data)
        net.cut_after = size * tenth // 10
        transfer = Transfer(BIRCH)
        if falls == "the sender":
            with sender_process(birch, net.port, client=client) as process:
                net.at_cut = lambda: _done(process.kill)
                await until(lambda: net.cuts == 1 and not process.is_alive())
        elif falls == "the receiver":
            net.at_cut = lambda: _restart(birch, net)
        receipt = await sending(birch, net.port, transfer, client=client)
        assert net.cuts == 1  # the fault fired
        assert receipt.accepted and birch.holds_exactly_what_was_sent() and birch.answered()
        assert birch.refused == []
        assert (transfer.retries == 0) == (falls == "the sender")  # its next process starts afresh
        tries = max(1, transfer.retries)
        assert transfer.resent_bytes < TWICE_MAX * tries
        assert net.bytes_up < size * (tenth + 10) // 10 - transfer.resumed_from + TALK_BYTES + TWICE_MAX * (tries - 1)


async def _done(action: Callable[[], None]) -> None:
    action()


async def _restart(birch: Receiver, net: Proxy) -> None:
    await birch.kill()
    await birch.start()
    net.target_port = birch.port
