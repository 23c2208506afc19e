"""A model of this node, opened as it is used here: to be scored, asked, or taken away. Opens torch."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from hsl_node.errors import LocalStateError, UsageError
from hsl_node.federation.config import load_federation
from hsl_node.federation.methods import Need
from hsl_node.federation.names import Peer
from hsl_node.federation.node_toml import load_node
from hsl_node.host.layout import Layout
from hsl_node.results.models import path_of
from hsl_node.sync.store.exchange import left_by
from hsl_node.sync.store.journal import Journal
from hsl_node.sync.store.models import BESIDE, Model
from hsl_node.train.hardware import Hardware
from hsl_node.train.method import Site, take_fused
from hsl_node.train.methods import method_of
from hsl_node.train.progress import Report, ticker
from hsl_node.train.scoring import open_fused, open_model
from hsl_node.train.site import open_hardware, open_site
from hsl_node.train.start import StartFiles
from hsl_node.weights.whole import holds


def opened(state: Path, model: Model, report: Report) -> tuple[nn.Module, Hardware]:
    """The images are looked at only where the model is made of them. Raises: as `open_kept`."""
    plan = load_federation(state).plan
    as_it_is = not plan.card.keeps and method_of(plan.method).adopt is take_fused
    if model.kind == "own" or (model.kind == "fused" and as_it_is):
        hardware = open_hardware(state, plan)
        return open_model(path_of(Layout(state), model), plan, hardware)[1], hardware
    site = open_site(state, ticker(report, "decoding images"))
    return open_kept(site, state, model, report), site.hardware


def open_kept(site: Site, state: Path, model: Model, report: Report) -> nn.Module:
    """Ready to score.

    Raises:
        LocalStateError: its file, or the own one that it is used with, is lost or altered.
        UsageError: the method makes it of checkpoints that are deleted by now, lost or altered.
    """
    path = path_of(Layout(state), model)
    if model.kind == "own":
        return open_model(path, site.plan, site.hardware)[1]
    tick = ticker(report, "measuring BatchNorm statistics")
    start = _start_of(state, model, everybodys=site.method.adopt is not take_fused)
    return open_fused(site, start, recalibrate=model.kind == "recalibrated", tick=tick)


def _start_of(state: Path, model: Model, *, everybodys: bool) -> StartFiles:
    """What this site would begin the next round with: so it takes the fused model up, perhaps with everybody's
    checkpoints."""
    layout, card = Layout(state), load_federation(state).plan.card
    with Journal.read_only(layout.journal) as journal:
        left = left_by(journal, layout, Peer(load_node(state).name), model.round)
    files = left.full_set if Need.FULL_SET in card.needs and everybodys else {}
    full_set = {str(peer): path for peer, (path, _) in files.items()}
    if not all(holds(path, sha256) for path, sha256 in files.values()):
        raise UsageError(
            f"{card.name} makes its model of everybody's checkpoints of round {model.round}, and one is deleted by "
            "now, lost or altered: they are kept, and in backups, for the last round and the best models",
            remedy="take a round of which they are here with --round N: `ls inbox` in the state directory shows these",
        )
    mine = left.own if left.own and holds(*left.own) else None
    if mine is None and card.keeps:
        if left.own:
            path_of(layout, Model("own", model.round, left.own[1], BESIDE))
        raise LocalStateError(
            f"the tensors of round {model.round} that this hospital keeps to itself were lost with an earlier state",
            remedy="give a later round with --round N",
        )
    return StartFiles(
        round=model.round + 1,
        base=layout.fused(model.round),
        base_sha256=model.sha256,
        said={str(peer): numbers for peer, numbers in left.said.items()},
        samples={str(peer): n for peer, n in left.samples.items()},
        full_set=full_set,
        mine=mine[0] if mine else None,
        mine_sha256=mine[1] if mine else None,
    )
