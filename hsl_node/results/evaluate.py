"""`hsl-node evaluate`: the test set, scored once, whether the daemon runs or not.

Of the final model (the fused one with this site's best validation AUC); the journal holds the scores as "evaluation":

    {"evaluated": 1, "final": true, "round": 5, "at": .., "images": {"train": n, "validation": n, "test": n},
     "classes": [..], "weights": {"fused": sha256, ..}, "auc_validation": {"fused": .., ..},
     "test": {"fused": {metrics}, "local": {metrics}, "alone": {metrics}}}

fused   the final model          local   this site's own checkpoint of the last round, before its fusion
alone   trained without the federation for as many epochs (`alone=True`; takes as long as the run did)
fused_random   the final model scored with random anchor pairing, as published (`pairing="random"`)

torch is imported when something is to be scored, not with this file.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hsl_node.errors import FederationMismatch, NotInitialised, UsageError
from hsl_node.federation.names import Digest, Round
from hsl_node.host.layout import Layout
from hsl_node.host.units import auc, table
from hsl_node.results.models import find_unvalidated, get_best, is_over, not_final_yet, path_of
from hsl_node.sync.store import models as kept
from hsl_node.sync.store.journal import Journal
from hsl_node.weights.whole import sha256_of

if TYPE_CHECKING:
    from hsl_node.train.progress import Report
    from hsl_node.train.scoring import Pairing

EVALUATION = "evaluation"  # its name in the journal
MODELS = {  # in the order of tables; how people read them
    "alone": "trained alone",
    "local": "own model, last round",
    "fused": "fused",
    "fused_random": "fused, random anchor pairing",
}
FIGURES = ("auc", "accuracy", "sensitivity", "specificity", "precision", "f1")  # in the order of tables


@dataclass(frozen=True)
class Model:
    """One weights file to score."""

    kind: str  # a key of MODELS
    weights: Path
    sha256: Digest
    pairing: Pairing = "fixed"


def evaluate(
    state: Path,
    *,
    alone: bool = False,
    again: bool = False,
    pairing: Literal["fixed", "random"] = "fixed",
    report: Report = lambda event: None,
) -> dict[str, Any]:
    """The recorded evaluation; what it lacks of what is asked for is scored now. `report` hears a trainer's events.

    Raises:
        UsageError: the run is not over, or its last model not validated: the test set is for the final model. `again`
            measures all the same, and counts.
        FederationMismatch: another run took the place of this one meanwhile.
    """
    layout = Layout(state)
    with Journal.read_only(layout.journal) as journal:
        record, best = find_evaluation(journal), journal.best_fused()
        wanted = {"fused", "local", *["alone"] * alone, *["fused_random"] * (pairing == "random")}
        unvalidated = find_unvalidated(journal)
        final = is_over(journal) and unvalidated is None
        same = record is not None and best is not None and record["weights"].get("fused") == best[1]
        if record is not None and not again and (same or not final) and wanted - {"local"} <= record["test"].keys():
            return record
        if unvalidated is not None and not again:
            raise not_final_yet(unvalidated, "with --again the best one before it is measured now, and counted")
        if not final and not again:
            raise UsageError(
                "the run is not over; the test set is for the final model",
                remedy="wait until `hsl-node status` says finished; with --again it is measured now, and counted",
            )
        round, sha256 = get_best(journal)
        federation = journal.meta("federation")
    anew = again or not same
    if record is None or anew:
        wanted |= set() if record is None else record["test"].keys()  # what was compared before stays comparable
        record = dict(evaluated=0, final=final, round=round, weights={}, auc_validation={}, test={})
    record = _measured(layout, record, wanted - record["test"].keys(), (round, sha256), report)
    try:
        with Journal.beside(layout.journal) as journal, journal.transaction():
            if journal.meta("federation") != federation or journal.fused_digests([round]).get(round) != sha256:
                raise _another_run()
            journal.record_result(EVALUATION, _joined(find_evaluation(journal), record, anew))
            return journal.result(EVALUATION) or record  # as every later call will give it
    except NotInitialised as exc:  # it was there: `join --replace` has moved it, and no start made the next one yet
        raise _another_run() from exc


def find_evaluation(journal: Journal) -> dict[str, Any] | None:
    """What is recorded, where it is of a model of this journal's run."""
    record = journal.result(EVALUATION)
    fused = journal.fused_digests([record["round"]]).get(record["round"]) if record else None
    return record if record and record["weights"]["fused"] == fused else None


def _joined(there: Mapping[str, Any] | None, found: dict[str, Any], anew: bool) -> dict[str, Any]:
    """What to record: the figures that another evaluation recorded meanwhile of this model stay, and its count does."""
    if there is None:
        return {**found, "evaluated": 1}
    if there["weights"]["fused"] == found["weights"]["fused"]:
        found = {**found, **{key: {**there[key], **found[key]} for key in ("weights", "auc_validation", "test")}}
    return {**found, "evaluated": int(there["evaluated"]) + anew}


def _another_run() -> FederationMismatch:
    return FederationMismatch(
        "this state directory holds another run than when the evaluation began: nothing was recorded",
        remedy="`hsl-node evaluate` measures the run that is here now",
    )


def evaluation_text(record: Mapping[str, Any], *, asked: float | None = None) -> str:
    """The record as a table for the terminal. What was measured before `asked` (wall clock) is said to be stored."""
    kinds = [k for k in MODELS if k in record["test"]]
    header = ("test set", *(MODELS[k] for k in kinds))
    rows = [(f if f != "auc" else "AUC", *(auc(record["test"][k][f], "undefined") for k in kinds)) for f in FIGURES]
    counts, missing = record["images"], classes_without_images(record)
    lines = [
        f"{counts['test']} test images (train {counts['train']}, validation {counts['validation']}); "
        f"fused model of round {record['round']}, sha256 {record['weights']['fused'][:12]}",
        "",
        table(header, rows, right=range(1, len(header))),
    ]
    if missing:
        lines += ["", f"undefined: the test set holds no image of class {', '.join(missing)}"]
    if asked is not None and record["at"] < asked:
        at = time.strftime("%Y-%m-%d %H:%M", time.localtime(record["at"]))
        lines += ["", f"The stored result of {at}: the test set is used once. --again measures anew, and counts."]
    if record["evaluated"] > 1:
        lines += ["", f"The test set has been used {record['evaluated']} times: the figures lean towards it."]
    if not record["final"]:
        lines += ["", "Measured before the run was over."]
    return "\n".join(lines)


def classes_without_images(record: Mapping[str, Any]) -> Sequence[str]:
    """Of the test set."""
    confusion = record["test"]["fused"]["confusion"]
    return [name for name, row in zip(record["classes"], confusion, strict=True) if sum(row) == 0]


def _measured(
    layout: Layout, record: dict[str, Any], wanted: set[str], best: tuple[Round, Digest], report: Report
) -> dict[str, Any]:
    """The record with the wanted models scored on the test set."""
    from hsl_node.train import alone as alone_training
    from hsl_node.train import scoring
    from hsl_node.train.data.sources import TEST, TRAIN, VALIDATION
    from hsl_node.train.lock import hold_lock
    from hsl_node.train.progress import ticker
    from hsl_node.train.site import open_site

    site = open_site(layout.state, ticker(report, "decoding images"))
    models: list[Model] = []
    if "local" in wanted and (newest := max(layout.outbox_folder.glob("r*.safetensors"), default=None)):
        models.append(Model("local", newest, sha256_of(newest)))
    if wanted & {"fused", "fused_random"}:
        path = path_of(layout, kept.Model(*best, kept.BEST))
        pairings: dict[str, Pairing] = {"fused": "fixed", "fused_random": "random"}
        models += [Model(kind, path, best[1], pairing) for kind, pairing in pairings.items() if kind in wanted]
    if "alone" in wanted:
        with hold_lock(layout.alone):
            trained = alone_training.train_alone(site, layout.state, rounds=site.plan.rounds, report=report)
        models.append(Model("alone", layout.trainer / alone_training.WEIGHTS_FILE, Digest(trained.sha256)))
    for model in models:
        figures = {
            split: scoring.score(site, model.weights, split, pairing=model.pairing, tick=ticker(report, "scoring"))
            for split in (TEST, VALIDATION)
        }
        record["test"][model.kind] = asdict(figures[TEST])
        record["weights"][model.kind] = model.sha256
        record["auc_validation"][model.kind] = figures[VALIDATION].auc
    counts = {n: len(site.indices(s)) for n, s in (("train", TRAIN), ("validation", VALIDATION), ("test", TEST))}
    return {**record, "at": time.time(), "images": counts, "classes": list(site.plan.classes)}
