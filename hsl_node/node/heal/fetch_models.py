"""The models that are kept for people (`models.py`), looked at once at the start; what is lost comes from the peers."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from hsl_node.errors import HslError, escaped
from hsl_node.federation.names import Peer
from hsl_node.sync.offer import Offer
from hsl_node.sync.round import Phase
from hsl_node.sync.store import models
from hsl_node.sync.store.models import Harm, Model

if TYPE_CHECKING:
    from hsl_node.node.daemon import Node

log = logging.getLogger(__name__)

RETRY_S = (4.0, 600.0)  # doubles; nobody may have it, and then a person must act


async def watch(node: Node) -> None:
    """Until all are there, with an alarm for each that is not; a person may put it back meanwhile."""
    told: set[str] = set()
    pause_s = RETRY_S[0]
    while True:
        harmed = [h for model in _models(node) if (h := await asyncio.to_thread(models.harm_of, node.layout, model))]
        harmed = [h for h in harmed if h.model in _models(node)]  # another one may be the best by now
        for code in told - {_code(harm) for harm in harmed}:
            node.alarms.settle(code)
        for harm in harmed:
            fix = f"the peers are asked for it, again and again. {harm.otherwise(node.layout)}"
            node.alarms.sound(_code(harm), harm.text(node.layout), fix)
        told = {_code(harm) for harm in harmed}
        if not harmed:
            return
        if not node.missing.at_work:  # what the round lacks comes first: they would clear each other's half files
            offers = await _offers(node)
            for harm in harmed:
                await _fetch(node, harm, offers)
        await asyncio.sleep(pause_s)
        pause_s = min(2 * pause_s, RETRY_S[1])


def _models(node: Node) -> list[Model]:
    """Without what the round itself reads, and checks, now: what is wrong there is for `damage.py`, until a halt."""
    state, validated = node.known_state(), node.work.last_to_validate() is None
    over = str(state.phase) in models.OVER and (validated or state.phase is Phase.HALTED)
    return [m for m in models.models(node.journal) if over or m.round < state.round - 1]


def _code(harm: Harm) -> str:
    return f"fused {harm.model.round}"


async def _offers(node: Node) -> dict[str, Offer]:
    asked = [p for p in node.others if not node.keyring.is_revoked(p)]
    answers = await asyncio.gather(*(_offer(node, p) for p in asked))
    return {offer.peer: offer for offer in answers if offer is not None}


async def _offer(node: Node, peer: Peer) -> Offer | None:
    try:
        return await node.asking.offer_of(peer)
    except HslError as exc:
        log.info("not asked", extra={"peer": peer, "reason": escaped(exc.message)})
    except Exception:  # whatever a peer's link does, it is no answer
        log.exception("asking broke", extra={"peer": peer})
    return None


async def _fetch(node: Node, harm: Harm, offers: dict[str, Offer]) -> None:
    model = harm.model
    try:
        if not await node.asking.get(model.sha256, node.layout.fused(model.round), offers, patient=False):
            return
    except (HslError, OSError) as exc:  # a link that broke, no room; a disk that fails in a sync ends the process
        log.warning("not taken", extra={"round": model.round, "reason": escaped(str(exc))})
        return
    log.warning("a fused model was fetched again", extra={"round": model.round, "sha256": model.sha256[:12]})
