"""`hsl-node evaluate`: the test set, scored once, whether the daemon runs or not.

Of this hospital's model (own, fused or recalibrated: the best on its validation images), or the fused one of a round;
the journal holds it as "evaluation", "evaluation of round N" or, of images from elsewhere, "evaluation of set SHA256":

    {"evaluated": 1, "final": true, "kind": "fused", "round": 5, "rounds": {"fused": 5, ..}, "why": "..", "at": ..,
     "images": {"train": n, "validation": n, "test": n},
     "patients": {"train": n, ..}, "without_patient": n, "by_study": n, "classes": [..],
     "weights": {"fused": sha256, ..}, "auc_validation": {"fused": .., ..},
     "test": {"fused": {metrics}, "local": {metrics}, "alone": {metrics}},
     "thresholds": {"fused": {"value": .., "rule": ".."}, ..}, "sensitivity": null, "machine": {..},
     "test_set": sha256, "split_sha256": sha256, "name": "evaluation",
     "used_before": [{"at": .., "round": n, "times": n, "images": n, "earlier_run": false}]}

own, recalibrated   where it is this hospital's model: "kind" names that one
fused   the best one as it was fused     local   what this site sent in the last round, before its fusion
alone   trained without the federation for as many epochs as the run had (`alone=True`; takes as long)
fused_random   the fused one scored with random anchor pairing, as published (`pairing="random"`)

What each model said of each image is kept beside it (scores.py). torch is imported when something is to be scored, not
with this file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hsl_node.errors import FederationMismatch, HslError, NotInitialised, UsageError
from hsl_node.federation.config import load_federation
from hsl_node.federation.names import Digest, Round
from hsl_node.federation.node_toml import DataConfig, load_node
from hsl_node.host.layout import Layout
from hsl_node.results.models import best_fused, find_model, find_unvalidated, get_best, is_over, not_final_yet
from hsl_node.results.scores import Scores, arrays_of, joined, statistics_of, write_scores
from hsl_node.results.statistics import Statistics
from hsl_node.sync.candidates import ModelKind, in_words
from hsl_node.sync.store.journal import Journal
from hsl_node.sync.store.models import Model
from hsl_node.train.data.tables import is_table

if TYPE_CHECKING:
    from hsl_node.train.progress import Report

EVALUATION = "evaluation"  # its name in the journal


@dataclass(frozen=True)
class Wish:
    """What is to be measured beside the hospital's model, the fused one and that of the last round, and how."""

    alone: bool = False
    pairing: Literal["fixed", "random"] = "fixed"
    sensitivity: float | None = None  # that the threshold is to reach on validation images; None: Youden's J

    @property
    def kinds(self) -> set[str]:
        return {"fused", "local", *["alone"] * self.alone, *["fused_random"] * (self.pairing == "random")}


def evaluate(
    state: Path,
    *,
    round: Round | None = None,
    asked: Wish = Wish(),
    again: bool = False,
    report: Report = lambda event: None,
) -> dict[str, Any]:
    """The recorded evaluation; what it lacks of what is asked for is scored now. `report` hears a trainer's events.

    `round`: of the fused model of that round instead of the hospital's; it has a record of its own.

    Raises:
        UsageError: the run is not over, or its last model not validated: the test set is for the final model. `again`
            measures all the same, and counts. Or the images changed since a part of it was measured; or a sensitivity
            is asked for of more than two classes.
        FederationMismatch: another run took the place of this one meanwhile.
    """
    _require_two_classes(state, asked)
    layout, name = Layout(state), EVALUATION if round is None else f"{EVALUATION} of round {round}"
    with Journal.read_only(layout.journal) as journal:
        record, best = find_evaluation(journal, name), journal.best_model()
        wanted = asked.kinds | ({best.kind} if best and round is None else set())
        unvalidated = find_unvalidated(journal) if round is None else None
        final = is_over(journal) and unvalidated is None
        newest = best is not None and record is not None and which(record) == (best.kind, best.sha256)
        same = newest if round is None else record is not None
        if record is not None and not again and (same or not final) and wanted - {"local"} <= record["test"].keys():
            if asked.sensitivity in (None, record.get("sensitivity")):
                return record
            wanted = set()  # its threshold is of validation images, whose scores are kept
        if unvalidated is not None and not again:
            raise not_final_yet(unvalidated, "with --again the best one before it is measured now, and counted")
        if not final and not again:
            raise UsageError(
                "the run is not over; the test set is for the final model",
                remedy="wait until `hsl-node status` says finished"
                + ("; with --again it is measured now, and counted" if best is not None else ""),
            )
        scores = journal.result(scores_name(name)) if record else None
        main, fused, why = _final(journal, state) if round is None else (None, None, "")
        federation, rounds = journal.meta("federation"), journal.rounds_fused()
    main = main or find_model(state, round)
    wanted |= {main.kind} if wanted else set()
    anew = again or not same
    if record is None or anew:
        wanted |= set() if record is None else record["test"].keys()  # what was compared before stays comparable
        record, scores = {**_empty(main, why), "final": final}, None
    lacking = wanted - record["test"].keys()
    if lacking:
        from hsl_node.results.measuring import measured

        others = fused or replace(main, kind="fused")
        record, scores = measured(layout, record, scores, lacking, main, others, rounds, report)
        record["used_before"] = _uses_before(layout, name, scores["test"]["ids"])
    try:
        with Journal.beside(layout.journal) as journal, journal.transaction():
            if journal.meta("federation") != federation or not _is_of(journal, record):
                raise _another_run()
            return _recorded(journal, name, record, scores, anew, asked.sensitivity)
    except NotInitialised as exc:  # it was there: `join --replace` has moved it, and no start made the next one yet
        raise _another_run() from exc


def evaluate_external(
    state: Path,
    data: DataConfig,
    *,
    round: Round | None = None,
    asked: Wish = Wish(),
    report: Report = lambda event: None,
) -> dict[str, Any]:
    """Labelled images from elsewhere, prepared as this site's own. They are no test set: nothing is refused, and each
    call measures. This site's own images, those of its test set too, and others of patients that it trained or
    validated on are left out and counted.

    Raises:
        UsageError: none is left.
    """
    from hsl_node.results.measuring import measured
    from hsl_node.train.alone import find_alone
    from hsl_node.train.data.external import open_external
    from hsl_node.train.progress import ticker

    _require_two_classes(state, asked)
    layout, chosen = Layout(state), find_model(state, round)
    with Journal.read_only(layout.journal) as journal:
        rounds = journal.rounds_fused()
        _, fused, why = _final(journal, state) if round is None else (None, None, "")
    found = open_external(state, data, ticker(report, "decoding images"))
    if found.left_out == len(found.dataset.labels):
        raise UsageError(
            f"all {found.left_out} images there are this site's own, or of patients that it trained or validated on",
            remedy="an external set holds none of them; the test set is measured without --data",
        )
    wanted = asked.kinds | {chosen.kind} | ({"alone"} if find_alone(state) else set())
    empty, others = _empty(chosen, why), fused or replace(chosen, kind="fused")
    record, scores = measured(layout, empty, None, wanted, chosen, others, rounds, report, external=found.dataset)
    record["external"] = {"left_out": found.left_out}
    name = f"{EVALUATION} of set {record['test_set']}"
    with Journal.beside(layout.journal) as journal, journal.transaction():
        own = _own_sensitivity(journal, chosen) if asked.sensitivity is None else asked.sensitivity
        return _recorded(journal, name, record, scores, True, own)


def record_of(journal: Journal, model: Model) -> dict[str, Any] | None:
    """The evaluation, where one is of this model."""
    records = (find_evaluation(journal, name) for name in (EVALUATION, f"{EVALUATION} of round {model.round}"))
    return next((record for record in records if record and which(record) == (model.kind, model.sha256)), None)


def which(record: Mapping[str, Any]) -> tuple[ModelKind, Digest]:
    """The model that a record is about: its kind, and the sha256 of its file."""
    return record["kind"], record["weights"].get(record["kind"])


def _final(journal: Journal, state: Path) -> tuple[Model, Model | None, str]:
    """This hospital's model, the best fused one to compare it with, and why it is that one. Raises: UsageError."""
    score = load_federation(state).plan.card.score_name
    return get_best(journal), best_fused(journal), in_words(journal.candidates(), score)


def _empty(main: Model, why: str) -> dict[str, Any]:
    """A record before anything is measured."""
    parts: dict[str, Any] = {part: {} for part in ("rounds", "weights", "auc_validation", "test")}
    return {"evaluated": 0, "final": True, "kind": main.kind, "round": main.round, "why": why, **parts}


def _own_sensitivity(journal: Journal, model: Model) -> float | None:
    """What this model's own threshold was chosen for: `predict` and `export` decide with that one."""
    return (record_of(journal, model) or {}).get("sensitivity")


def _require_two_classes(state: Path, asked: Wish) -> None:
    classes = load_federation(state).plan.classes
    if asked.sensitivity is not None and len(classes) > 2:
        raise UsageError(
            f"a threshold belongs to two classes, and the plan has {len(classes)}", remedy="leave --sensitivity out"
        )


def find_evaluation(journal: Journal, name: str = EVALUATION) -> dict[str, Any] | None:
    """What is recorded, where it is of a model of this journal's run."""
    record = journal.result(name)
    return record if record is not None and _is_of(journal, record) else None


def _is_of(journal: Journal, record: Mapping[str, Any]) -> bool:
    """Is its model one of this journal's run?"""
    round, (kind, sha256) = record["round"], which(record)
    known = journal.own_digests() if kind == "own" else journal.fused_digests([round])
    return sha256 is not None and known.get(round) == sha256


def find_evaluations(journal: Journal) -> dict[str, dict[str, Any]]:
    """All of them by name, that of the final model first."""
    names = sorted(journal.result_names(EVALUATION))
    return {name: record for name in names if (record := find_evaluation(journal, name))}


def find_scores(journal: Journal, record: Mapping[str, Any]) -> Scores:
    """What is kept beside a record."""
    return journal.result(scores_name(record["name"])) or {}


def scores_name(name: str) -> str:
    return f"scores of {name}"


def statistics(state: Path, record: Mapping[str, Any]) -> Statistics:
    with Journal.read_only(Layout(state).journal) as journal:
        return statistics_of(record, find_scores(journal, record))


def source_of(state: Path, path: Path | None, columns: Mapping[str, str]) -> DataConfig:
    """This site's images, or others that are prepared in the same way: its window and its labels, not its selection."""
    data = load_node(state).data
    if path is None:
        return data
    named = {**(columns or data.columns), "split": ""} if is_table(path) else {}
    return data.model_copy(update={"path": path, "columns": named, "filter": {}, "exclude": ()})


def write_csv(state: Path, data: DataConfig, record: Mapping[str, Any], out: Path) -> None:
    """The scores of a record; `data`: where its images are, for their names.

    Raises:
        DataError: the images are not there.
    """
    from hsl_node.train.data.gathering import gather
    from hsl_node.train.progress import unheard

    found = gather(data, load_federation(state).plan, Layout(state).cache, unheard)
    pairs = zip(found.items, found.images, strict=True)
    names = {image.sha256: (found.source.name(item), item.patient or "") for item, image in pairs}
    with Journal.read_only(Layout(state).journal) as journal:
        write_scores(out, record, find_scores(journal, record), names)


def _recorded(
    journal: Journal,
    name: str,
    record: dict[str, Any],
    scores: Scores | None,
    anew: bool,
    sensitivity: float | None,
) -> dict[str, Any]:
    """As every later call will give it. Figures that another evaluation recorded meanwhile of the same model and images
    stay, and its count does."""
    there, beside = find_evaluation(journal, name), journal.result(scores_name(name))
    if there is not None:
        if which(there) == which(record) and there["test_set"] == record["test_set"]:
            parts = {key: {**there[key], **record[key]} for key in ("rounds", "weights", "auc_validation", "test")}
            record = {**record, **parts}
            scores = joined(beside, scores) if scores else beside
        record = {**record, "evaluated": int(there["evaluated"]) + anew}
    else:
        record = {**record, "evaluated": 1}
    wish = sensitivity if sensitivity is not None else (there or {}).get("sensitivity")
    if scores is not None:
        record = {**record, "sensitivity": wish, "thresholds": _thresholds(scores, wish)}
        journal.record_result(scores_name(name), scores)
    record = {**record, "name": name}
    journal.record_result(name, record)
    return journal.result(name) or record


def _thresholds(scores: Scores, sensitivity: float | None) -> dict[str, Any]:
    """Of each model of two classes, on its validation scores."""
    from hsl_node.train.tasks.metrics import choose_threshold

    labels, found = arrays_of(scores["validation"])
    return {
        kind: asdict(choose_threshold(labels, values, sensitivity)) for kind, values in found.items() if values.ndim < 2
    }


def _uses_before(layout: Layout, name: str, ids: Sequence[str]) -> list[dict[str, Any]]:
    """Other evaluations that saw some of these test images: of other rounds, and of earlier runs in past/.

    A journal there that another version of hsl-node wrote cannot be read, and is not counted.
    """
    mine, found = set(ids), []
    for path in (layout.journal, *sorted(layout.past.glob(f"*/{layout.journal.name}"))):
        with suppress(HslError), Journal.read_only(path) as journal:
            for other, record in find_evaluations(journal).items():
                if (path, other) == (layout.journal, name) or "external" in record:
                    continue
                if seen := len(mine & set(find_scores(journal, record)["test"]["ids"])):
                    use = {"kind": record["kind"], "round": record["round"], "at": record["at"], "images": seen}
                    use["times"] = record["evaluated"]
                    found.append({**use, "earlier_run": path != layout.journal})
    return found


def _another_run() -> FederationMismatch:
    return FederationMismatch(
        "this state directory holds another run than when the evaluation began: nothing was recorded",
        remedy="`hsl-node evaluate` measures the run that is here now",
    )
