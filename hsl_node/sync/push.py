"""Send one checkpoint to one peer, again and again, until that peer's signed receipt says what became of it."""

from __future__ import annotations

import asyncio
import logging
import random
import time

from hsl_node.config import Federation, PeerCard
from hsl_node.errors import HslError, KeyRefused, TransportError, escaped
from hsl_node.identity import Identity
from hsl_node.sync.deliver import Known, Parcel, Transfer, deliver
from hsl_node.sync.manifest import Receipt
from hsl_node.sync.names import Peer
from hsl_node.sync.transport import Client, Patience, connect

__all__ = ["Known", "Parcel", "Transfer", "deliver", "push"]

log = logging.getLogger(__name__)

BACKOFF_BASE_S = 1.0  # doubles with every failure; the wait is drawn evenly from 0 to that: peers don't march in step
BACKOFF_CAP_S = 60.0  # a peer that comes back is found within a minute, half a minute on average
WOKEN_WAIT_S = 1.0  # two nodes that fail to serve each other must not wake each other at the speed of the network
KEY_REFUSED_WAIT_S = 300.0  # at most 12 tries an hour: more looks like an attack to the peer's defences


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
    rng: random.Random,
    patience: Patience = Patience(),
) -> Receipt:
    """Deliver `parcel` to the peer of `card`, however long that takes. `wake`: try at once, the peer is there.

    Gives back the peer's receipt: it accepts, or refuses for a reason that sending again cannot mend.

    Raises:
        LocalStateError: our checkpoint file cannot be read.
    """
    known = Known()
    transfer.begin(parcel)
    failures = 0  # in a row, without any progress
    while True:
        before = transfer.sent
        transfer.enter("connecting")
        wake.clear()
        try:
            async with connect(card, me, identity, client=client, patience=patience) as link:
                receipt = await deliver(link, parcel, card=card, federation=federation, transfer=transfer, known=known)
                transfer.last_error = ""
                transfer.enter("done" if receipt.accepted else "refused")
                return receipt
        except KeyRefused as exc:
            wait = KEY_REFUSED_WAIT_S * rng.uniform(1, 1.2)
            _note(transfer, exc, wait)
            await asyncio.sleep(wait)  # not woken: the peer being there does not make it like our key
        except TransportError as exc:
            failures = 1 if transfer.sent > before else failures + 1
            wait = backoff_s(failures, rng)
            _note(transfer, exc, wait)
            await _wait(wait, wake, at_least=0 if failures == 1 else WOKEN_WAIT_S)
        except HslError:
            raise
        except Exception as exc:  # one peer's link must never end this node: a bug of ours or theirs, told in the log
            failures += 1
            wait = backoff_s(failures, rng)
            log.exception("push broke", extra={"peer": card.name, "round": parcel.name.round})
            _note(transfer, TransportError(f"{card.name}: {type(exc).__name__}: {escaped(str(exc))}"), wait)
            await _wait(wait, wake, at_least=WOKEN_WAIT_S)


def backoff_s(failures: int, rng: random.Random) -> float:
    """Exponential back-off with full jitter."""
    return rng.uniform(0, min(BACKOFF_CAP_S, BACKOFF_BASE_S * 2.0 ** min(failures - 1, 30)))


def _note(transfer: Transfer, error: TransportError | KeyRefused, wait: float) -> None:
    transfer.retries += 1
    transfer.last_error = error.message
    transfer.enter("waiting to retry")
    transfer.next_try = time.monotonic() + wait
    fields = {"peer": transfer.peer, "round": transfer.round, "bytes": transfer.sent, "wait_s": round(wait, 1)}
    log.warning("push failed, trying again", extra={**fields, "reason": error.message})


async def _wait(seconds: float, wake: asyncio.Event, *, at_least: float) -> None:
    await asyncio.sleep(min(at_least, seconds))
    try:
        async with asyncio.timeout(max(0.0, seconds - at_least)):
            await wake.wait()
    except TimeoutError:
        pass
