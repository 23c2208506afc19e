"""The report's part on test figures: an entry per evaluation, with its table, its sentences and its pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hsl_node.host.units import figure
from hsl_node.results import words
from hsl_node.results.evaluate import EVALUATION
from hsl_node.results.facts import NodeFacts
from hsl_node.results.figures import STYLES, calibration_panel, roc_panel
from hsl_node.results.statistics import Statistics
from hsl_node.results.words import MODELS


def columns(nodes: Sequence[NodeFacts]) -> dict[str, str]:
    """Of the table: the figures that any evaluation has."""
    found = {name: word for node in nodes for m in node.measured for name, word in words.shown(m.statistics).items()}
    return {name: word for name, word in words.SURE.items() if name in found or name == "auc"}


def entries(nodes: Sequence[NodeFacts], shown: Mapping[str, str]) -> list[dict[str, Any]]:
    """One entry per evaluation: its counts, sentences, and per model the figures and the confusion matrix."""
    found = []
    for node in nodes:
        for number, measured in enumerate(node.measured):
            record, statistics = measured.record, measured.statistics
            kinds = [k for k in MODELS if k in record["test"]]
            best = statistics.best([k for k in kinds if k in words.COMPARED])
            where = f"At {node.name}" if len(nodes) > 1 else "At this hospital"
            found.append(
                {
                    **record,
                    "name": node.name,
                    "model": words.model_of(record),
                    "id": f"{node.name}-{number}",
                    "external": "external" in record,
                    "left_out": words.left_out(left) if (left := record.get("external", {}).get("left_out")) else "",
                    "alone": "alone" in record["test"],
                    "name_of_round": record.get("name", EVALUATION) != EVALUATION,
                    "counts": words.counted(record),
                    "split": words.split_by(record),
                    "by": words.by_whom(statistics),
                    "models": [
                        {
                            "kind": k,
                            "word": MODELS[k],
                            "best": k == best,
                            "cells": [_cell(statistics, k, name) for name in shown],
                            **record["test"][k],
                        }
                        for k in kinds
                    ],
                    "judgements": words.judgements(where, statistics, record["kind"]),
                    "thresholds": words.threshold_lines(record, kinds),
                    "by_class": _by_class(statistics, record),
                    "uses": words.uses(record),
                    "empty": words.without_images(record),
                }
            )
    return found


def _cell(statistics: Statistics, kind: str, name: str) -> dict[str, str]:
    """A figure, and its interval or ""."""
    estimate = getattr(statistics.models[kind], name)
    sure = estimate.low is not None and estimate.high is not None
    span = f"{estimate.low:.3f}–{estimate.high:.3f}" if sure else ""
    return {"value": figure(estimate.value, "undefined"), "span": span}


def _by_class(statistics: Statistics, record: Mapping[str, Any]) -> list[dict[str, str]]:
    """Of more than two classes, each against the rest."""
    if len(record["classes"]) == 2:
        return []
    return [
        {"model": MODELS[kind], "class": name, "images": str(statistics.images_of[name]),
         "auc": words.estimate(of.auc), "auprc": words.estimate(of.auprc)}
        for kind, model in statistics.models.items()
        for name, of in model.classes.items()
    ]  # fmt: skip


def pictures(nodes: Sequence[NodeFacts]) -> list[dict[str, Any]]:
    """Per evaluation its ROC and calibration, as far as it has them."""
    found = []
    for node in nodes:
        for number, measured in enumerate(node.measured):
            name, test = f"{node.name}-{number}", measured.record["test"]
            curves = {k: lines for k, m in test.items() if (lines := [c for c in m["roc"] if c])}
            models = measured.statistics.models
            bins = {k: model.calibration for k, model in models.items() if k in STYLES and model.calibration}
            found.append(
                {
                    "id": name,
                    "roc": roc_panel(name, curves) if curves else "",
                    "calibration": calibration_panel(name, bins) if bins else "",
                    "kinds": [k for k in STYLES if k in curves or k in bins],
                    "aucs": [(k, test[k]["auc"]) for k in STYLES if k in test],
                }
            )
    return found
