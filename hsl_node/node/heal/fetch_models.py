"""The models of `sync/store/models.py`, read at the start, looked for ever after.

A fused one that is lost comes from the peers; of an own one it is said that it is lost.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from hsl_node.errors import HslError, escaped
from hsl_node.federation.names import Peer
from hsl_node.host.pace import Pace
from hsl_node.node.alarms import Alarms
from hsl_node.node.here import Here, Keys
from hsl_node.node.peers.fetch import Fetch, Slow
from hsl_node.node.peers.links import Links
from hsl_node.node.training import last_to_validate
from hsl_node.sync.offer import Offer
from hsl_node.sync.round import Phase, State
from hsl_node.sync.store import models
from hsl_node.sync.store.models import Harm, Model

log = logging.getLogger(__name__)

LOOK_S = 60.0
RETRY = Pace(4, 600)  # nobody may have it, and then a person must act


@dataclass
class FetchModels:
    here: Here
    keys: Keys
    alarms: Alarms
    links: Links
    fetch: Fetch
    state: Callable[[], State]
    round_lacks: Callable[[], bool]  # something that the round needs is being fetched, and comes first

    async def watch(self) -> None:
        """For ever. Their bytes are read once, at the start; later it is looked whether they are there."""
        await self.mend()
        while True:
            await asyncio.sleep(LOOK_S)
            await self.mend(whole=False)

    async def mend(self, *, whole: bool = True) -> None:
        """Until all are there, with an alarm for each that is not; a person may put it back meanwhile."""
        layout, told = self.here.layout, set[str]()
        for pause_s in RETRY.waits():
            harms = [await asyncio.to_thread(models.harm_of, layout, m, whole=whole) for m in self._models()]
            harmed = [harm for harm in harms if harm is not None]
            harmed = [h for h in harmed if h.model in self._models()]  # another one may be the best by now
            for code in told - {harm.model.code for harm in harmed}:
                self.alarms.settle(code)
            fused = [harm for harm in harmed if harm.model.kind != "own"]
            for harm in harmed:
                asked = "the peers are asked for it, again and again. " if harm in fused else ""
                self.alarms.sound(harm.model.code, harm.text(layout), asked + harm.otherwise(layout))
            told = {harm.model.code for harm in harmed}
            if not harmed:
                return
            if fused and not self.round_lacks():  # they would clear each other's half files
                offers, _ = await self.links.offers_of(p for p in self.here.others if not self.keys.ring.is_revoked(p))
                await self.fetch_all(fused, offers)
            await asyncio.sleep(pause_s)

    def _models(self) -> list[Model]:
        """Without what the round itself reads, and checks, now: that is for `damage.py`, until a halt."""
        journal, state = self.here.journal, self.state()
        validated = last_to_validate(journal, state) is None
        over = str(state.phase) in models.OVER and (validated or state.phase is Phase.HALTED)
        return [m for m in models.models(journal) if over or m.round < state.round - 1]

    async def fetch_all(self, harmed: Iterable[Harm], offers: Mapping[Peer, Offer]) -> None:
        """One after the other, up to one of which half came: that would make way for the next one's half."""
        for harm in harmed:
            if not await self._fetch(harm, offers):
                return

    async def _fetch(self, harm: Harm, offers: Mapping[Peer, Offer]) -> bool:
        """False: half of it is here."""
        model = harm.model
        try:
            if not await self.fetch.get(model.sha256, self.here.layout.fused(model.round), offers):
                return True
        except (HslError, OSError) as exc:  # a link that broke, no room; a disk that fails in a sync ends the process
            log.warning("not taken", extra={"round": model.round, "reason": escaped(str(exc))})
            return not isinstance(exc, Slow)
        log.warning("a fused model was fetched again", extra={"round": model.round, "sha256": model.sha256[:12]})
        return True
