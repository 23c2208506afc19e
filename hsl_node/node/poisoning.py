"""Signs that a checkpoint is poisoned: recorded in the journal, and alarms made of that record. They stop nothing.

Three signs: a peer's update is unlike the others' (`weights/influence.py`); the fused model is worth less at this site
than its own model and than the fused model before; and, where peers count by their images or by numbers that a method
has them say, one counts most or suddenly otherwise. A person decides: each can be an unusual hospital, and none sees
all poison.

`fuse_watched` is the fusion that a round makes (`Fusing.fuse`): the updates are measured in the pass that fuses.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from hsl_node.federation.fusion_rules import FUSION_RULES
from hsl_node.federation.names import Digest, Peer, Round
from hsl_node.node.alarms import Alarms
from hsl_node.sync.store.journal import Journal
from hsl_node.weights.checkpoint_file import Array, Schema, TensorSpec, read_chunk
from hsl_node.weights.combinations import COMBINATIONS, FullSet
from hsl_node.weights.fuse_files import fuse_files
from hsl_node.weights.influence import (
    CHANGE_LIMIT,
    ROUNDS_BACK,
    Figures,
    Influence,
    changed_counts,
    changed_numbers,
    largest_share,
    largest_weight,
    unusual,
)
from hsl_node.weights.whole import state_of

log = logging.getLogger(__name__)

ROUNDS_LOUD = 5  # an alarm stays for so many rounds after its cause, so that nobody misses it over a weekend
# Standard errors of the difference between two AUCs. Honest federations of phantoms came to 0.7 in 129 validations.
FALL_ERRORS = 2.0
ANSWER = (
    "nothing was stopped or changed: ask {who} to check data and labels; `hsl-node round show {round}` has numbers; "
    'a new plan with fusion = "median" softens such checkpoints'
)
ANSWER_IMAGES = (
    "nothing was stopped or changed: if the number is true, nothing is to do; else ask {who}, or agree on a new plan "
    'with fusion = "mean"; `hsl-node round show {round}` has all numbers'
)
ANSWER_SAID = (
    "nothing was stopped or changed: ask {who}; the numbers follow from the epoch that was best there, so they change, "
    'but seldom so much. A new plan with fusion = "mean" or "median" counts by none; `hsl-node round show {round}` has '
    "all of them"
)

SIGNS = {  # of a peer: alarm -> its key in a round's record, and what to do
    "influence": ("unusual", ANSWER),
    "images": ("images", ANSWER_IMAGES),
    "said": ("said", ANSWER_SAID),
    "share": ("share", ANSWER_IMAGES),
}


def fuse_watched(
    rule: str,
    paths: Mapping[Peer, Path],
    samples: Mapping[Peer, int],
    schema: Schema,
    base: Path,
    out: Path,
    progress: Callable[[float], None] | None = None,
    expected: Mapping[Peer, str] | None = None,
    base_sha256: str | None = None,
    *,
    said: Mapping[Peer, Mapping[str, float]] | None = None,
    clip: float = 0.0,
) -> tuple[Digest, dict[Peer, Figures]]:
    """The fusion of a round: `fuse_files`, and what each peer's update is like.

    No figures where `base`, the round's beginning, is gone or not what it was: most rules fuse nothing of it, but an
    update measured from it would look like poison.

    Raises:
        Altered: see `fuse_files`.
    """
    fuse = partial(fuse_files, said=said, base=base, base_sha256=base_sha256, clip=clip)
    if state_of(base, base_sha256, schema.file_bytes) != "whole":
        log.warning("no figures of the updates: the fused model before is gone from this disk, or altered")
        return fuse(rule, paths, samples, schema, out, progress, None, expected), {}
    influence = Influence(sorted(paths))
    with open(base, "rb") as file:

        def see(spec: TensorSpec, start: int, chunks: Sequence[Array]) -> None:
            before = read_chunk(file, spec, start, len(chunks[0]))
            influence.see(spec.name, before, chunks)

        digest = fuse(rule, paths, samples, schema, out, progress, see, expected)
    return digest, influence.figures()


def weights_of(rule: str, samples: Mapping[Peer, int], said: Mapping[Peer, Mapping[str, float]]) -> dict[Peer, float]:
    """What each peer counts in the fusion by the numbers that it says; empty: by none, or by the updates as well."""
    combination, peers = COMBINATIONS.get(rule), sorted(samples)
    if combination is None or combination.products or not FUSION_RULES[rule].said:
        return {}
    full = FullSet([samples[p] for p in peers], [said[p] for p in peers])
    return dict(zip(peers, combination.coefficients(full), strict=True))


# ------------------------------------------------------------------ what was found, in the journal


def record_fusion(
    journal: Journal,
    round: Round,
    figures: Mapping[Peer, Figures],
    images: Mapping[Peer, int] = {},
    said: Mapping[Peer, Mapping[str, float]] = {},
    weights: Mapping[Peer, float] = {},
    epochs: int = 1,
) -> None:
    """Within the transaction that records the fusion.

    `images` of each peer, where the rule counts by them; `said`, where it counts by these numbers, which follow from
    the epoch that was best, of so many `epochs`; `weights` of each in the fusion, where they follow from both alone.
    """
    before = [record for r in range(max(1, round - ROUNDS_BACK), round) if (record := journal.influence(r))]
    found = unusual(figures, [{Peer(p): Figures(**f) for p, f in b["peers"].items()} for b in before])
    known = {p: row["content"]["samples"] for p in images if round > 1 and (row := journal.manifest(round - 1, p))}
    last = {p: row["content"]["said"] for p in said if round > 1 and (row := journal.manifest(round - 1, p))}
    changed, numbers = changed_counts(images, known, round), changed_numbers(said, last, round, CHANGE_LIMIT * epochs)
    share = largest_weight(weights, said) if weights else largest_share(images)
    peers = {p: asdict(f) for p, f in figures.items()}
    record = {"peers": peers, "unusual": found, "images": changed, "said": numbers, "share": share}
    journal.record_influence(round, record)
    told = before[-1].get("share", {}) if before else {}  # it may be true, and then for the whole run
    new = {p: text for p, text in share.items() if text != told.get(p)}
    for code, texts in (("influence", found), ("images", changed), ("said", numbers), ("share", new)):
        for peer, text in texts.items():
            _say(journal, code, f"round {round}, {peer}: {text}", round)


def record_validation(journal: Journal, me: Peer, event: Mapping[str, Any]) -> None:
    """Within the transaction that records what a fused model is worth here (event `validated`); may be repeated.

    Of a fused model the better of its two scores counts, as fused and recalibrated: statistics that are no hospital's
    are no poison. Only of scores that are AUCs is it known how far chance moves them.
    """
    round = Round(event["round"])
    mine, again = journal.manifest(round, me), event.get("recalibrated") or {}
    before = next(iter(journal.rows("fused", Round(round - 1))), {})
    fused = _better(event["score"], again.get("score"))
    last = _better(before.get("score"), before.get("recalibrated_score"))
    own, labels = mine["content"]["score"] if mine else None, event.get("labels")
    if round < 1 or journal.result(_gate(round)) or not labels or fused is None or own is None or last is None:
        return
    if not all(0 <= score <= 1 for score in (fused, own, last)) or not fell(fused, own, last, labels):
        return
    error = standard_error(fused, labels)
    text = (
        f"the fused model has validation AUC {fused:.3f} here (standard error {error:.3f}), this site's own model "
        f"{own:.3f}, the fused model before {last:.3f}"
    )
    record = journal.influence(round)
    cosines = {p: f["cosine"] for p, f in record["peers"].items() if f["cosine"] is not None} if record else {}
    if cosines:
        least = min(cosines, key=lambda p: cosines[p])
        text += f"; the update least like the others' is that of {least}, cosine {cosines[least]:.2f}"
    journal.record_result(_gate(round), {"text": text})
    _say(journal, "validation", f"round {round}: {text}", round)


def _better(*scores: float | None) -> float | None:
    return max((score for score in scores if score is not None), default=None)


def renew(journal: Journal, alarms: Alarms, me: Peer, peers: Sequence[Peer]) -> None:
    """Alarms as the journal's last rounds say, newest last; so a restart forgets none, and none is new by it."""
    fused = {r["round"]: r["at"] for r in journal.rows("fused")}
    last = max(fused, default=0)
    loud: dict[str, tuple[str, str]] = {}
    since: dict[str, float | None] = {}
    for round in range(max(1, last - ROUNDS_LOUD + 1), last + 1):
        record = journal.influence(round)
        for code, (key, answer) in SIGNS.items():
            for peer, text in record.get(key, {}).items() if record else ():
                who, whose = ("your own site", "this node") if peer == me else (peer, peer)
                loud[f"{code} {peer}"] = (f"round {round}, {whose}: {text}", answer.format(who=who, round=round))
                since[f"{code} {peer}"] = fused.get(round)
        if gate := journal.result(_gate(round)):
            who = "every hospital, and your own,"
            loud["validation"] = (f"round {round}: {gate['text']}", ANSWER.format(who=who, round=round))
            since["validation"] = fused.get(round)
    for code in [f"{code} {p}" for code in SIGNS for p in peers] + ["validation"]:
        alarms.sound_or_settle(code, loud.get(code), since.get(code))


def named_in(journal: Journal, round: Round) -> str:
    """Whose update was unlike the others' in this fusion, and how; empty: nobody's."""
    record = journal.influence(round)
    return "; ".join(f"{peer}: {text}" for peer, text in record["unusual"].items()) if record else ""


# ------------------------------------------------------------------ the validation gate


def fell(fused: float, own: float, last: float, labels: Sequence[int]) -> bool:
    """Is the fused model's AUC below both others by more than chance makes it?

    Both, because a hospital unlike the others may have a fused model below its own all along, and because the fused
    model of an early round may be worth little everywhere. `labels`: validation images of each class. The three AUCs
    are of the same images, so their differences are surer than is assumed here: small sets alarm late, not falsely.
    """
    se = standard_error(fused, labels)
    return all(x - fused > FALL_ERRORS * math.hypot(se, standard_error(x, labels)) for x in (own, last))


def standard_error(auc: float, labels: Sequence[int]) -> float:
    """Of an AUC (Hanley and McNeil, Radiology 143, 1982). More than two classes: the mean over the classes against the
    rest that have images, which an average of AUCs can't exceed. Infinite where one class alone has images."""
    total = sum(labels)
    if max(labels) == total:
        return math.inf
    q1, q2 = auc / (2 - auc), 2 * auc * auc / (1 + auc)
    errors = [
        math.sqrt(max(0.0, auc * (1 - auc) + (n - 1) * (q1 - auc * auc) + (total - n - 1) * (q2 - auc * auc)))
        / math.sqrt(n * (total - n))
        for n in (labels[1:] if len(labels) == 2 else filter(None, labels))
    ]
    return sum(errors) / len(errors)


def _gate(round: Round) -> str:
    return f"validation {round}"


def _say(journal: Journal, code: str, text: str, round: Round) -> None:
    journal.note("warning", code, text)
    log.warning("unusual checkpoint", extra={"code": code, "round": round, "text": text})
