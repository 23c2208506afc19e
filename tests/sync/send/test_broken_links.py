"""A push over a link that breaks, is silent or slow goes on where it was."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest
from hostile import until
from one_parcel import (
    CLIENTS,
    PEER,
    SOON,
    Receiver,
    content,
    pushing,
    run,
)
from proxy import Proxy

from hsl_node.sync.send.deliver import Parcel, Transfer
from hsl_node.sync.wire.transport import BLOCK_BYTES, Client, Patience


@pytest.mark.parametrize("client", CLIENTS)
def test_threat_25_a_link_that_breaks_again_and_again_delays_but_does_not_stop_it(
    client: Client, tmp_path: Path
) -> None:
    async def scenario(receiver: Receiver, parcel: Parcel) -> None:
        async with Proxy(receiver.port) as net:
            net.cut_after = 3 * BLOCK_BYTES
            task = pushing(receiver, parcel, transfer := Transfer(PEER), port=net.port, client=client)
            for cut in range(1, 4):
                await until(lambda n=cut: net.cuts == n)
                if cut < 3:
                    net.cut_after = net.bytes_up + 6 * BLOCK_BYTES
            assert (await task).accepted
            assert receiver.took == [content()]
            assert transfer.retries == net.cuts == 3
            assert transfer.resent_bytes < 3 * SOON

    run(tmp_path, scenario)


def test_threat_25_an_outage_is_waited_out_and_the_transfer_goes_on_where_it_was(tmp_path: Path) -> None:
    async def scenario(receiver: Receiver, parcel: Parcel) -> None:
        async with Proxy(receiver.port) as net:
            net.bits_per_s = 16e6
            task = pushing(receiver, parcel, transfer := Transfer(PEER), port=net.port)
            await until(lambda: transfer.sent > 6 * BLOCK_BYTES)
            assert transfer.state == "sending"
            assert transfer.rate_bytes_per_s > 0
            await net.down()
            await until(lambda: transfer.retries >= 5)
            assert "cannot be reached" in transfer.last_error
            await net.up()
            assert (await task).accepted
            assert transfer.resumed_from > 2 * BLOCK_BYTES
            assert transfer.resent_bytes < SOON
        assert receiver.took == [content()]

    run(tmp_path, scenario)


def test_threat_25_a_black_hole_is_left_and_the_transfer_goes_on(tmp_path: Path) -> None:
    async def scenario(receiver: Receiver, parcel: Parcel) -> None:
        async with Proxy(receiver.port) as net:
            net.bits_per_s = 16e6
            patience = Patience(answer_s=1, slowest_bytes_per_s=1024**2)
            task = pushing(receiver, parcel, transfer := Transfer(PEER), port=net.port, patience=patience)
            await until(lambda: transfer.sent > 4 * BLOCK_BYTES)
            before = transfer.retries  # a machine that is slow enough leaves by itself
            net.hole = True
            await until(lambda: transfer.retries > before)
            assert net.swallowed and "nothing moved" in transfer.last_error
            net.hole = False
            assert (await task).accepted
            assert transfer.resent_bytes < SOON * transfer.retries

    run(tmp_path, scenario)


@pytest.mark.slow
@pytest.mark.parametrize("client", CLIENTS)
def test_threat_25_20_mb_at_4_mbit_per_s_with_the_link_gone_for_three_minutes(client: Client, tmp_path: Path) -> None:
    size = 20_000_000

    async def scenario(receiver: Receiver, parcel: Parcel) -> None:
        async with Proxy(receiver.port) as net:
            net.bits_per_s = 4e6
            task = pushing(
                receiver, parcel, transfer := Transfer(PEER), port=net.port, client=client, rng=random.Random(1)
            )
            await until(lambda: transfer.sent > size // 2)
            net.hole = True
            await asyncio.sleep(180)
            net.hole = False
            assert (await task).accepted
            assert transfer.retries >= 1
            assert transfer.resent_bytes < SOON
        assert receiver.took == [content(size=size)]

    run(tmp_path, scenario, content(size=size))
