"""Rounds of training of one hospital, each from files as a daemon leaves them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hsl_node.train.checkpoint import RoundState
from hsl_node.train.loop import train_round
from hsl_node.train.method import Site
from hsl_node.train.progress import Report
from hsl_node.train.site import initial_model
from hsl_node.train.start import StartFiles
from hsl_node.train.state_dict import to_weights
from hsl_node.weights.checkpoint_file import write_weights
from hsl_node.weights.whole import sha256_of


@dataclass(frozen=True)
class Trained:
    state: RoundState
    out: Path
    own: Path

    @property
    def next(self) -> StartFiles:
        """The next round of a federation of one, where the fused model is what was sent."""
        assert self.state.best is not None
        best = self.state.best
        return StartFiles(
            self.state.round + 1, self.out, best.sha256, mine=self.own, mine_sha256=best.own_sha256,
        )  # fmt: skip


def first_start(site: Site, folder: Path) -> StartFiles:
    base = folder / "fused" / "r000000.safetensors"
    base.parent.mkdir(parents=True, exist_ok=True)
    model = initial_model(site.plan, site.method, site.backbone_weights)
    write_weights(base, to_weights(model, site.method.travels(model)))
    return StartFiles(1, base, sha256_of(base))


def train(site: Site, folder: Path, files: StartFiles, report: Report = lambda _: None) -> Trained:
    out, own = (folder / f"{what}_r{files.round}.safetensors" for what in ("out", "own"))
    return Trained(train_round(site, folder=folder / "trainer", files=files, out=out, own=own, report=report), out, own)


def first_round(site: Site, folder: Path, report: Report = lambda _: None, **start: Any) -> Trained:
    return train(site, folder, replace(first_start(site, folder), **start), report)
