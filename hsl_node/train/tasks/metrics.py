"""Scores -> AUC, accuracy and the rest. What cannot be known is None ("undefined"), never 0 or 0.5. Pure.

N images, C classes; `labels` are 0..C-1. For two classes `probabilities` is (N,), that of class 1; else (N, C), and the
one-against-rest figures are averaged over the classes with equal weight (macro).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

THRESHOLD = 0.5

Floats = NDArray[np.floating[Any]]
Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Metrics:
    """All figures of one set of images. None = undefined: the set lacks what the figure is about."""

    images: int
    auc: float | None
    accuracy: float | None
    recall: float | None
    precision: float | None
    f1: float | None
    sensitivity: float | None  # two classes: the same as recall; the clinic's word
    specificity: float | None
    confusion: tuple[tuple[int, ...], ...]  # [label][prediction], counts
    roc: tuple[tuple[tuple[float, float], ...], ...]  # curve -> points (false, true positive rate)


def measure(labels: Labels, probabilities: Floats) -> Metrics:
    """All metrics of one set.

    Raises:
        ValueError: a probability is not a finite number, or the shapes don't fit.
    """
    if len(labels) != len(probabilities) or not np.isfinite(probabilities).all():
        raise ValueError("one finite probability per image (and class) is needed")
    if probabilities.ndim == 1:
        predicted = (probabilities >= THRESHOLD).astype(np.int64)
        classes, scores = 2, [probabilities]
        positives = [1]
    else:
        predicted = probabilities.argmax(axis=1) if len(labels) else np.empty(0, np.int64)
        classes, scores = probabilities.shape[1], list(probabilities.T)
        positives = list(range(classes))
    table = np.zeros((classes, classes), np.int64)
    np.add.at(table, (labels, predicted), 1)

    def macro(rate: Callable[[int], float | None]) -> float | None:
        values = [rate(c) for c in positives]
        known = [v for v in values if v is not None]
        return float(np.mean(known)) if len(known) == len(values) else None

    recall = macro(lambda c: _ratio(table[c, c], table[c].sum()))
    return Metrics(
        images=len(labels),
        auc=macro(lambda c: auc(labels == c, scores[positives.index(c)])),
        accuracy=_ratio(np.trace(table), table.sum()),
        recall=recall,
        precision=macro(lambda c: _ratio(table[c, c], table[:, c].sum())),
        f1=macro(lambda c: _ratio(2 * table[c, c], table[c].sum() + table[:, c].sum())),
        sensitivity=recall,
        specificity=macro(lambda c: _ratio(_true_negatives(table, c), table.sum() - table[c].sum())),
        confusion=tuple(tuple(int(n) for n in row) for row in table),
        roc=tuple(roc(labels == c, scores[positives.index(c)]) for c in positives),
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


def _true_negatives(table: Labels, c: int) -> int:
    return int(table.sum() - table[c].sum() - table[:, c].sum() + table[c, c])


def _ratio(part: int | np.integer[Any], whole: int | np.integer[Any]) -> float | None:
    return float(part) / float(whole) if whole else None
