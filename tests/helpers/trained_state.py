"""The state directory of a node after two rounds, written without training anything."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import tomli_w
from federations import Members

from hsl_node.federation.config import federation_text
from hsl_node.federation.names import Digest, Peer
from hsl_node.host.layout import Layout
from hsl_node.results.evaluate import EVALUATION, scores_name
from hsl_node.sync.round import Phase, State, to_json
from hsl_node.sync.store.journal import Journal


def metrics(auc: float | None, images: int = 10) -> dict[str, Any]:
    """As train/tasks/metrics.py gives them."""
    roc = [] if auc is None else [[[0.0, 0.0], [0.2, 0.8], [1.0, 1.0]]]
    rates = dict.fromkeys(("accuracy", "recall", "precision", "f1", "sensitivity", "specificity"), 0.75)
    confusion = [[0, 0], [2, images - 2]] if auc is None else [[4, 1], [1, images - 6]]
    return {"images": images, "auc": auc, **rates, "confusion": confusion, "roc": roc}


def evaluation(fused: float | None, alone: float | None, *, classes: tuple[str, str] = ("no", "yes")) -> dict[str, Any]:
    return {
        "evaluated": 1,
        "final": True,
        "name": EVALUATION,
        "kind": "fused",
        "round": 2,
        "rounds": {"fused": 2},
        "why": "fused model of round 2: best validation AUC here, 0.700",
        "at": 0.0,
        "images": {"train": 30, "validation": 5, "test": 10},
        "without_patient": 10,
        "by_study": 0,
        "classes": list(classes),
        "weights": {"fused": "2" * 64, "alone": "a" * 64},
        "auc_validation": {"fused": 0.9, "alone": 0.8},
        "test": {"fused": metrics(fused), "alone": metrics(alone)},
    }


def scores(record: dict[str, Any]) -> dict[str, Any]:
    """Of ten images, five of each class, that give the record's AUCs, tenths; of one class where these are None."""
    areas = {kind: found["auc"] for kind, found in record["test"].items()}
    labels = [int(None in areas.values() or n > 4) for n in range(10)]
    chances = {k: [0.1, 0.2, 0.3, 0.4, 0.5, *[(5 * (a or 0) + 0.5) / 10] * 5] for k, a in areas.items()}
    part = {
        "ids": [f"{n:064x}" for n in range(10)],
        "patients": [None] * 10,
        "labels": labels,
        "probabilities": chances,
        "log_odds": {kind: [math.log(p / (1 - p)) for p in found] for kind, found in chances.items()},
    }
    return {"validation": part, "test": part}


def make_state(
    root: Path,
    members: Members,
    name: str,
    *,
    fused: tuple[str, ...] = ("1" * 64, "2" * 64),
    claims: dict[str, str] | None = None,
    record: dict[str, Any] | None = None,
    software: str = "hsl-node 1, torch 2",
    halted: str = "",
) -> Path:
    """A node's state directory after two rounds. `claims`: what each peer says that round 2's fusion gave it."""
    layout = Layout(root / name)
    layout.make()
    card = members.federation.get(name)
    (layout.state / "node.toml").write_text(tomli_w.dumps({"name": name, "address": card.address}))
    (layout.state / "federation.toml").write_text(federation_text(members.federation))
    with Journal.create(layout.journal) as journal:
        phase = Phase.HALTED if halted else Phase.FINISHED
        state = State(Peer(name), members.peers, 2, Digest(fused[-1]), phase=phase, round=3, reason=halted)
        with journal.transaction():
            journal.save_state(to_json(state))
            for peer in members.peers:
                for round, base in enumerate(("0" * 64, "1" * 64, (claims or {}).get(peer, "2" * 64)), 1):
                    content = {"base": base, "bytes": 0 if round == 3 else 1000, "score": 0.6 + round / 10,
                               "said": {}, "samples": 30, "software": software}  # fmt: skip
                    journal.record_manifest(round, peer, "d" * 64, b"", content)
            for round, digest in enumerate(fused, 1):
                for step in ("train", "collect", "fuse"):
                    journal.record_phase(round, step)
                journal.record_fused(round, Digest(digest))
                journal.record_validation(round, 0.7, 0.5)
                for peer in members.peers:
                    if peer != name:
                        journal.record_transfer(round, peer, "sent", 1_000_000, 4096 * round, round - 1, 0.5)
            if record:
                journal.record_result(EVALUATION, record)
                journal.record_result(scores_name(EVALUATION), scores(record))
    return layout.state
