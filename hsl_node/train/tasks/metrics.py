"""Scores -> AUC, accuracy and the rest. What cannot be known is None ("undefined"), never 0 or 0.5. Pure.

N images, C classes; `labels` are 0..C-1. For two classes `probabilities` is (N,), that of class 1; else (N, C), and the
one-against-rest figures are averaged with equal weight over the classes that the set has images of (macro).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

THRESHOLD = 0.5
CHOOSE_MIN = 10  # validation images of each class: with fewer a chosen threshold is no better than 0.5

Floats = NDArray[np.floating[Any]]
Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Metrics:
    """All figures of one set of images. None = undefined: the set lacks what the figure is about."""

    images: int
    classes: int  # that it has images of; more than two: what the averages are over
    auc: float | None
    accuracy: float | None
    recall: float | None
    precision: float | None
    f1: float | None
    sensitivity: float | None  # two classes: the same as recall; the clinic's word
    specificity: float | None
    confusion: tuple[tuple[int, ...], ...]  # [label][prediction], counts
    roc: tuple[tuple[tuple[float, float], ...], ...]  # curve -> points (false, true positive rate)


@dataclass(frozen=True)
class Threshold:
    """From which probability of class 1 on an image is called positive, and how that was chosen."""

    value: float
    rule: str


def choose_threshold(labels: Labels, probabilities: Floats, sensitivity: float | None = None) -> Threshold:
    """On validation images of two classes: the largest Youden's J (sensitivity + specificity - 1), of equals the lowest
    threshold; or the highest threshold with at least that sensitivity. 0.5 where there are too few of them.

    >>> choose_threshold(np.repeat([0, 1], 10), np.linspace(0, 1, 20)).value.__round__(3)
    0.526
    """
    positive = labels == 1
    ill, well = int(positive.sum()), int((~positive).sum())
    if min(ill, well) < CHOOSE_MIN:
        few = f"too few to choose one: {ill} positive and {well} negative, {CHOOSE_MIN} of each are needed"
        return Threshold(THRESHOLD, f"not chosen ({few})")
    hits, false = _counts(positive, probabilities)
    at = -np.unique(-probabilities)  # falling, as the counts that follow the first
    if sensitivity is None:
        gained = hits[1:] * well - false[1:] * ill  # J in whole numbers: exact
        best, rule = int(np.flatnonzero(gained == gained.max())[-1]), "largest Youden's J"
    else:
        best, rule = int(np.argmax(hits[1:] / ill >= sensitivity)), f"sensitivity of at least {sensitivity:g}"
    return Threshold(float(at[best]), f"{rule} on {ill} positive and {well} negative validation images")


def measure(labels: Labels, probabilities: Floats, log_odds: Floats | None = None) -> Metrics:
    """All metrics of one set. AUC and ROC rank by log-odds of the same shape, where they are known: probabilities near
    0 and 1 become equal by rounding.

    Raises:
        ValueError: a probability is not a finite number, or the shapes don't fit.
    """
    if len(labels) != len(probabilities) or not np.isfinite(probabilities).all():
        raise ValueError("one finite probability per image (and class) is needed")
    if probabilities.ndim == 1:
        classes, predicted = 2, (probabilities >= THRESHOLD).astype(np.int64)
    else:
        classes, predicted = probabilities.shape[1], probabilities.argmax(axis=1)
    ranked = probabilities if log_odds is None else log_odds
    score_of = {1: ranked} if ranked.ndim == 1 else dict(enumerate(ranked.T))
    table = np.zeros((classes, classes), np.int64)
    np.add.at(table, (labels, predicted), 1)
    hits, labelled, called = table.diagonal(), table.sum(axis=1), table.sum(axis=0)

    def macro(rate: Callable[[int], float | None]) -> float | None:
        over = [c for c in score_of if classes == 2 or labelled[c]]
        known = [value for c in over if (value := rate(c)) is not None]
        return float(np.mean(known)) if known and len(known) == len(over) else None

    recall = macro(lambda c: _ratio(hits[c], labelled[c]))
    return Metrics(
        images=len(labels),
        classes=int((labelled > 0).sum()),
        auc=macro(lambda c: auc(labels == c, score_of[c])),
        accuracy=_ratio(hits.sum(), len(labels)),
        recall=recall,
        precision=macro(lambda c: _ratio(hits[c], called[c])),
        f1=macro(lambda c: _ratio(2 * hits[c], labelled[c] + called[c])),
        sensitivity=recall,
        specificity=macro(lambda c: _ratio(len(labels) - labelled[c] - called[c] + hits[c], len(labels) - labelled[c])),
        confusion=tuple(tuple(int(n) for n in row) for row in table),
        roc=tuple(roc(labels == c, score) for c, score in score_of.items()),
    )


def auc(positive: NDArray[np.bool_], score: Floats) -> float | None:
    """Area under the ROC curve = the chance that a positive scores above a negative, ties counting half.

    >>> auc(np.array([False, True, True]), np.array([0.2, 0.2, 0.9]))
    0.75
    """
    found, false = _counts(positive, score)
    if found[-1] == 0 or false[-1] == 0:
        return None
    twice = np.sum(np.diff(false) * (found[1:] + found[:-1]))  # trapezoids in whole numbers: exact
    return float(twice / (2 * found[-1] * false[-1]))


def roc(positive: NDArray[np.bool_], score: Floats) -> tuple[tuple[float, float], ...]:
    """Points (false positive rate, true positive rate) from (0, 0) to (1, 1); empty where undefined."""
    found, false = _counts(positive, score)
    if found[-1] == 0 or false[-1] == 0:
        return ()
    return tuple(zip((false / false[-1]).tolist(), (found / found[-1]).tolist(), strict=True))


def _counts(positive: NDArray[np.bool_], score: Floats) -> tuple[Labels, Labels]:
    """True and false positives at each distinct threshold, falling; both start with 0."""
    order = np.argsort(-score, kind="stable")
    last_of_tie = np.append(np.flatnonzero(np.diff(score[order])), len(order) - 1) if len(order) else order
    hits = np.cumsum(positive[order])[last_of_tie]
    return np.append(0, hits), np.append(0, last_of_tie + 1 - hits)


def _ratio(part: int | np.integer[Any], whole: int | np.integer[Any]) -> float | None:
    return float(part) / float(whole) if whole else None
