"""A peer that sends: in this process, or in a process of its own that can be killed with SIGKILL.

receipt = await sending(birch, net.port, transfer, client="paramiko")
with sender_process(birch, net.port, client="asyncssh") as process:
    process.kill()
"""

from __future__ import annotations

import asyncio
import multiprocessing
import random
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess

import asyncssh
from receiver import ASH, MEMBERS, Receiver

from hsl_node.federation.config import Federation, PeerCard
from hsl_node.federation.identity import Identity
from hsl_node.sync.manifest import Receipt
from hsl_node.sync.send.deliver import Parcel, Transfer
from hsl_node.sync.send.push import push
from hsl_node.sync.wire.login import RefusedKey
from hsl_node.sync.wire.transport import Client, Patience


class Impatient(random.Random):
    """Draws the shortest wait between two tries."""

    def uniform(self, a: float, b: float) -> float:
        return max(a, 0.01)


async def sending(
    receiver: Receiver, port: int, transfer: Transfer, *, client: Client, patience: Patience = Patience()
) -> Receipt:
    return await push(
        receiver.card(port),
        receiver.parcel,
        me=ASH,
        identity=MEMBERS.identities[ASH],
        federation=MEMBERS.federation,
        client=client,
        transfer=transfer,
        wake=asyncio.Event(),
        refused=RefusedKey(receiver.card(port).name, Impatient()),
        rng=Impatient(),
        patience=patience,
    )


@contextmanager
def sender_process(receiver: Receiver, port: int, *, client: Client) -> Iterator[BaseProcess]:
    """Forked from a process that has everything imported, so that it costs milliseconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["hsl_node.sync.wire.asyncssh_client", "hsl_node.sync.wire.paramiko_client", __name__]
    )
    key = MEMBERS.identities[ASH].key.export_private_key("openssh")
    process = context.Process(
        target=_send, args=(receiver.card(port), receiver.parcel, MEMBERS.federation, key, client), daemon=True
    )
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def _send(card: PeerCard, parcel: Parcel, federation: Federation, key: bytes, client: Client) -> None:
    asyncio.run(
        push(
            card,
            parcel,
            me=ASH,
            identity=Identity(asyncssh.import_private_key(key)),
            federation=federation,
            client=client,
            transfer=Transfer(card.name),  # type: ignore[arg-type]
            wake=asyncio.Event(),
            refused=RefusedKey(card.name, Impatient()),
            rng=Impatient(),
        )
    )
