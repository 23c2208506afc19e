"""A whole federation in one process: the same training, the same fusion and the same bytes as real daemons, no wire.

    folder/fused/r000000.safetensors ...    the initial and the fused models
    folder/PEER/r000001.safetensors ...     what each hospital would have sent
    folder/PEER/own_r000001.safetensors     all of its tensors
    folder/PEER/trainer/                    its epoch checkpoint

A simulation that was killed begins with round 1 once more, and ends with the same bytes: only a hospital's training in
the round that its checkpoint is of goes on.

Every planned round is run: the early end by plateau is the exchange's, and not here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hsl_node.errors import ConfigError
from hsl_node.federation.methods import Need
from hsl_node.federation.names import Digest, Peer
from hsl_node.train.checkpoint import Best, RoundState
from hsl_node.train.data.dataset import Dataset
from hsl_node.train.data.sources import TRAIN
from hsl_node.train.loop import train_round
from hsl_node.train.method import Site
from hsl_node.train.site import initial_model
from hsl_node.train.start import StartFiles
from hsl_node.train.state_dict import to_weights
from hsl_node.weights.checkpoint_file import read_schema, write_weights
from hsl_node.weights.fuse_files import fuse_files

CENTRAL = Peer("central")
Hear = Callable[[Peer, dict[str, Any]], None]  # a trainer's event, and whose it is


@dataclass(frozen=True)
class Exchanged:
    """A round whose full set is there."""

    round: int
    fused: Path
    sha256: Digest
    sent: Mapping[Peer, Path] = field(default_factory=dict)
    own: Mapping[Peer, Path] = field(default_factory=dict)
    best: Mapping[Peer, Best] = field(default_factory=dict)  # of each hospital's epochs
    samples: Mapping[Peer, int] = field(default_factory=dict)

    def start(self, site: Site) -> StartFiles:
        """What the next round begins with at this hospital; what its daemon would say in the job."""
        me, whole = Peer(site.peer), Need.FULL_SET in site.plan.card.needs
        return StartFiles(
            round=self.round + 1,
            base=self.fused,
            base_sha256=self.sha256,
            said={peer: best.said for peer, best in self.best.items()},
            samples={str(peer): count for peer, count in self.samples.items()},
            full_set={str(peer): path for peer, path in self.sent.items() if whole},
            mine=self.own.get(me),
            mine_sha256=self.best[me].own_sha256 if me in self.best else None,
        )


def simulate(sites: Mapping[Peer, Site], folder: Path, hear: Hear = lambda peer, event: None) -> list[Exchanged]:
    """All rounds of the plan, which the sites share; the first of the list is before any training.

    central: of one hospital, which has everybody's images. local: that of the first alone; ask for each by itself.

    Raises:
        ConfigError: the hospitals of this method exchange no models (splitavg: `study/splitavg.py`).
    """
    plan = next(iter(sites.values())).plan
    match plan.method:
        case "central":
            sites = {CENTRAL: pooled(sites)}
        case "local" if len(sites) > 1:
            raise ConfigError("local never fuses", remedy="simulate each hospital by itself")
        case "splitavg":
            raise ConfigError("splitavg has no rounds", remedy="hsl_node.study.splitavg.simulate")
    done = [begun(sites, folder)]
    for _ in range(plan.rounds):
        done.append(next_round(sites, folder, done[-1], hear, in_turn=plan.method == "metafed_ring"))
    return done


def pooled(sites: Mapping[Peer, Site]) -> Site:
    """One hospital that has everybody's images; each stays in the part that it was in. What no federation can do."""
    ordered = [sites[peer] for peer in sorted(sites)]
    sets = [site.dataset for site in ordered]
    colour = any(data.images.ndim == 4 for data in sets)
    images = [data.images if data.images.ndim == 4 or not colour else as_colours(data.images) for data in sets]
    data = Dataset(
        np.concatenate(images),
        np.concatenate([data.labels for data in sets]),
        np.concatenate([data.split for data in sets]),
        tuple(id for data in sets for id in data.ids),
        tuple(patient for data in sets for patient in data.patients or (None,) * len(data.ids)),
    )
    return replace(ordered[0], peer=CENTRAL, dataset=data)


def as_colours(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(N, S, S) grey -> (N, S, S, 3)."""
    return np.repeat(images[..., None], 3, axis=-1)


def begun(sites: Mapping[Peer, Site], folder: Path) -> Exchanged:
    """The initial weights, as every node makes them for itself."""
    site, path = next(iter(sites.values())), _fused(folder, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    site.method.require(site)
    model = initial_model(site.plan, site.method, site.backbone_weights)
    return Exchanged(0, path, write_weights(path, to_weights(model, site.method.travels(model))))


def next_round(
    sites: Mapping[Peer, Site], folder: Path, before: Exchanged, hear: Hear, *, in_turn: bool = False
) -> Exchanged:
    """Train at every hospital, and fuse.

    in_turn: one after the other; from the second round on each sees what those before it have just sent. Exact MetaFed.
    """
    round, plan = before.round + 1, next(iter(sites.values())).plan
    peers = sorted(sites)
    sent = {peer: folder / peer / f"r{round:06d}.safetensors" for peer in peers}
    own = {peer: folder / peer / f"own_r{round:06d}.safetensors" for peer in peers}
    best: dict[Peer, Best] = {}
    seen = before  # what the next one begins with
    for peer in peers:
        state: RoundState = train_round(
            sites[peer],
            folder=folder / peer / "trainer",
            files=seen.start(sites[peer]),
            out=sent[peer],
            own=own[peer],
            report=lambda event, peer=peer: hear(peer, event),  # type: ignore[misc]
        )
        assert state.best is not None
        best[peer] = state.best
        if in_turn and before.round:
            seen = replace(seen, sent={**seen.sent, peer: sent[peer]}, best={**seen.best, peer: state.best})
    samples = {peer: len(sites[peer].indices(TRAIN)) for peer in peers}
    sha256 = fuse_files(
        plan.rule,
        sent,
        samples,
        read_schema(before.fused),
        _fused(folder, round),
        said={peer: best[peer].said for peer in peers},
        base=before.fused,
        clip=plan.fusion_clip,
    )
    return Exchanged(round, _fused(folder, round), sha256, sent, own, best, samples)


def _fused(folder: Path, round: int) -> Path:
    return folder / "fused" / f"r{round:06d}.safetensors"
