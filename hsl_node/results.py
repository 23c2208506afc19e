"""What came of it: `evaluate`, `predict`, `export`. Reads the journal and the weights, whether the daemon runs or not.

The test set is scored once, of the final model (the fused one with this site's best validation AUC), and the scores are
recorded in the journal under "evaluation":

    {"evaluated": 1, "final": true, "round": 5, "at": .., "images": {"train": n, "validation": n, "test": n},
     "classes": [..], "weights": {"fused": sha256, ..}, "auc_validation": {"fused": .., ..},
     "test": {"fused": {metrics}, "local": {metrics}, "alone": {metrics}}}

fused   the final model          local   this site's own checkpoint of the last round, before its fusion
alone   trained without the federation for as many epochs (`alone=True`; takes as long as the run did)
fused_random   the final model scored with random anchor pairing, as published (`pairing="random"`)

torch is imported when something is to be scored, not with this file.
"""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hsl_node import kept
from hsl_node.config import load_federation, load_node
from hsl_node.enrol import write_new
from hsl_node.errors import DataError, FederationMismatch, LocalStateError, NotInitialised, UsageError
from hsl_node.sync.journal import Journal
from hsl_node.sync.names import Digest, Round
from hsl_node.sync.store import Layout
from hsl_node.sync.tensors import sha256_of
from hsl_node.units import auc, table

if TYPE_CHECKING:
    from hsl_node.train.scoring import Pairing

EVALUATION = "evaluation"  # its name in the journal
MODELS = {  # in the order of tables; how people read them
    "alone": "trained alone",
    "local": "own model, last round",
    "fused": "fused",
    "fused_random": "fused, random anchor pairing",
}

Report = Callable[[dict[str, Any]], None]


def _silent(_event: dict[str, Any]) -> None:
    pass


@dataclass(frozen=True)
class Model:
    """One weights file to score."""

    kind: str  # a key of MODELS
    weights: Path
    sha256: Digest
    pairing: Pairing = "fixed"


# ------------------------------------------------------------------ evaluate


def evaluate(
    state: Path,
    *,
    alone: bool = False,
    again: bool = False,
    pairing: Literal["fixed", "random"] = "fixed",
    report: Report = _silent,
) -> dict[str, Any]:
    """The recorded evaluation; what it lacks of what is asked for is scored now. `report` hears a trainer's events.

    Raises:
        UsageError: the run is not over, or its last model not validated: the test set is for the final model. `again`
            measures all the same, and counts.
        FederationMismatch: another run took the place of this one meanwhile.
    """
    layout = Layout(state)
    with _journal(layout) as journal:
        record, best = find_evaluation(journal), journal.best_fused()
        wanted = (
            {"fused", "local"} | ({"alone"} if alone else set()) | ({"fused_random"} if pairing == "random" else set())
        )
        over, unvalidated = _is_over(journal), _unvalidated(journal)
        final = over and unvalidated is None
        same = record is not None and best is not None and record["weights"].get("fused") == best[1]
        if record is not None and not again and (same or not final) and wanted - {"local"} <= record["test"].keys():
            return record
        if unvalidated is not None and not again:
            raise _not_final_yet(unvalidated, "with --again the best one before it is measured now, and counted")
        if not final and not again:
            raise UsageError(
                "the run is not over; the test set is for the final model",
                remedy="wait until `hsl-node status` says finished; with --again it is measured now, and counted",
            )
        round, sha256 = _best(journal)
        federation = journal.meta("federation")
    anew = again or not same
    if record is None or anew:
        wanted |= set() if record is None else record["test"].keys()  # what was compared before stays comparable
        record = {
            "evaluated": 0,  # counted when it is recorded
            "final": final,
            "round": round,
            "weights": {},
            "auc_validation": {},
            "test": {},
        }
    record = _measured(layout, record, wanted - record["test"].keys(), (round, sha256), report)
    with _writing(layout) as journal, journal.transaction():
        if journal.meta("federation") != federation or journal.fused_digests([round]).get(round) != sha256:
            raise _another_run()
        journal.record_result(EVALUATION, _joined(find_evaluation(journal), record, anew))
        return journal.result(EVALUATION) or record  # as every later call will give it


def find_evaluation(journal: Journal) -> dict[str, Any] | None:
    """What is recorded, where it is of a model of this journal's run."""
    record = journal.result(EVALUATION)
    if (
        record is not None
        and journal.fused_digests([record["round"]]).get(record["round"]) == record["weights"]["fused"]
    ):
        return record
    return None


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
    figures = ("auc", "accuracy", "sensitivity", "specificity", "precision", "f1")
    rows = [(f if f != "auc" else "AUC", *(_or_undefined(record["test"][k][f]) for k in kinds)) for f in figures]
    counts = record["images"]
    missing = [
        name for name, row in zip(record["classes"], record["test"]["fused"]["confusion"], strict=True) if sum(row) == 0
    ]
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


def _measured(
    layout: Layout, record: dict[str, Any], wanted: set[str], best: tuple[Round, Digest], report: Report
) -> dict[str, Any]:
    """The record with the wanted models scored on the test set."""
    from hsl_node.train import alone as alone_training
    from hsl_node.train import scoring
    from hsl_node.train.lock import hold_lock
    from hsl_node.train.site import open_site
    from hsl_node.train.sources import TEST, TRAIN, VALIDATION
    from hsl_node.train.throttle import ticker

    site = open_site(layout.state, ticker(report, "decoding images"))
    models = [m for m in (_local(layout),) if m and m.kind in wanted]
    if wanted & {"fused", "fused_random"}:
        path = _whole(layout, kept.Model(*best, kept.BEST))
        pairings: dict[str, Pairing] = {"fused": "fixed", "fused_random": "random"}
        models += [Model(kind, path, best[1], pairing) for kind, pairing in pairings.items() if kind in wanted]
    if "alone" in wanted:
        with hold_lock(layout.state / "trainer" / "alone"):
            trained = alone_training.train_site_alone(site, layout.state, rounds=site.plan.rounds, report=report)
        models.append(Model("alone", layout.state / "trainer" / alone_training.WEIGHTS_FILE, Digest(trained.sha256)))
    for model in models:
        figures = {
            split: scoring.score(
                model.weights, site.dataset, site.plan, site.machine, anchor=site.anchor, split=split,
                anchor_pairing=model.pairing, tick=ticker(report, "scoring"),
            ).metrics
            for split in (TEST, VALIDATION)
        }  # fmt: skip
        record["test"][model.kind] = figures[TEST].to_dict()
        record["weights"][model.kind] = model.sha256
        record["auc_validation"][model.kind] = figures[VALIDATION].auc
    counts = {n: len(site.indices(s)) for n, s in (("train", TRAIN), ("validation", VALIDATION), ("test", TEST))}
    return {**record, "at": time.time(), "images": counts, "classes": list(site.plan.classes)}


def _is_over(journal: Journal) -> bool:
    saved = journal.state()
    return saved is not None and saved["phase"] in ("finished", "halted")


def _unvalidated(journal: Journal) -> Round | None:
    """The run is over, and its last fused model not validated: which one is the best nobody knows yet."""
    return journal.last_unvalidated() if _is_over(journal) else None


def _not_final_yet(round: Round, else_: str) -> UsageError:
    return UsageError(
        f"the last fused model (round {round}) is still to be validated on this site's images: it may be the best one",
        remedy=f'the daemon does that; call this again when `hsl-node status` has no line "still to do"; {else_}',
    )


def _best(journal: Journal) -> tuple[Round, Digest]:
    best = journal.best_fused()
    if best is None:
        raise UsageError(
            "no fused model has been validated here yet", remedy="wait for the first round: `hsl-node status`"
        )
    return best


def _local(layout: Layout) -> Model | None:
    """This site's own checkpoint of the last round it trained."""
    newest = max((layout.state / "outbox").glob("r*.safetensors"), default=None)
    return Model("local", newest, sha256_of(newest)) if newest else None


def _whole(layout: Layout, model: kept.Model) -> Path:
    if harm := kept.harm_of(layout, model):
        raise LocalStateError(harm.text(layout), remedy=harm.fix(layout))
    return layout.fused(model.round)


def _or_undefined(value: float | None) -> str:
    return "undefined" if value is None else auc(value)


# ------------------------------------------------------------------ predict, export


def predict(state: Path, images: Sequence[Path], *, round: Round | None = None) -> dict[str, Any]:
    """Probabilities of each class: `{"round", "sha256", "classes", "images": [{"image", "probabilities"}]}`.

    Raises:
        DataError: images that cannot be read, each with its name: this goes to the operator's own terminal.
    """
    import numpy as np

    from hsl_node.train import scoring
    from hsl_node.train.cache import as_colour
    from hsl_node.train.data import window_of
    from hsl_node.train.images import UnreadableImage, decode_image

    plan = load_federation(state).plan
    window = window_of(load_node(state).data)
    model = find_model(state, round)
    pixels, unreadable = [], []
    for path in images:
        try:
            pixels.append(as_colour(decode_image(path, plan.image_size, window)))
        except UnreadableImage as exc:
            unreadable.append(f"{path}: {exc.message}")
    if unreadable:
        raise DataError("\n".join(unreadable), remedy="mend or leave out these files; nothing was predicted")
    machine, anchor = _machine_and_anchor(state)
    found = scoring.predict(model.weights, np.stack(pixels), plan, machine, anchor=anchor)
    rows = np.stack([1 - found, found], axis=1) if found.ndim == 1 else found
    return {
        "round": model.round,
        "sha256": model.sha256,
        "classes": list(plan.classes),
        "images": [
            {"image": str(path), "probabilities": dict(zip(plan.classes, row.tolist(), strict=True))}
            for path, row in zip(images, rows, strict=True)
        ],
    }


def write_csv(found: Mapping[str, Any], out: Path | None) -> None:
    """Predictions as CSV: the image, a column of probabilities per class, the model's sha256.

    Bytes of a file name that are no UTF-8 stand there as in every output: `M\\udcfcller.png`.
    """
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(("image", *found["classes"], "model_sha256"))
    for row in found["images"]:
        chances = (f"{row['probabilities'][c]:.6f}" for c in found["classes"])
        rows.writerow((row["image"], *chances, found["sha256"]))
    content = text.getvalue().encode("utf-8", "backslashreplace").decode("utf-8")
    if out is None:
        print(content, end="")
    else:
        write_new(out, content, mode=0o600, replace=True)  # names of images are names of patients, often


def export(state: Path, out: Path, *, round: Round | None = None, onnx: bool = False) -> tuple[tuple[Path, ...], str]:
    """Write the model into the folder `out`: its files, and why there is no ONNX file ("" where there is one)."""
    from hsl_node.train.export import export_model

    federation = load_federation(state)
    model = find_model(state, round)
    machine, anchor = _machine_and_anchor(state)
    with _journal(Layout(state)) as journal:
        record = find_evaluation(journal)
        inputs = {r["peer"]: r["sha256"] for r in journal.rows("manifests", model.round)}
    scored = record is not None and record["weights"].get("fused") == model.sha256
    facts = {
        "trained_by": load_node(state).name,
        "federation": {"name": federation.name, "sha256": federation.digest, "peers": list(federation.peers)},
        "round": model.round,
        "fused_from": inputs,
        "anchor": federation.anchor.model_dump(mode="json") if federation.anchor else None,
        "test": {k: v for k, v in record["test"]["fused"].items() if k != "roc"} if record and scored else None,
    }
    done = export_model(
        model.weights, out, plan=federation.plan, machine=machine, anchor=anchor, facts=facts, onnx=onnx
    )
    return done.files, done.onnx_missing if onnx else ""


@dataclass(frozen=True)
class Fused:
    round: Round
    sha256: Digest
    weights: Path


def find_model(state: Path, round: Round | None) -> Fused:
    """The fused model of a round; None: the best by this site's validation AUC.

    Raises:
        UsageError: no such round here, or its file was deleted since (only the newest and the best are kept). Or the
            run is over, and which one is the best not known yet.
        LocalStateError: its file is lost, or altered.
    """
    layout = Layout(state)
    with _journal(layout) as journal:
        fused = {r["round"]: Digest(r["sha256"]) for r in journal.rows("fused") if r["round"] > 0}
        unvalidated = _unvalidated(journal)
        if round is None and unvalidated is not None:
            raise _not_final_yet(unvalidated, "--round N takes that of a round now")
        chosen = _best(journal)[0] if round is None else round
        kept_here = {model.round: model for model in kept.models(journal)}
    if chosen in kept_here:
        return Fused(chosen, fused[chosen], _whole(layout, kept_here[chosen]))
    path, there = layout.fused(chosen), ", ".join(str(r) for r in fused if layout.fused(r).exists())
    if chosen not in fused or not path.exists():
        raise UsageError(
            f"there is no fused model of round {chosen} here", remedy=f"rounds kept here: {there or 'none'}"
        )
    if sha256_of(path) != fused[chosen]:
        raise LocalStateError(
            f"{path} is altered: it is not the file with sha256 {fused[chosen][:12]} that the journal names",
            remedy=f"give another round; kept here: {there}",
        )
    return Fused(chosen, fused[chosen], path)


def _machine_and_anchor(state: Path) -> tuple[Any, Any]:
    from hsl_node.train import anchor
    from hsl_node.train.site import open_machine

    federation = load_federation(state)
    machine = open_machine(state, federation.plan)
    if federation.anchor is None:
        return machine, None
    return machine, anchor.load(load_node(state).anchor or Layout(state).anchor, federation.anchor.fingerprint)


@contextmanager
def _writing(layout: Layout) -> Iterator[Journal]:
    try:
        journal = Journal.beside(layout.journal)
    except NotInitialised as exc:  # it was there: `join --replace` has moved it, and no start made the next one yet
        raise _another_run() from exc
    try:
        yield journal
    finally:
        journal.close()


@contextmanager
def _journal(layout: Layout) -> Iterator[Journal]:
    journal = Journal.read_only(layout.journal)
    try:
        yield journal
    finally:
        journal.close()
