"""MetaFed (parallel ring): every hospital learns from the one before it in the ring of sorted names (Chen et al. 2023).

Adapted: published, one model goes round the ring, in as many turns a round as there are hospitals; here all take the
predecessor's checkpoint of the last round at once, so what one knows goes one place further each round. A hospital is
able, and stays so, once its validation score (published: accuracy) is above `threshold`: it keeps its own weights and
imitates the predecessor's features. One that is not trains on from the predecessor's weights. In the last planned
round all imitate the ring's last one, the more the better its model is here; a run that ends earlier has no such round.
Exact: both losses, that weight, counters that are kept, the frozen teacher. Nobody uses the fused model.

METAFED_RING is the published ring, in the simulation: a hospital sees what those before it have just sent. Adapted: by
scores too, and round 1 stands for the 30 epochs alone. Where a score is undefined (one class) nobody becomes able.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.nn.functional as F

from hsl_node.train.method import Done, Learner, Start, Step, Terms, fused_model, norm_tensors, put, take_fused
from hsl_node.train.methods.fedavg import FEDAVG
from hsl_node.train.networks.classifier import Classifier
from hsl_node.train.scoring import validate
from hsl_node.train.updates import descend


@dataclass(frozen=True)
class Teacher:
    model: Classifier
    weight: float


def teacher_of(start: Start, me: str, last: bool) -> str:
    ring = sorted(start.full_set)
    return ring[-1] if last else ring[ring.index(me) - 1]


def weight_of(own: float, theirs: float, strength: float, hopeless: float) -> float:
    """How much a model is imitated in the last round, by the scores of the own one and of that."""
    return 0.0 if theirs <= own and theirs < hopeless else strength * 10 ** min(1.0, 5 * (theirs - own)) / 10


def own_or_theirs(learner: Learner, start: Start) -> None:
    if start.round == 1:
        return take_fused(learner, start)
    put(learner.model, start.full_set[learner.me])
    if not start.said[learner.me]["able"] and start.round < learner.plan.rounds:
        theirs = start.full_set[teacher_of(start, learner.me, last=False)]
        kept = frozenset() if learner.settings["share_norms"] else norm_tensors(learner.model)
        put(learner.model, {n: t for n, t in theirs.items() if t.is_floating_point() and n not in kept})


def teacher(learner: Learner, start: Start) -> Teacher | None:
    last, weight = start.round == learner.plan.rounds, learner.settings["strength"]
    if not start.full_set or not (last or start.said[learner.me]["able"]):
        return None
    model = fused_model(learner, replace(start, fused=start.full_set[teacher_of(start, learner.me, last)]))
    if last:
        own, theirs = (validate(learner.site, m).score or 0.0 for m in (learner.model, model))
        weight = weight_of(own, theirs, weight, learner.settings["hopeless"])
    return Teacher(cast(Classifier, model), weight)


def distilled(step: Step) -> Terms:
    model = cast(Classifier, step.model)
    feature = model.trunk(step.batch.image)  # (B, F)
    terms = {"primary": step.task.loss(model.out(feature), step.batch.target)}
    if step.beside is not None:
        with torch.no_grad():
            theirs = step.beside.model.trunk(step.batch.image)
        terms["imitation"] = step.beside.weight * F.mse_loss(feature, theirs)
    return terms


def says_able(learner: Learner, start: Start, done: Done) -> Mapping[str, float]:
    before = start.said[learner.me]["able"] if start.said else 0.0
    return {"able": max(before, float((done.score or 0.0) > learner.settings["threshold"]))}


METAFED = replace(
    FEDAVG, name="metafed", passes=(descend(distilled),), adopt=own_or_theirs, beside=teacher, says=says_able
)
METAFED_RING = replace(METAFED, name="metafed_ring")
