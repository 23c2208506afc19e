"""Two files are lost, and no giver's turn is long enough for one: each turn goes on with the same file."""

from __future__ import annotations

import asyncio
import hashlib
from types import SimpleNamespace
from typing import Any

from givers import Giver, asking_of, missing_of, offer_by
from inbox_site import BIRCH, CEDAR, ROUND, Site

from hsl_node.federation.keyring import Keyring
from hsl_node.federation.names import Digest, Peer, Round
from hsl_node.node.alarms import Alarms
from hsl_node.node.heal.fetch_models import FetchModels
from hsl_node.sync.offer import Listed
from hsl_node.sync.store.models import Harm, Model

ENOUGH = 30  # turns; four bring both files where none is thrown away


def slow_givers(site: Site) -> tuple[Any, list[bytes]]:
    """Of each connection a bit more than half of a file comes; then it hangs."""
    birch, cedar = Giver(stalls=5), Giver(stalls=5)
    asks, files = asking_of(site, birch, cedar)
    asks._turn_s = 0.3
    return asks, files


def test_two_checkpoints_arrive_whatever_the_order_in_which_each_giver_lists_them(site: Site) -> None:
    """Each lists its own first, as `Serve` does."""

    async def story() -> set[Peer]:
        asks, (of_birch, of_cedar) = slow_givers(site)
        for folder in ("inbox", "parts", "receipts"):
            (site.homes / CEDAR / folder).mkdir(parents=True, exist_ok=True)
        listed = {}
        for peer, data in ((BIRCH, of_birch), (CEDAR, of_cedar)):
            manifest = site.manifest(data, peer=peer)
            document = site.sign(manifest, peer)
            digest = hashlib.sha256(document).hexdigest()
            for giver in asks.givers.values():
                giver.documents[digest] = document
            listed[peer] = Listed(peer=peer, round=ROUND, sha256=manifest.sha256, document=digest)
        both = [one.sha256 for one in listed.values()]
        for peer, other in ((BIRCH, CEDAR), (CEDAR, BIRCH)):
            asks.offers[peer] = offer_by(site, peer, *both).model_copy(
                update={"manifests": [listed[peer], listed[other]]}
            )
        keys: Any = SimpleNamespace(ring=Keyring.of(site.members.federation))
        state: Any = SimpleNamespace(round=ROUND)
        watch, _ = missing_of(lambda: state, here=asks.here, keys=keys, links=asks, fetch=asks)
        placed: set[Peer] = set()
        watch.placed = placed.add
        for _ in range(ENOUGH):
            watch._lost = tuple(peer for peer in (BIRCH, CEDAR) if peer not in placed)
            if watch._lost:
                await watch._ask([BIRCH, CEDAR])
        return placed

    assert asyncio.run(story()) == {BIRCH, CEDAR}


def test_two_fused_models_arrive_from_one_giver(site: Site) -> None:
    async def story() -> list[bool]:
        asks, files = slow_givers(site)
        shas = [Digest(hashlib.sha256(data).hexdigest()) for data in files]
        harmed = [Harm(Model("fused", Round(r), sha, "best"), "gone") for r, sha in enumerate(shas, 1)]
        keys: Any = SimpleNamespace(ring=None)
        unused: Any = None
        fetcher = FetchModels(asks.here, keys, Alarms(), asks, asks, unused, unused)
        targets = [asks.here.layout.fused(harm.model.round) for harm in harmed]
        for _ in range(ENOUGH):
            await fetcher.fetch_all(
                [h for h in harmed if not asks.here.layout.fused(h.model.round).exists()],
                {CEDAR: offer_by(site, CEDAR, *shas)},
            )
        return [target.exists() for target in targets]

    assert asyncio.run(story()) == [True, True]
