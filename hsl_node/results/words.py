"""An evaluation in words: the terminal's table, and the sentences that the report says as well."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from hsl_node.host.units import figure, table
from hsl_node.results.statistics import RESAMPLES, Comparison, Estimate, Statistics
from hsl_node.sync.store.models import WORDS

MODELS = {  # in the order of tables; how people read them
    "alone": "trained alone",
    "local": "own model, last round",
    "own": "own model, best round",
    "fused": "fused",
    "recalibrated": "fused, recalibrated",
    "fused_random": "fused, random anchor pairing",
}
COMPARED = ("recalibrated", "fused", "own", "alone", "local")  # of which one may be the best
HOSPITALS = {  # model, in sentences: its `kind`
    "own": "its own model after fusions",
    "fused": "the fused model",
    "recalibrated": "the recalibrated fused model",
}
FIGURES = ("accuracy", "sensitivity", "specificity", "precision", "f1")  # in the order of tables
PLAIN = {"f1": "F1"}
SURE = {
    "auc": "AUC",
    "auc_patients": "AUC by patient",
    "auprc": "AUPRC",
    "brier": "Brier score",
    "sensitivity": "sensitivity*",
    "specificity": "specificity*",
}


def signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def estimate(found: Estimate) -> str:
    """`0.941 (0.902 to 0.973)`."""
    if found.low is None or found.high is None:
        return figure(found.value, "undefined")
    return f"{found.value:.3f} ({found.low:.3f} to {found.high:.3f})"


def by_whom(found: Statistics) -> str:
    """What the intervals are over, or why there are none."""
    if found.too_few:
        return f"Too few to say how sure the figures are ({found.too_few})."
    if found.patients is None:
        over = f"{found.images} images, by image: no patient is known, so they are too narrow where one has several"
    else:
        few = found.without_patient
        over = f"{found.patients} patients" + (f", of whom {few} are images without one" if few else "")
    said = f"95 % intervals: bootstrap ({RESAMPLES} resamples) over {over}."
    if found.mixed and len(found.images_of) > 2:
        said += f" With images of several classes, so not in the AUC by patient: {found.mixed}."
    return said


def comparison(found: Comparison, statistics: Statistics) -> str:
    """`AUC +0.010 (95 % interval −0.012 to +0.034, p = 0.41)`, or why there is none."""
    difference = found.difference
    if difference.value is None:
        return "undefined: the images are of one class only"
    if difference.low is None or difference.high is None:
        return f"too few to say ({statistics.too_few})"
    p = "p < 0.01" if found.p is not None and found.p < 0.01 else f"p = {found.p:.2f}"
    span = f"{signed(difference.low)} to {signed(difference.high)}"
    return f"AUC {signed(difference.value)} (95 % interval {span}, {p})"


def judgements(where: str, found: Statistics, kind: str) -> list[str]:
    """Whether fusing helped, one sentence for each model that the hospital's, of this kind, is compared with."""
    lines = list[str]()
    for other in ("alone", "local", "fused"):
        pair = found.find(kind, other) if other != kind else None
        if pair is None:
            continue
        than = {
            "alone": "the one trained alone",
            "local": "its own of the last round",
            "fused": "the best one as it was fused",
        }[other]
        says = {
            "better": f"{HOSPITALS[kind]} is better than {than}",
            "worse": f"{HOSPITALS[kind]} is not better but worse than {than}",
            "no difference": f"{HOSPITALS[kind]} is not shown to be better than {than}",
            "too few": f"whether {HOSPITALS[kind]} is better than {than} cannot be said",
        }[pair.verdict]
        lines.append(f"{where} {says}: {comparison(pair, found)}.")
    return lines


def uses(record: Mapping[str, Any]) -> list[str]:
    """How often the test set was looked at, where it was more than once."""
    times = record["evaluated"] + sum(use["times"] for use in record.get("used_before", ()))
    if times < 2 or "external" in record:
        return []
    return [
        f"The test set has been used {times} times: the figures lean towards it.",
        *(_use(use) for use in record.get("used_before", ())),
    ]


def _use(use: Mapping[str, Any]) -> str:
    what = f"{use['images']} of these images"
    run = "in an earlier run" if use["earlier_run"] else "in this run"
    many = f", {use['times']} times" if use["times"] > 1 else ""
    return f"Before: {what}, {run}, with {model_of(use)}, last on {day(use['at'])}{many}."


def model_of(record: Mapping[str, Any]) -> str:
    """`the fused model of round 5, recalibrated`."""
    return WORDS[record["kind"]].format(record["round"])


def without_images(record: Mapping[str, Any]) -> str:
    """Which classes the test set lacks, and what becomes of the figures; "": none."""
    classes, confusion = record["classes"], record["test"][record["kind"]]["confusion"]
    lacking = [name for name, row in zip(classes, confusion, strict=True) if sum(row) == 0]
    none, left = f"the test set holds no image of class {', '.join(lacking)}", len(classes) - len(lacking)
    if not lacking:
        return ""
    return f"averages over {left} of {len(classes)} classes: {none}" if left > 1 else f"undefined: {none}"


def counted(record: Mapping[str, Any]) -> str:
    """`163 test images of 81 patients (train 326 of 163, validation 54 of 27)`; patients where they are known."""
    images, patients = record["images"], record.get("patients", {})

    def of(split: str, word: str) -> str:
        many = patients.get(split)
        return f"{images[split]}{word}" + (f" of {many}{' patients' if word else ''}" if many else "")

    kind = " external images" if "external" in record else " test images"
    return f"{of('test', kind)} (train {of('train', '')}, validation {of('validation', '')})"


def left_out(images: int) -> str:
    return f"Left out: {images} images of this site's own, or of patients that it trained or validated on."


def split_by(record: Mapping[str, Any]) -> str:
    """By patient, study or image; "": the images measured were never split."""
    if "external" in record:
        return ""
    unknown, images, by_study = record["without_patient"], sum(record["images"].values()), record["by_study"]
    if unknown == images:
        return "split by image: no patient is known, so images of one patient may be on both sides"
    said = ["split by patient"] if by_study + unknown < images else []
    if by_study:
        said.append(
            f"{by_study} images without a known patient by their DICOM study, so two studies of one patient may be on"
            " both sides and count as two patients"
        )
    return "; ".join(said + [f"{unknown} images without a known one each by itself"] * bool(unknown))


def day(at: float) -> str:
    return time.strftime("%Y-%m-%d", time.localtime(at))


def evaluation_text(record: Mapping[str, Any], statistics: Statistics, *, asked: float | None = None) -> str:
    """The record as a table for the terminal. What was measured before `asked` (wall clock) is said to be stored."""
    kinds = [k for k in MODELS if k in record["test"]]
    header = ("external set" if "external" in record else "test set", *(MODELS[k] for k in kinds))
    missing, split = without_images(record), split_by(record)
    lines = [
        f"{counted(record)}; {model_of(record)}, sha256 {record['weights'][record['kind']][:12]}",
        *([f"this hospital's model: {record['why']}"] if record["why"] else []),
        *([split] if split else []),
        "",
        table(header, _rows(record, kinds, statistics), right=range(1, len(header))),
    ]
    if missing:
        lines += ["", missing]
    lines += ["", by_whom(statistics), *threshold_lines(record, kinds)]
    lines += ["", *judgements("At this hospital", statistics, record["kind"])]
    if left := record.get("external", {}).get("left_out"):
        lines += ["", left_out(left)]
    if asked is not None and record["at"] < asked:
        at = time.strftime("%Y-%m-%d %H:%M", time.localtime(record["at"]))
        lines += ["", f"The stored result of {at}: the test set is used once. --again measures anew, and counts."]
    if used := uses(record):
        lines += ["", *used]
    if not record["final"]:
        lines += ["", "Measured before the run was over."]
    return "\n".join(lines)


def _rows(record: Mapping[str, Any], kinds: Sequence[str], statistics: Statistics) -> list[tuple[str, ...]]:
    """With their intervals first; then at 0.5, or by the most likely class."""
    models = statistics.models
    rows = []
    for name, word in shown(statistics).items():
        cells = (estimate(getattr(models[k], name)) if k in models else "" for k in kinds)
        rows.append((word, *cells))
    if len(record["classes"]) > 2:
        for c in record["classes"]:
            cells = (estimate(models[k].classes[c].auc) if k in models else "" for k in kinds)
            rows.append((f"AUC of {c}", *cells))
    at = " at 0.5" if len(record["classes"]) == 2 else ""
    rows += [(PLAIN.get(f, f) + at, *(figure(record["test"][k][f], "undefined") for k in kinds)) for f in FIGURES]
    return rows


def shown(statistics: Statistics) -> dict[str, str]:
    """Of SURE what this set has: figures by patient where some have several images, at a threshold for two classes."""
    several = statistics.patients is not None and statistics.patients < statistics.images
    limited = any(model.sensitivity.value is not None for model in statistics.models.values())
    absent = {*["auc_patients"] * (not several), *["sensitivity", "specificity"] * (not limited)}
    return {name: word for name, word in SURE.items() if name not in absent}


def threshold_lines(record: Mapping[str, Any], kinds: Sequence[str]) -> list[str]:
    limits = record.get("thresholds", {})
    return [f"* {MODELS[k]}: from {limits[k]['value']:.3f} on; {limits[k]['rule']}" for k in kinds if k in limits]
