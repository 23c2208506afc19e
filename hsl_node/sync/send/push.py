"""Send one checkpoint to one peer, again and again, until that peer's signed receipt says what became of it."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

from hsl_node.errors import HslError, KeyRefused, TransportError, escaped
from hsl_node.federation.config import Federation, PeerCard
from hsl_node.federation.identity import Identity
from hsl_node.federation.names import Peer
from hsl_node.host.pace import Pace
from hsl_node.sync.manifest import Receipt
from hsl_node.sync.send.deliver import LOST, Known, Parcel, Transfer, deliver
from hsl_node.sync.wire.connect import connect
from hsl_node.sync.wire.login import RefusedKey
from hsl_node.sync.wire.transport import Client, OperationFailed, Patience

Wait = Callable[..., Awaitable[None]]  # (seconds, wake, *, at_least)

log = logging.getLogger(__name__)

# A peer that comes back is found within a minute, half a minute on average.
BACKOFF = Pace(first_s=1.0, longest_s=60.0)
WOKEN_WAIT_S = 1.0  # two nodes that fail to serve each other must not wake each other at the speed of the network


async def wait_for_peer(seconds: float, wake: asyncio.Event, *, at_least: float) -> None:
    """Sleep, but not beyond `at_least` if the peer shows itself."""
    await asyncio.sleep(min(at_least, seconds))
    try:
        async with asyncio.timeout(max(0.0, seconds - at_least)):
            await wake.wait()
    except TimeoutError:
        pass


async def push(
    card: PeerCard,
    parcel: Parcel,
    *,
    me: Peer,
    identity: Identity,
    federation: Federation,
    client: Client,
    transfer: Transfer,
    wake: asyncio.Event,
    refused: RefusedKey,
    rng: random.Random,
    patience: Patience = Patience(),
    wait: Wait = wait_for_peer,
    keys: Sequence[str] | None = None,
    host_keys: Sequence[str] | None = None,
    on_lost: Callable[[Transfer], None] = lambda transfer: None,
) -> Receipt:
    """Deliver `parcel` to the peer of `card`, however long that takes. `wake`: try at once, the peer is there.

    `refused`: whether its key is refused there, as all who connect to this peer know it.
    `keys`, `host_keys`: what the peer may sign its receipt with and what its server may show; None: as the card says.

    `on_lost`: the peer's server has taken whole checkpoints and lost them; the pauses grow.

    Gives back the peer's receipt: it accepts, or refuses for a reason that sending again cannot mend.

    Raises:
        LocalStateError: our checkpoint file cannot be read.
    """
    known = Known()
    login = partial(
        connect, card, me, identity, client=client, patience=patience, host_keys=host_keys, toll=transfer.toll
    )
    transfer.begin(parcel)
    failures = 0  # in a row, without any progress
    while True:
        before = transfer.most
        transfer.enter("connecting")
        wake.clear()
        try:
            async with refused.login(login, patience.connect_s, patience) as link:
                receipt = await deliver(
                    link, parcel, card=card, federation=federation, transfer=transfer, known=known, keys=keys
                )
                transfer.last_error = ""
                transfer.enter("done" if receipt.accepted else "refused")
                return receipt
        except KeyRefused as exc:
            _note(transfer, exc, refused.left_s)
            await refused.over()
        except TransportError as exc:
            failures = 1 if transfer.most > before else failures + 1
            seconds, at_least = BACKOFF.drawn(failures, rng), 0.0 if failures == 1 else WOKEN_WAIT_S
            if isinstance(exc, OperationFailed):  # its server said no, a full inbox say: that it is there is no news
                at_least = seconds
            # Whole copies that its server took and then had no more; the first may be that server's bad day.
            if lost_s := LOST.after(transfer.lost_bytes // max(transfer.total, 1) - 1):
                seconds = at_least = lost_s
                on_lost(transfer)
            _note(transfer, exc, seconds)
            await wait(seconds, wake, at_least=at_least)
        except HslError:
            raise
        except Exception as exc:  # one peer's link must never end this node: a bug of ours or theirs, told in the log
            failures += 1
            seconds = BACKOFF.drawn(failures, rng)
            log.exception("push broke", extra={"peer": card.name, "round": parcel.name.round})
            _note(transfer, TransportError(f"{card.name}: {type(exc).__name__}: {escaped(str(exc))}"), seconds)
            await wait(seconds, wake, at_least=WOKEN_WAIT_S)


def _note(transfer: Transfer, error: TransportError | KeyRefused, seconds: float) -> None:
    transfer.retries += 1
    transfer.last_error = error.message
    transfer.enter("waiting to retry")
    transfer.next_try = time.monotonic() + seconds
    fields = {"peer": transfer.peer, "round": transfer.round, "bytes": transfer.sent, "wait_s": round(seconds, 1)}
    log.warning("push failed, trying again", extra={**fields, "reason": error.message})
