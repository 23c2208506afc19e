"""Which model a hospital has: the best, by its own validation, of what it could use. Pure.

Of each round there are three: `own`, what this site sent, trained on from the fusion before (of round 1, before any
fusion, it is no candidate); `fused`, the fusion as this site takes it up; `recalibrated`, the same with BatchNorm
statistics of the site's own training images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from hsl_node.federation.names import Digest, Round

ModelKind = Literal["own", "fused", "recalibrated"]
KINDS: tuple[ModelKind, ...] = get_args(ModelKind)  # as they come about in a round


@dataclass(frozen=True)
class Candidate:
    kind: ModelKind
    round: Round
    sha256: Digest  # of its file: of the fused model, or of `Layout.own`
    score: float | None = None  # on this site's validation images, more is better; None: undefined
    loss: float | None = None


def candidates(own: Sequence[Mapping[str, Any]], fused: Sequence[Mapping[str, Any]]) -> list[Candidate]:
    """Of the journal's rows, in the order in which they came about. Only what is validated; round 0 is no result."""
    found = [Candidate("own", r["round"], r["sha256"], r["score"], r["loss"]) for r in own if r["round"] > 1]
    for r in fused:
        if r["validated"] and r["round"] > 0:
            found.append(Candidate("fused", r["round"], r["sha256"], r["score"], r["loss"]))
            again = r["recalibrated_score"], r["recalibrated_loss"]
            if again[1] is not None:
                found.append(Candidate("recalibrated", r["round"], r["sha256"], *again))
    return sorted(found, key=_turn)


def find_best(found: Sequence[Candidate]) -> Candidate | None:
    """The highest score; equal or undefined: the lowest loss; then the earlier; where no loss is known: the latest."""

    def rank(one: Candidate) -> tuple[bool, float, bool, float, int]:
        turn = 3 * one.round + KINDS.index(one.kind)
        score, loss = one.score, one.loss
        return score is None, -(score or 0.0), loss is None, loss or 0.0, -turn if loss is None else turn

    return min(found, key=rank, default=None)


def in_words(found: Sequence[Candidate], score: str) -> str:
    """The hospital's model and why, in a line: what it is, and the best of the other kinds. "": none yet. `score`: how
    people call it.

    "own model of round 3: best validation AUC here, 0.912 (fused 0.870 in round 2, recalibrated 0.901 in round 3)"
    """
    best = find_best(found)
    if best is None:
        return ""
    of = f"{'own' if best.kind == 'own' else 'fused'} model of round {best.round}"
    of += ", recalibrated" if best.kind == "recalibrated" else ""
    if best.score is None:
        return f"{of}: {'no validation image tells' if best.loss is None else 'lowest validation loss here'}"
    others = [find_best([one for one in found if one.kind == kind]) for kind in KINDS if kind != best.kind]
    known = [f"{o.kind} {o.score:.3f} in round {o.round}" for o in others if o is not None and o.score is not None]
    return f"{of}: best validation {score} here, {best.score:.3f}" + (f" ({', '.join(known)})" if known else "")


def best_scores(sent: Mapping[Round, float | None], found: Sequence[Candidate]) -> dict[Round, float | None]:
    """Of each round the highest score, for the plateau rule. `sent`: of what this site signed, also where its own
    files are lost."""
    scores = {round: [score] for round, score in sent.items()}
    for one in found:
        scores.setdefault(one.round, []).append(one.score)
    return {round: max((s for s in scores[round] if s is not None), default=None) for round in sorted(scores)}


def _turn(one: Candidate) -> tuple[Round, int]:
    return one.round, KINDS.index(one.kind)
