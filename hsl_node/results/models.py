"""Which model is meant: this hospital's, or the fused one of a round; and where its file is."""

from __future__ import annotations

from pathlib import Path

from hsl_node.errors import LocalStateError, UsageError
from hsl_node.federation.names import Round
from hsl_node.host.layout import Layout
from hsl_node.sync.candidates import find_best
from hsl_node.sync.store import models
from hsl_node.sync.store.journal import Journal


def find_model(state: Path, round: Round | None) -> models.Model:
    """The fused model of a round, recalibrated where that was better on this site's validation images; None: the
    hospital's model (`sync/candidates.py`). Its file is whole.

    Raises:
        UsageError: no such round here, or its file was deleted since (only the newest and the best are kept). Or the
            run is over, and which one is the best not known yet.
        LocalStateError: its file is lost, or altered.
    """
    layout = Layout(state)
    with Journal.read_only(layout.journal) as journal:
        unvalidated = find_unvalidated(journal)
        if round is None and unvalidated is not None:
            raise not_final_yet(unvalidated, "--round N takes that of a round now")
        if round is None:
            chosen = get_best(journal)
            path_of(layout, chosen)
            return chosen
        kept = {model.round: model for model in models.models(journal) if model.kind != "own"}
        fused = {r["round"]: r["sha256"] for r in journal.rows("fused") if r["round"] > 0}
        forms = [one for one in journal.candidates() if one.round == round and one.kind != "own"]
    there = ", ".join(str(r) for r in fused if layout.fused(r).exists())
    if round not in fused or not (round in kept or layout.fused(round).exists()):
        raise UsageError(
            f"there is no fused model of round {round} here", remedy=f"rounds kept here: {there or 'none'}"
        )
    why = kept[round].why if round in kept else "not the best on this hospital's validation images"
    best = find_best(forms)
    model = models.Model(best.kind if best else "fused", round, fused[round], why)
    path_of(layout, model, fix="" if round in kept else f"give another round; kept here: {there}")
    return model


def is_over(journal: Journal) -> bool:
    saved = journal.state()
    return saved is not None and saved["phase"] in models.OVER


def find_unvalidated(journal: Journal) -> Round | None:
    """The run is over, and its last fused model not validated: which one is the best nobody knows yet."""
    return journal.last_unvalidated() if is_over(journal) else None


def not_final_yet(round: Round, else_: str) -> UsageError:
    return UsageError(
        f"the last fused model (round {round}) is still to be validated on this site's images: it may be the best one",
        remedy=f'the daemon does that; call this again when `hsl-node status` has no line "still to do"; {else_}',
    )


def get_best(journal: Journal) -> models.Model:
    """Raises: UsageError."""
    best = journal.best_model()
    if best is None:
        raise UsageError(
            "no fused model has been validated here yet", remedy="wait for the first round: `hsl-node status`"
        )
    return models.Model(best.kind, best.round, best.sha256, models.BEST)


def best_fused(journal: Journal) -> models.Model | None:
    """The best one as it was fused, to compare with."""
    best = journal.best_model("fused")
    return models.Model("fused", best.round, best.sha256, "the best fused one") if best else None


def path_of(layout: Layout, model: models.Model, fix: str = "") -> Path:
    """`fix`: what to do where the daemon does not fetch it. Raises: LocalStateError: it is lost, or altered."""
    if harm := models.harm_of(layout, model):
        raise LocalStateError(harm.text(layout), remedy=fix or harm.fix(layout))
    return model.path(layout)
