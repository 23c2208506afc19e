"""What each model said of each image: kept beside an evaluation, read by statistics, written as CSV for who asks.

The journal holds them as "scores of evaluation": of "validation" and "test" (or "external") the images' sha256, their
patients' pseudonyms (null: unknown), labels, and per model the probability of class 1, or of each class, and its
log-odds, which AUC ranks: probabilities near 0 and 1 become equal by rounding. No path or name: those come from the
source again when the CSV is written, which is a private file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hsl_node.host.files import write_new
from hsl_node.host.units import as_csv
from hsl_node.results.statistics import Statistics, describe

Scores = dict[str, dict[str, Any]]  # part -> "ids", "patients", "labels", "probabilities", "log_odds"

SAID = ("probabilities", "log_odds")  # of each model
TEST_PARTS = ("test", "external")
SEED = 1  # of the resamples: the same scores give the same intervals
WORDS = {"local": "own, last round"}  # how a model is called in the CSV, where its key is not plain
ORDER = ("recalibrated", "own", "fused", "local", "alone", "fused_random")  # a difference is the first less the second


def as_kept(values: NDArray[np.floating[Any]]) -> list[Any]:
    """Nine digits, which give the same float32 again."""
    rounded = [float(f"{value:.9g}") for value in values.ravel().tolist()]
    return rounded if values.ndim == 1 else np.reshape(rounded, values.shape).tolist()


def arrays_of(part: Mapping[str, Any]) -> tuple[NDArray[np.int64], dict[str, NDArray[np.float32]]]:
    """Labels (N,), and per model probabilities (N,) or (N, C)."""
    found = {kind: np.array(values, np.float32) for kind, values in part["probabilities"].items()}
    return np.array(part["labels"], np.int64), found


def log_odds_of(part: Mapping[str, Any]) -> dict[str, NDArray[np.float64]]:
    """Per model (N,) or (N, C)."""
    return {kind: np.array(values, np.float64) for kind, values in part["log_odds"].items()}


def digest_of(ids: Sequence[str]) -> str:
    """Of a set of images, in whatever order."""
    return hashlib.sha256("\n".join(sorted(ids)).encode("ascii")).hexdigest()


def statistics_of(record: Mapping[str, Any], scores: Scores) -> Statistics:
    part = next(scores[name] for name in TEST_PARTS if name in scores)
    labels, found = arrays_of(part)
    ordered = {str(kind): found[kind] for kind in ORDER if kind in found}
    limits = {kind: limit["value"] for kind, limit in record.get("thresholds", {}).items()}
    rng = np.random.default_rng(SEED)
    return describe(record["classes"], labels, part["ids"], part["patients"], ordered, rng, limits, log_odds_of(part))


def joined(there: Scores | None, found: Scores) -> Scores:
    """The scores of both, where they are of the same images; else the later ones."""
    if there is None:
        return found
    return {
        part: {**found[part], **{said: {**there[part][said], **found[part][said]} for said in SAID}}
        if there.get(part, {}).get("ids") == found[part]["ids"]
        else found[part]
        for part in found
    }


# ------------------------------------------------------------------ as CSV


def write_scores(path: Path, record: Mapping[str, Any], scores: Scores, names: Mapping[str, tuple[str, str]]) -> None:
    """One row for each image and model. `names`: sha256 -> the site's own (name of the image, patient), where the
    source still has it; else the patient stands as its pseudonym.
    """
    classes = record["classes"]
    figures = (*(f"p_{name}" for name in classes), *(f"log_odds_{name}" for name in classes))
    head = ("image", "sha256", "patient", "split", "label", "model", "model_sha256", *figures)
    rows: list[tuple[str, ...]] = [head]
    called: dict[str, str] = {}  # one word for each patient, however often it is spelt otherwise or missing
    for part in scores.values():
        for sha256, patient in zip(part["ids"], part["patients"], strict=True):
            if patient and (word := names.get(sha256, ("", ""))[1]):
                called.setdefault(patient, word)
    for split, part in scores.items():
        labels, found = arrays_of(part)
        ranked = log_odds_of(part)
        for kind, values in found.items():
            chances = np.stack([1 - values, values], axis=1) if values.ndim == 1 else values
            odds = np.stack([-ranked[kind], ranked[kind]], axis=1) if values.ndim == 1 else ranked[kind]
            for n, sha256 in enumerate(part["ids"]):
                name, patient = names.get(sha256, ("", ""))[0], part["patients"][n] or ""
                patient = called.get(patient, patient[:16])
                said = (f"{chance:.9g}" for chance in (*chances[n].tolist(), *odds[n].tolist()))
                label = classes[labels[n]]
                cells = (name, sha256, patient, split, label, WORDS.get(kind, kind), record["weights"][kind])
                rows.append((*cells, *said))
    write_new(path, as_csv(rows), mode=0o600, replace=True)  # names of images are names of patients, often
