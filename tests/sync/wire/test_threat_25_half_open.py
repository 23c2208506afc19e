"""Threat 25: a connection that both ends believe in and that carries nothing is left by the sender's own deadline."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import pytest
from boxes import on_loop, until
from proxy import Proxy
from receiver import BIRCH, receiving
from sender import sending

from hsl_node.sync.send.deliver import REWIND_BLOCKS, Transfer
from hsl_node.sync.wire.transport import BLOCK_BYTES, Client, Patience

# No keepalive, and the kernel's limit is a minute: only the client's own deadlines can end a silence here in time.
PATIENCE = Patience(connect_s=2, answer_s=1, slowest_bytes_per_s=1024**2, keepalive_s=1000)
TWICE_MAX = (REWIND_BLOCKS + 1) * BLOCK_BYTES  # after one broken transfer


@pytest.mark.sample(4)
@pytest.mark.parametrize("client", ["asyncssh", "paramiko"])
@pytest.mark.parametrize(
    ("server", "fault"), [("embedded", "hole"), ("sshd", "hole"), ("embedded", "deaf"), ("embedded", "mute")]
)
@pytest.mark.parametrize("moment", ["logging in", "sending", "waiting for receipt"])
@on_loop
async def test_threat_25_a_half_open_connection_is_left_and_the_transfer_goes_on_when_the_hole_closes(
    client: Client, server: str, fault: str, moment: str, tmp_path: Path
) -> None:
    """hole: nothing passes in either direction; deaf: no answers come back; mute: nothing goes there."""
    async with receiving(server, tmp_path, blocks=6) as birch, Proxy(birch.port) as net:
        birch.silent = moment == "waiting for receipt"
        net.bits_per_s = 16e6 if moment == "sending" else None
        transfer = Transfer(BIRCH)
        if moment == "logging in":
            setattr(net, fault, True)
        task = asyncio.create_task(sending(birch, net.port, transfer, client=client, patience=PATIENCE))
        try:
            if moment == "sending":
                await until(lambda: net.bytes_up > 3 * BLOCK_BYTES and transfer.state == "sending")
            elif moment == "waiting for receipt":
                await until(lambda: transfer.state == moment)
            before = transfer.retries  # a machine that is slow enough leaves by itself
            setattr(net, fault, True)
            await until(lambda: transfer.retries > before)
            reason = transfer.last_error
            assert net.swallowed > 0  # the fault fired
            setattr(net, fault, False)
            net.bits_per_s = None
            birch.silent = False
            assert (await task).accepted
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        assert "nothing moved for" in reason
        assert birch.holds_exactly_what_was_sent() and birch.refused == []
        assert transfer.resent_bytes < TWICE_MAX * transfer.retries
