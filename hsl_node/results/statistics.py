"""How sure a test figure is, and whether one model is better than another: bootstrap over patients. Pure.

N images, P patients, B resamples, C classes. A resample draws P patients with replacement, and with a patient all its
images: images of one patient are alike, so drawing images would make the intervals too narrow. An image whose patient
nobody knows counts as a patient of its own; the very same image twice as one. All models are measured on the same
resamples, so a comparison is paired.

Intervals are the percentiles 2.5 and 97.5 of the resamples, widened to hold the figure itself; p is two-tailed, by
percentiles too (HSL paper: 1000 resamples, alpha 0.05). What cannot be known is None, and `too_few` says why.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from numpy.random import Generator

Floats = NDArray[np.floating[Any]]
Integers = NDArray[np.int64]
Counts = NDArray[np.int16]

RESAMPLES = 1000  # as in the paper
PATIENTS_MIN = 10  # of each class: with fewer, resamples repeat the same few, and intervals come out far too narrow
CELLS_MAX = 250_000  # of the matrix that some resamples at a time give: 2 MB, which a processor's cache holds
BINS = 10  # of a calibration plot: as many images in each

Verdict = Literal["better", "worse", "no difference", "too few"]


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval."""

    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class OfClass:
    """One class against the rest."""

    auc: Estimate
    auprc: Estimate  # average precision; a model that knows nothing has the class's share
    share: float


@dataclass(frozen=True)
class OfModel:
    """Figures over images, but for `auc_patients`. More than two classes: AUC and AUPRC are means over the classes that
    there are images of."""

    auc: Estimate
    auprc: Estimate
    brier: Estimate  # mean squared error of the probability of class 1, 0 to 1; C > 2: summed over classes, 0 to 2
    sensitivity: Estimate  # at the threshold; None with more than two classes
    specificity: Estimate
    auc_patients: Estimate  # one figure per patient: the mean probability over its images
    classes: Mapping[str, OfClass]
    calibration: Sequence[tuple[float, float, int]]  # of class 1: mean probability, share that is ill, images


@dataclass(frozen=True)
class Comparison:
    """AUC of `model` less that of `other`."""

    model: str
    other: str
    difference: Estimate
    p: float | None
    verdict: Verdict  # on `model`


@dataclass(frozen=True)
class Statistics:
    images: int
    patients: int | None  # None: no patient is known, so every image counts as one
    without_patient: int  # images without a patient, where others have one
    images_of: Mapping[str, int]  # class -> images
    patients_of: Mapping[str, int]  # class -> patients, or images, with an image of it
    too_few: str  # why there are no intervals; "": there are
    mixed: int  # patients with images of several classes: left out of `auc_patients` where these are more than two
    models: Mapping[str, OfModel]
    comparisons: Sequence[Comparison]

    @property
    def unit(self) -> str:
        return "image" if self.patients is None else "patient"

    def find(self, model: str, other: str) -> Comparison | None:
        return next((c for c in self.comparisons if (c.model, c.other) == (model, other)), None)

    def best(self, among: Collection[str]) -> str | None:
        """The model that is better than each other one of these; None: a tie, or too few to say."""
        pairs = [c for c in self.comparisons if {c.model, c.other} <= set(among)]
        won = [c.model if c.verdict == "better" else c.other for c in pairs if c.verdict in ("better", "worse")]
        return next((name for name in among if won.count(name) == len(among) - 1 > 0), None)


@dataclass(frozen=True)
class _Set:
    """One set of images, and its resamples."""

    classes: Sequence[str]
    held: NDArray[np.bool_]  # (C, N): which images are of a class
    cluster: Integers  # (N,): its patient's number
    times: Counts  # (1 + B, P): how often each patient counts; row 0 is the set itself
    person: Integers  # the patients that `auc_patients` counts
    label_of: Integers  # and the class of each


def describe(
    classes: Sequence[str],
    labels: Integers,
    ids: Sequence[str],
    patients: Sequence[str | None],
    probabilities: Mapping[str, Floats],
    rng: Generator,
    thresholds: Mapping[str, float] = {},
    log_odds: Mapping[str, Floats] = {},
) -> Statistics:
    """All statistics of one set of images, labels (N,), by several models, each (N,) or (N, C); AUC and AUPRC rank by
    log-odds of the same shape, where they are known.

    `ids`: each image's sha256; `patients`: each image's, None where unknown. The same `rng` gives the same bytes.
    """
    cluster, known = _clusters(ids, patients), any(p is not None for p in patients)
    held = labels == np.arange(len(classes))[:, None]
    patients_of = {name: len(np.unique(cluster[mask])) for name, mask in zip(classes, held, strict=True)}
    several = len(classes) > 2 and np.count_nonzero(held.any(axis=1)) > 1  # the mean is over the classes that there are
    lacking = [f"{n} of {name}" for name, n in patients_of.items() if n < PATIENTS_MIN and (n or not several)]
    unit = "patients" if known else "images"
    times = _draws(cluster.max(initial=-1) + 1, 0 if lacking else RESAMPLES, rng)
    person, label_of, mixed = _by_patient(cluster, labels, len(classes))
    whole = _Set(classes, held, cluster, times, person, label_of)
    found = {
        name: _of_model(whole, chances, log_odds.get(name, chances), thresholds.get(name))
        for name, chances in probabilities.items()
    }
    return Statistics(
        images=len(labels),
        patients=times.shape[1] if known else None,
        without_patient=sum(p is None for p in patients) if known else 0,
        images_of={name: int(n) for name, n in zip(classes, held.sum(axis=1), strict=True)},
        patients_of=patients_of,
        too_few=f"{unit}: {', '.join(lacking)}; at least {PATIENTS_MIN} of each class are needed" if lacking else "",
        mixed=mixed,
        models={name: model for name, (model, _) in found.items()},
        comparisons=tuple(_compare(a, b, found[a][1] - found[b][1]) for a, b in combinations(found, 2)),
    )


def _of_model(whole: _Set, chances: Floats, ranks: Floats, threshold: float | None) -> tuple[OfModel, Floats]:
    """And its AUC on the set and each resample, (1 + B,)."""
    classes, held, cluster, times, person = whole.classes, whole.held, whole.cluster, whole.times, whole.person
    two = chances.ndim == 1
    score_of = {1: chances} if two else dict(enumerate(chances.T))
    rank_of = {1: ranks} if two else dict(enumerate(ranks.T))
    ranked = {c: _ranked(times, cluster, held[c], rank) for c, rank in rank_of.items()}
    over = [c for c in ranked if two or held[c].any()]
    everybody = np.arange(len(person))
    by_patient = [ranked[c][0] for c in over]
    if len(person) < len(cluster):  # some have several images, or are left out
        by_patient = [
            _ranked(times[:, person], everybody, whole.label_of == c, _mean_of(cluster, score)[person])[0]
            for c, score in score_of.items()
            if c in over
        ]
    auc = _mean_over([ranked[c][0] for c in over], times)
    errors = np.square(chances - held[1]) if two else np.square(chances - held.T).sum(axis=1)
    sensitivity = specificity = Estimate(None)
    if two and threshold is not None:
        called = chances >= threshold
        sensitivity = _estimate(_share(times, cluster, called & held[1], held[1]))
        specificity = _estimate(_share(times, cluster, ~called & held[0], held[0]))
    return (
        OfModel(
            auc=_estimate(auc),
            auprc=_estimate(_mean_over([ranked[c][1] for c in over], times)),
            brier=_estimate(_mean(times, cluster, errors)),
            sensitivity=sensitivity,
            specificity=specificity,
            auc_patients=_estimate(_mean_over(by_patient, times)),
            classes={
                classes[c]: OfClass(_estimate(auc), _estimate(precision), _portion(held[c]))
                for c, (auc, precision) in ranked.items()
            },
            calibration=_calibration(held[1], chances) if two else (),
        ),
        auc,
    )


def _mean_over(figures: Sequence[Floats], times: Counts) -> Floats:
    """Over classes, (1 + B,) each; nan where there is none."""
    return np.mean(figures, axis=0) if figures else np.full(len(times), np.nan)


def _compare(model: str, other: str, difference: Floats) -> Comparison:
    """`difference`: of the AUCs on the set and on the same resamples, (1 + B,)."""
    found = _estimate(difference, vary=False)
    if found.low is None or found.high is None:
        return Comparison(model, other, Estimate(found.value), None, "too few")
    drawn = difference[1:][np.isfinite(difference[1:])]
    tail = int(min(np.count_nonzero(drawn <= 0), np.count_nonzero(drawn >= 0)))
    verdict: Verdict = "better" if found.low > 0 else "worse" if found.high < 0 else "no difference"
    return Comparison(model, other, found, min(1.0, 2 * (1 + tail) / (1 + len(drawn))), verdict)


def _estimate(figures: Floats, *, vary: bool = True) -> Estimate:
    """Of (1 + B,): the set's own and the resamples'; resamples that lack a class have none.

    `vary`: where all resamples say the same, as of a perfect separation, resampling knows no interval.
    """
    value, drawn = figures[0], figures[1:][np.isfinite(figures[1:])]
    if not np.isfinite(value):
        return Estimate(None)
    if not len(drawn) or (vary and np.ptp(drawn) == 0):
        return Estimate(float(value))
    low, high = np.percentile(drawn, (2.5, 97.5))
    return Estimate(float(value), float(min(low, value)), float(max(high, value)))


def _draws(patients: int, resamples: int, rng: Generator) -> Counts:
    """(1 + B, P): how often each resample holds each patient; the first row is the set itself."""
    times = np.ones((1 + resamples, patients), np.int16)
    for row in times[1:]:
        row[:] = np.bincount(rng.integers(patients, size=patients), minlength=patients)
    return times


def _ranked(times: Counts, cluster: Integers, positive: NDArray[np.bool_], score: Floats) -> tuple[Floats, Floats]:
    """AUC and average precision on each resample, (1 + B,) each; nan where a class is missing. Ties count half."""
    order = np.argsort(-score, kind="stable")
    starts = np.flatnonzero(np.diff(score[order], prepend=np.nan))  # of each tie; nan differs from everything
    aucs, precisions = [np.empty(0)], [np.empty(0)]
    for rows in _chunks(len(times), len(score)):
        weight = np.take(times[rows], cluster[order], axis=1).astype(np.int64)
        both, hits = _summed(weight, starts), _summed(weight * positive[order], starts)  # (b, ties)
        false, found, called = both - hits, np.cumsum(hits, axis=1), np.cumsum(both, axis=1)
        all_, none = hits.sum(axis=1), false.sum(axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            aucs.append(np.sum(false * (2 * found - hits), axis=1) / (2 * all_ * none))
            precision = np.divide(found, called, out=np.zeros(called.shape), where=called > 0)
            precisions.append(np.where(none > 0, np.sum(hits * precision, axis=1) / all_, np.nan))
    return np.concatenate(aucs), np.concatenate(precisions)


def _share(times: Counts, cluster: Integers, part: NDArray[np.bool_], whole: NDArray[np.bool_]) -> Floats:
    """Of the images in `whole` those in `part`, on each resample: (1 + B,)."""
    with np.errstate(invalid="ignore"):
        return _total(times, cluster, part) / _total(times, cluster, whole)


def _mean(times: Counts, cluster: Integers, value: Floats) -> Floats:
    """(1 + B,)."""
    with np.errstate(invalid="ignore"):
        found: Floats = _total(times, cluster, value) / _total(times, cluster, np.ones_like(value))
        return found


def _total(times: Counts, cluster: Integers, value: NDArray[Any]) -> Floats:
    """Of a value of each image, on each resample: (1 + B,)."""
    by_patient = np.bincount(cluster, value, times.shape[1])
    return np.concatenate([times[rows] @ by_patient for rows in _chunks(*times.shape)])


def _chunks(rows: int, width: int) -> list[slice]:
    step = max(1, CELLS_MAX // max(1, width))
    return [slice(start, start + step) for start in range(0, rows, step)]


def _summed(values: Integers, starts: Integers) -> Integers:
    if not len(starts):
        return np.zeros((len(values), 1), np.int64)
    return np.add.reduceat(values, starts, axis=1)


def _clusters(ids: Sequence[str], patients: Sequence[str | None]) -> Integers:
    """(N,): a number for each patient, and for each image without one."""
    keys = [(patient is None, patient or image) for image, patient in zip(ids, patients, strict=True)]
    numbers = {key: n for n, key in enumerate(dict.fromkeys(keys))}
    return np.array([numbers[key] for key in keys], np.int64)


def _by_patient(cluster: Integers, labels: Integers, classes: int) -> tuple[Integers, Integers, int]:
    """The patients that count, the class of each, and how many have several. Two classes: ill with one ill image."""
    size = cluster.max(initial=-1) + 1
    low, high = np.full(size, classes), np.full(size, -1)
    np.minimum.at(low, cluster, labels)
    np.maximum.at(high, cluster, labels)
    several = low != high
    person = np.arange(size) if classes == 2 else np.flatnonzero(~several)
    return person, high[person], int(several.sum())


def _portion(mask: NDArray[np.bool_]) -> float:
    return float(mask.mean()) if len(mask) else 0.0


def _mean_of(cluster: Integers, score: Floats) -> Floats:
    found: Floats = np.bincount(cluster, score) / np.bincount(cluster) if len(score) else np.empty(0)
    return found


def _calibration(positive: NDArray[np.bool_], score: Floats) -> tuple[tuple[float, float, int], ...]:
    """Bins of as many images each, by rising probability; none where a bin would hold fewer than ten."""
    bins = min(BINS, len(score) // 10)
    order = np.argsort(score, kind="stable")
    parts = np.array_split(order, bins) if bins > 1 else []
    return tuple((float(score[p].mean(dtype=np.float64)), float(positive[p].mean()), len(p)) for p in parts)
