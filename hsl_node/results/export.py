"""The model of a node: to predict with here, and to take away with a card that says what it is (`hsl-node export`)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hsl_node.federation.config import load_federation
from hsl_node.federation.names import Digest, Round
from hsl_node.federation.node_toml import load_node
from hsl_node.host.layout import Layout
from hsl_node.results.evaluate import EVALUATION
from hsl_node.results.models import find_model
from hsl_node.sync.store.journal import Journal

if TYPE_CHECKING:
    from hsl_node.train.bundle import Card
    from hsl_node.train.predictor import Predictor

# What an evaluation tells of this site's images: counts and digests. An earlier version's record lacks some.
_DATA = ("images", "patients", "without_patient", "test_set", "split_sha256")


def own_predictor(state: Path, round: Round | None = None) -> Predictor:
    """The fused model of a round, or the best by this site's validation AUC, as `find_model` finds it."""
    from hsl_node.train.bundle import Card, Computed, Decision
    from hsl_node.train.data.gathering import window_of
    from hsl_node.train.data.preprocessing import Preprocessing
    from hsl_node.train.predictor import of_model
    from hsl_node.train.scoring import open_model
    from hsl_node.train.site import open_anchor, open_hardware

    plan, model = load_federation(state).plan, find_model(state, round)
    with Journal.read_only(Layout(state).journal) as journal:
        record = _record_of(journal, model.round, model.sha256)
    hardware = open_hardware(state, plan)
    card = Card(
        classes=plan.classes,
        decision=Decision(**chosen) if (chosen := _threshold(record)) else None,
        preprocessing=Preprocessing.of(plan, window_of(load_node(state).data)),
        plan=plan,
        hardware=Computed(**hardware.facts, processor=hardware.processor),
        round=model.round,
        source_weights_sha256=model.sha256,
    )
    _, network = open_model(Layout(state).fused(model.round), plan, hardware)
    return of_model(network, card, hardware, open_anchor(state))


def export(state: Path, out: Path, *, round: Round | None = None, onnx: bool = False) -> tuple[tuple[Path, ...], str]:
    """Write the model into the folder `out`: its files, and why there is no ONNX file ("" where there is one)."""
    from hsl_node.train.export import export_model

    predictor = own_predictor(state, round)
    return export_model(out, predictor=predictor, facts=_facts(state, predictor.card), onnx=onnx)


def _facts(state: Path, card: Card) -> dict[str, Any]:
    """Where the model comes from, for the card."""
    federation = load_federation(state)
    with Journal.read_only(Layout(state).journal) as journal:
        record = _record_of(journal, card.round, card.source_weights_sha256)
        inputs = {r["peer"]: r["sha256"] for r in journal.rows("manifests", card.round)}
    return {
        "trained_by": load_node(state).name,
        "federation": {"name": federation.name, "sha256": federation.digest, "peers": list(federation.peers)},
        "fused_from": inputs,
        "anchor": federation.anchor.model_dump(mode="json") if federation.anchor else None,
        "data": {key: record.get(key) for key in _DATA} if record else None,
        "test": {k: v for k, v in record["test"]["fused"].items() if k != "roc"} if record else None,
    }


def _record_of(journal: Journal, round: Round, sha256: Digest | str) -> dict[str, Any] | None:
    """The evaluation, where one is of this model."""
    found = (journal.result(name) for name in (EVALUATION, f"{EVALUATION} of round {round}"))
    return next((record for record in found if record and record["weights"].get("fused") == sha256), None)


def _threshold(record: dict[str, Any] | None) -> dict[str, Any] | None:
    """What the evaluation chose on validation images; where these were too few it chose nothing."""
    chosen = ((record or {}).get("thresholds") or {}).get("fused")
    if not chosen or chosen["rule"].startswith("not chosen"):
        return None
    return {"threshold": chosen["value"], "rule": chosen["rule"]}
