"""A peer's checkpoint that is at other peers and not on its way here: taken before this node lost its state, say.

    its sender's manifest of the next round is here     it sends older rounds first, so it has a receipt that we forgot
    anybody's manifest of the next round is here,       that one has fused it; its sender may think that we are
    and nothing has come for a minute                   checking what it sent before the loss, and send it much later

A recovery takes such checkpoints from the peers (`recovery.py`); but nobody else may have had it then, or its sender
could not be asked.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from hsl_node.errors import HslError, escaped
from hsl_node.sync import durable
from hsl_node.sync.ask import fetch_manifest
from hsl_node.sync.durable import Step
from hsl_node.sync.manifest import Manifest
from hsl_node.sync.names import INBOX, RECEIPTS, Kind, Peer
from hsl_node.sync.offer import Offer
from hsl_node.sync.round import Phase

if TYPE_CHECKING:
    from hsl_node.node import Node

log = logging.getLogger(__name__)

LOOK_S = 2.0
PATIENCE_S = 60.0  # a checkpoint that is being checked, or between two attempts, comes by itself
PAUSE_S = (4.0, 600.0)  # between two times that all are asked; doubles


async def watch(node: Node) -> None:
    """For ever: fetch what is not on its way from whoever has it."""
    pause, since = PAUSE_S[0], dict[Peer, float]()
    while True:
        now, elsewhere = time.monotonic(), _elsewhere(node)
        since = {p: since.get(p, now) for p in elsewhere}
        lost = tuple(p for p, certain in elsewhere.items() if certain or now - since[p] >= PATIENCE_S)
        for peer in node.others:
            if peer not in lost:
                node.alarms.settle(f"lost {peer}")
        if not lost:
            pause = PAUSE_S[0]
            await asyncio.sleep(LOOK_S)
            continue
        for peer in lost:
            node.alarms.sound(
                f"lost {peer}",
                f"the checkpoint of {peer} is at other peers and not on its way here: they are asked for it",
                "see that the other hospitals' nodes run; where none of them can be asked, restore a backup",
            )
        for giver in node.others:
            try:
                await _fetch(node, giver, lost)
            except HslError as exc:
                log.info("not asked", extra={"peer": giver, "reason": escaped(exc.message)})
            except OSError as exc:  # no room, say; a disk that fails in a sync ends the process (`durable.py`)
                log.warning("not taken", extra={"peer": giver, "reason": str(exc)})
            except Exception:  # whatever a peer's link does, it is no answer
                log.exception("asking broke", extra={"peer": giver})
        await asyncio.sleep(pause)
        pause = min(2 * pause, PAUSE_S[1])


def _elsewhere(node: Node) -> dict[Peer, bool]:
    """Whom this node waits for though others have fused it; True: it will not be sent again."""
    state = node.known_state()
    if state.phase is Phase.HALTED or state.me not in state.have or not state.early:
        return {}
    coming = node.server.incoming() if node.server else {}
    missing = (p for p in state.missing if p not in coming and not node.keyring.is_revoked(p))
    return {p: p in state.early for p in missing}


async def _fetch(node: Node, giver: Peer, lost: tuple[Peer, ...]) -> None:
    round = node.known_state().round
    offer = await node.asking.offer_of(giver)
    for listed in offer.manifests:
        if listed.round == round and listed.peer in lost:
            async with node.asking.connected(giver) as link:
                keys = node.keyring.keys(listed.peer)
                manifest, document = await fetch_manifest(link, listed, node.federation, keys)
            if await place(node, manifest, document, {giver: offer}):
                node.intake.wake(Peer(listed.peer))


async def place(node: Node, manifest: Manifest, document: bytes, offers: Mapping[str, Offer]) -> bool:
    """Put a peer's manifest, and its checkpoint from whoever offers it, into its inbox here, as if it had just come.

    The usual intake checks, admits and answers it. False: nobody has the checkpoint.
    """
    home = node.intake.homes / manifest.peer
    name = manifest.file_name()
    data = home / INBOX / str(name.of(Kind.DATA))
    if not manifest.statement and not await node.asking.get(name.sha256, data, offers):
        return False
    (home / RECEIPTS / str(name.of(Kind.RECEIPT))).unlink(missing_ok=True)
    await asyncio.to_thread(durable.write, home / INBOX / str(name), document, Step.RECOVERY_PLACE)
    return True
