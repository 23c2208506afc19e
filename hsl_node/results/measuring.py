"""Score models on the images of a site, and say what was scored: the long part of an evaluation. Opens torch."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from hsl_node.errors import UsageError
from hsl_node.federation.names import Digest, Round
from hsl_node.host.layout import Layout
from hsl_node.results.opening import open_kept
from hsl_node.results.scores import TEST_PARTS, Scores, as_kept, digest_of, joined
from hsl_node.sync.store import models as kept
from hsl_node.sync.store.journal import Journal
from hsl_node.train import alone as alone_training
from hsl_node.train import scoring
from hsl_node.train.data.dataset import Dataset
from hsl_node.train.data.sources import SPLIT_NAMES, TEST, VALIDATION
from hsl_node.train.lock import hold_lock
from hsl_node.train.method import Site
from hsl_node.train.progress import Report, ticker
from hsl_node.train.scoring import Pairing
from hsl_node.train.site import open_site
from hsl_node.train.tasks.metrics import measure


@dataclass(frozen=True)
class Scored:
    """A model to score."""

    kind: str  # a key of MODELS in words.py
    sha256: Digest
    network: nn.Module
    round: Round | None = None  # None: of none
    pairing: Pairing = "fixed"


def measured(
    layout: Layout,
    record: dict[str, Any],
    scores: Scores | None,
    wanted: set[str],
    main: kept.Model,
    fused: kept.Model | None,
    rounds: int,
    report: Report,
    *,
    external: Dataset | None = None,
) -> tuple[dict[str, Any], Scores]:
    """The record, and the scores beside it, with the wanted models scored on the test set, or an external one.
    `main`: the model that this is about, under its kind; `fused`: the one that it is compared with, as it was fused;
    `rounds`: that the run has had, for as many of which the model alone is trained."""
    site = open_site(layout.state, ticker(report, "decoding images"))
    last = TEST_PARTS[external is not None]
    sites = {"validation": (site, VALIDATION), last: (replace(site, dataset=external) if external else site, TEST)}
    found: Scores = {part: _images(*where) for part, where in sites.items()}
    _require_same_images(record, scores, found)
    for model in _models(layout, site, wanted, main, fused, rounds, report):
        for part, (of, split) in sites.items():
            said = scoring.answers(of, model.network, split, pairing=model.pairing, tick=ticker(report, "scoring"))
            chances, ranks = scoring.as_probabilities(said), scoring.as_log_odds(said)
            found[part]["probabilities"][model.kind] = as_kept(chances)
            found[part]["log_odds"][model.kind] = as_kept(ranks)
            figures = measure(of.dataset.labels[of.indices(split)], chances, ranks)
            if part == "validation":
                record["auc_validation"][model.kind] = figures.auc
            else:
                record["test"][model.kind] = asdict(figures)
        record["weights"][model.kind] = model.sha256
        if model.round is not None:
            record["rounds"][model.kind] = model.round
    data = site.dataset
    splits = {**{name: (site, split) for split, name in enumerate(SPLIT_NAMES)}, "test": sites[last]}
    facts = {
        "at": time.time(),
        "images": {name: len(of.indices(split)) for name, (of, split) in splits.items()},
        "patients": {name: _patients(*where) for name, where in splits.items()},
        "without_patient": sum(p is None for p in data.patients or data.ids),
        "by_study": data.summary.named["study"] if data.summary else 0,
        "classes": list(site.plan.classes),
        "machine": {**site.hardware.facts, "processor": site.hardware.processor},
        "split_sha256": digest_of([f"{i} {split}" for i, split in zip(data.ids, data.split.tolist(), strict=True)]),
        "test_set": digest_of(found[last]["ids"]),
    }
    return {**record, **facts}, joined(scores, found)


def _images(site: Site, split: int) -> dict[str, Any]:
    where, data = site.indices(split).tolist(), site.dataset
    patients = data.patients or (None,) * len(data.ids)
    return {
        "ids": [data.ids[n] for n in where],
        "patients": [patients[n] for n in where],
        "labels": [int(data.labels[n]) for n in where],
        "probabilities": {},
        "log_odds": {},
    }


def _patients(site: Site, split: int) -> int:
    """Known ones."""
    return len({p for p in _images(site, split)["patients"] if p is not None})


def _require_same_images(record: Mapping[str, Any], scores: Scores | None, found: Scores) -> None:
    """What is added to a record is compared with what is there. Raises: UsageError."""
    if not record["test"]:
        return
    there = len(scores["test"]["ids"]) if scores else record["images"]["test"]
    same = scores["test"]["ids"] == found["test"]["ids"] if scores else there == len(found["test"]["ids"])
    if not same:
        raise UsageError(
            f"the test set is another one than when the other models were measured ({there} images then, "
            f"{len(found['test']['ids'])} now): their figures cannot be compared",
            remedy="with --again all are measured on the images that are there now, and that is counted",
        )


def _models(
    layout: Layout,
    site: Site,
    wanted: set[str],
    main: kept.Model,
    fused: kept.Model | None,
    rounds: int,
    report: Report,
) -> Iterator[Scored]:
    """One after the other, each opened when it is its turn."""
    those = {main.kind: main, **({"fused": fused} if fused and main.kind != "fused" else {})}
    for kind, model in those.items():
        names: dict[str, Pairing] = {kind: "fixed", **({"fused_random": "random"} if kind == "fused" else {})}
        if wanted & names.keys():
            network = open_kept(site, layout.state, model, report)
            for name in [name for name in names if name in wanted]:
                yield Scored(name, model.sha256, network, model.round, names[name])
    last = _last_own(layout)
    if "local" in wanted and last is not None and (last.kind, last.round) != (main.kind, main.round):
        yield Scored("local", last.sha256, open_kept(site, layout.state, last, report), last.round)
    if "alone" in wanted:
        with hold_lock(layout.alone):
            trained = alone_training.train_alone(site, layout.state, rounds=rounds, report=report)
        _, network = scoring.open_model(layout.trainer / alone_training.WEIGHTS_FILE, site.plan, site.hardware)
        yield Scored("alone", Digest(trained.sha256), network)


def _last_own(layout: Layout) -> kept.Model | None:
    """What this site sent last, as far as its file is there."""
    with Journal.read_only(layout.journal) as journal:
        found = [(round, sha256) for round, sha256 in journal.own_digests().items() if layout.own(round).exists()]
    return kept.Model("own", *max(found), "what this node sent last") if found else None
