"""The model of a node: to predict with here, and to take away with a card that says what it is (`hsl-node export`)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hsl_node.federation.config import load_federation
from hsl_node.federation.names import Digest, Round
from hsl_node.federation.node_toml import load_node
from hsl_node.host.layout import Layout
from hsl_node.results.evaluate import record_of
from hsl_node.results.models import find_model
from hsl_node.sync.candidates import in_words
from hsl_node.sync.store.journal import Journal
from hsl_node.sync.store.models import Model

if TYPE_CHECKING:
    from hsl_node.train.bundle import Card
    from hsl_node.train.predictor import Predictor
    from hsl_node.train.progress import Report

# What an evaluation tells of this site's images: counts and digests.
_DATA = ("images", "patients", "without_patient", "test_set", "split_sha256")


def own_predictor(state: Path, round: Round | None = None, report: Report = lambda event: None) -> Predictor:
    """This hospital's model, or the fused one of a round, as `find_model` finds it. `report` hears a trainer's events:
    one that is recalibrated looks at all training images first."""
    from hsl_node.results.opening import opened
    from hsl_node.train.bundle import Card, Computed, Decision
    from hsl_node.train.data.gathering import window_of
    from hsl_node.train.data.preprocessing import Preprocessing
    from hsl_node.train.predictor import of_model
    from hsl_node.train.site import open_anchor

    plan, model = load_federation(state).plan, find_model(state, round)
    with Journal.read_only(Layout(state).journal) as journal:
        record, why = (
            record_of(journal, model),
            in_words(journal.candidates(), plan.card.score_name) if round is None else "",
        )
    network, hardware = opened(state, model, report)
    card = Card(
        classes=plan.classes,
        decision=Decision(**chosen) if (chosen := _threshold(record)) else None,
        preprocessing=Preprocessing.of(plan, window_of(load_node(state).data)),
        plan=plan,
        hardware=Computed(**hardware.facts, processor=hardware.processor),
        kind=model.kind,
        round=model.round,
        why=why,
        source_weights_sha256=model.sha256,
    )
    return of_model(network, card, hardware, open_anchor(state))


def export(
    state: Path, out: Path, *, round: Round | None = None, onnx: bool = False, report: Report = lambda event: None
) -> tuple[tuple[Path, ...], str]:
    """Write the model into the folder `out`: its files, and why there is no ONNX file ("" where there is one)."""
    from hsl_node.train.export import export_model

    predictor = own_predictor(state, round, report)
    return export_model(out, predictor=predictor, facts=_facts(state, predictor.card), onnx=onnx)


def _facts(state: Path, card: Card) -> dict[str, Any]:
    """Where the model comes from, for the card."""
    federation = load_federation(state)
    with Journal.read_only(Layout(state).journal) as journal:
        record = record_of(journal, Model(card.kind, card.round, Digest(card.source_weights_sha256), ""))
        inputs = {r["peer"]: r["sha256"] for r in journal.rows("manifests", card.round)}
    return {
        "trained_by": load_node(state).name,
        "federation": {"name": federation.name, "sha256": federation.digest, "peers": list(federation.peers)},
        "fused_from": inputs,
        "anchor": federation.anchor.model_dump(mode="json") if federation.anchor else None,
        "data": {key: record.get(key) for key in _DATA} if record else None,
        "test": {k: v for k, v in record["test"][card.kind].items() if k != "roc"} if record else None,
    }


def _threshold(record: dict[str, Any] | None) -> dict[str, Any] | None:
    """What the evaluation chose on validation images; where these were too few it chose nothing."""
    chosen = (record.get("thresholds") or {}).get(record["kind"]) if record else None
    if not chosen or chosen["rule"].startswith("not chosen"):
        return None
    return {"threshold": chosen["value"], "rule": chosen["rule"]}
