"""A peer's checkpoint that was taken here before this node lost its state, so that its sender will not send it again.

A sender delivers older rounds first and goes on when it has our receipt. So whoever has brought its manifest of the
next round, while that of this round is not here, has a receipt of ours that we know nothing of. A recovery takes such
checkpoints from the peers (`recovery.py`); but nobody else may have had it then, or its sender could not be asked.
"""

from __future__ import annotations

import asyncio
import logging
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
PAUSE_S = (4.0, 600.0)  # between two times that all are asked; doubles


async def watch(node: Node) -> None:
    """For ever: fetch what will not be sent again from whoever has it."""
    pause = PAUSE_S[0]
    while True:
        lost = _lost(node)
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
                f"the checkpoint of {peer} was taken here before this node lost its state, and {peer} will not send it "
                "again: the other peers are asked for it",
                "see that the other hospitals' nodes run; where none of them can be asked, restore a backup",
            )
        for giver in node.others:
            try:
                await _fetch(node, giver, lost)
            except HslError as exc:
                log.info("not asked", extra={"peer": giver, "reason": escaped(exc.message)})
            except Exception:  # whatever a peer's link does, it is no answer
                log.exception("asking broke", extra={"peer": giver})
        await asyncio.sleep(pause)
        pause = min(2 * pause, PAUSE_S[1])


def _lost(node: Node) -> tuple[Peer, ...]:
    state = node.known_state()
    if state.phase is Phase.HALTED or state.me not in state.have:
        return ()
    return tuple(p for p in state.missing if p in state.early and not node.keyring.is_revoked(p))


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
