"""Which model is meant: the fused one of a round, or the best by this site's validation; and where its file is."""

from __future__ import annotations

from pathlib import Path

from hsl_node.errors import LocalStateError, UsageError
from hsl_node.federation.names import Digest, Round
from hsl_node.host.layout import Layout
from hsl_node.sync.store import models
from hsl_node.sync.store.journal import Journal


def find_model(state: Path, round: Round | None) -> models.Model:
    """The fused model of a round, whose file is whole; None: the best by this site's validation AUC.

    Raises:
        UsageError: no such round here, or its file was deleted since (only the newest and the best are kept). Or the
            run is over, and which one is the best not known yet.
        LocalStateError: its file is lost, or altered.
    """
    layout = Layout(state)
    with Journal.read_only(layout.journal) as journal:
        kept = {model.round: model for model in models.models(journal) if model.kind != "own"}
        fused = {
            r["round"]: models.Model(
                "fused", r["round"], r["sha256"], "not the best on this hospital's validation images"
            )
            for r in journal.rows("fused")
            if r["round"] > 0
        } | kept
        unvalidated = find_unvalidated(journal)
        if round is None and unvalidated is not None:
            raise not_final_yet(unvalidated, "--round N takes that of a round now")
        chosen = get_best(journal)[0] if round is None else round
    there = ", ".join(str(r) for r in fused if layout.fused(r).exists())
    if chosen not in fused or not (chosen in kept or layout.fused(chosen).exists()):
        raise UsageError(
            f"there is no fused model of round {chosen} here", remedy=f"rounds kept here: {there or 'none'}"
        )
    path_of(layout, fused[chosen], fix="" if chosen in kept else f"give another round; kept here: {there}")
    return fused[chosen]


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


def get_best(journal: Journal) -> tuple[Round, Digest]:
    """Raises: UsageError."""
    best = journal.best_model("fused")
    if best is None:
        raise UsageError(
            "no fused model has been validated here yet", remedy="wait for the first round: `hsl-node status`"
        )
    return best.round, best.sha256


def path_of(layout: Layout, model: models.Model, fix: str = "") -> Path:
    """`fix`: what to do where the daemon does not fetch it. Raises: LocalStateError: it is lost, or altered."""
    if harm := models.harm_of(layout, model):
        raise LocalStateError(harm.text(layout), remedy=fix or harm.fix(layout))
    return layout.fused(model.round)
