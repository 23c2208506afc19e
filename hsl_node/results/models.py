"""Which model is meant: the fused one of a round, or the best by this site's validation; and where its file is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hsl_node.errors import LocalStateError, UsageError
from hsl_node.federation.names import Digest, Round
from hsl_node.host.layout import Layout
from hsl_node.sync.store import models
from hsl_node.sync.store.journal import Journal
from hsl_node.weights.whole import holds


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
    with Journal.read_only(layout.journal) as journal:
        fused = {r["round"]: Digest(r["sha256"]) for r in journal.rows("fused") if r["round"] > 0}
        unvalidated = find_unvalidated(journal)
        if round is None and unvalidated is not None:
            raise not_final_yet(unvalidated, "--round N takes that of a round now")
        chosen = get_best(journal)[0] if round is None else round
        kept_here = {model.round: model for model in models.models(journal)}
    if chosen in kept_here:
        return Fused(chosen, fused[chosen], path_of(layout, kept_here[chosen]))
    path, there = layout.fused(chosen), ", ".join(str(r) for r in fused if layout.fused(r).exists())
    if chosen not in fused or not path.exists():
        raise UsageError(
            f"there is no fused model of round {chosen} here", remedy=f"rounds kept here: {there or 'none'}"
        )
    if not holds(path, fused[chosen]):
        raise LocalStateError(
            f"{path} is altered: it is not the file with sha256 {fused[chosen][:12]} that the journal names",
            remedy=f"give another round; kept here: {there}",
        )
    return Fused(chosen, fused[chosen], path)


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
    best = journal.best_fused()
    if best is None:
        raise UsageError(
            "no fused model has been validated here yet", remedy="wait for the first round: `hsl-node status`"
        )
    return best


def path_of(layout: Layout, model: models.Model) -> Path:
    """Raises: LocalStateError: it is lost, or altered."""
    if harm := models.harm_of(layout, model):
        raise LocalStateError(harm.text(layout), remedy=harm.fix(layout))
    return layout.fused(model.round)
