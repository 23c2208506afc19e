"""A node's state directory after a finished run of one round, with real images and untrained models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import tomli_w
from federations import FederationOf

from hsl_node.federation.config import federation_text
from hsl_node.federation.plan import Plan
from hsl_node.host.layout import Layout
from hsl_node.study import phantoms
from hsl_node.sync.round import Phase, State, to_json
from hsl_node.sync.store.journal import Journal
from hsl_node.train.methods import method_of
from hsl_node.train.site import initial_weights

PLAN = Plan(
    method="fedavg",
    classes=phantoms.CLASSES,
    image_size=16,
    backbone="tiny",
    batch_size=8,
    rounds=1,
    epochs_per_round=1,
)


def finished_run(tmp_path: Path, federation_of: FederationOf, plan: Plan = PLAN, *, patients: int = 24) -> Path:
    """The models are untrained: what matters is which file is scored."""
    layout = Layout(tmp_path / "ash")
    layout.make()
    table = phantoms.write(tmp_path / "images", replace(phantoms.HOSPITALS[0], patients=patients), seed=1, size=32)
    federation = federation_of(2, plan=plan).federation
    node = {
        "name": "ash",
        "address": federation.get("ash").address,
        "data": {"path": str(table)},
        "train": {"threads": 1},
    }
    (layout.state / "node.toml").write_text(tomli_w.dumps(node))
    (layout.state / "federation.toml").write_text(federation_text(federation))
    method = method_of(plan.method)
    digest, _ = initial_weights(layout.state, plan, method, layout.fused(1))
    own, _ = initial_weights(layout.state, plan.model_copy(update={"seed": 2}), method, layout.own(1))
    with Journal.create(layout.journal) as journal, journal.transaction():
        journal.record_fused(1, digest)
        journal.record_validation(1, 0.6, 0.7)
        journal.record_own(1, own, 0.5, 0.8)
    set_phase(layout.state, Phase.FINISHED)
    return layout.state


def set_phase(state: Path, phase: Phase) -> None:
    with Journal.create(Layout(state).journal) as journal:
        peers = ("ash", "birch")
        journal.save_state(to_json(State("ash", peers, 1, "0" * 64, phase=phase, round=2)))  # type: ignore[arg-type]
