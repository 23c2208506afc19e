"""AdaFedProx (IEEE TCE 2024; after Pranabiitp/AdaFedProx): a policy decides each round how far the mean is held back.

The paper was not to be had, and in the released code mu has no effect. As released: five numbers of each peer go into
the policy; what is fused is w + (1 - mu) (mean - w), the interpolation, all peers counting the same (the fusion
`interpolated`); no proximal term is in the loss. Assumed: nearly all else (networks/policy.py). Every peer derives the
policy itself from what all signed, and it never travels. Reward: the change of the fused model's mean validation score
(release: test accuracy). A loss above 10 counts as 10. mu is said and the fusion takes the mean, so one lost policy
leaves the bytes the same. Round 1, where nobody has said anything, has mu = 0. BatchNorm's statistics take the mean by
images.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import cast

import numpy as np
from torch import nn

from hsl_node.federation.plan import Plan
from hsl_node.train.data.sources import TRAIN
from hsl_node.train.hardware import derived_seed
from hsl_node.train.method import Done, Learner, Start, Step, Terms, all_but, beginning, take_fused
from hsl_node.train.methods.fedavg import FEDAVG
from hsl_node.train.networks.policy import INPUTS, UNDEFINED, Kept, entropy, new, next_round, seen
from hsl_node.train.scoring import validate
from hsl_node.train.updates import descend


def build(plan: Plan) -> nn.Module:
    model = FEDAVG.network.build(plan)
    model.add_module("policy", Kept(new(INPUTS, plan.seed)))
    return model


def decided(learner: Learner, start: Start) -> None:
    """The fused model, and the policy one round further by what everybody said in the last."""
    take_fused(learner, start)
    if not start.said:
        return
    kept = cast(Kept, learner.model.policy)
    score = math.fsum(said["score"] for said in start.said.values()) / len(start.said)
    rng = np.random.default_rng(derived_seed(learner.site.run, "adafedprox", start.round))
    kept.write(next_round(kept.read(), seen(start.said, start.samples), score, float(rng.standard_normal())))


def fused_score(learner: Learner, start: Start) -> None:
    score = validate(learner.site, learner.model).score
    cast(Kept, learner.model.policy).here.fill_(UNDEFINED if score is None else score)


def graded(step: Step) -> Terms:
    """The task's loss; beside it the batch's accuracy, a number without a gradient."""
    output, target = step.learner.site.method.network.ask(step.model, step.batch.image, None), step.batch.target
    called = output[:, 0] >= 0 if output.shape[1] == 1 else output.argmax(dim=1)
    return {"primary": step.task.loss(output, target), "accuracy": (called == target).float().mean()}


def says(learner: Learner, start: Start, done: Done) -> Mapping[str, float]:
    site, kept = learner.site, cast(Kept, learner.model.policy)
    even = entropy(site.dataset.labels[site.indices(TRAIN)], len(site.plan.classes))
    loss, accuracy = min(done.terms["primary"], 1e6), min(done.terms["accuracy"], 1.0)
    part = done.epoch / site.plan.epochs_per_round
    told = {"entropy": even, "epochs": part, "accuracy": accuracy, "loss": loss}
    return {**told, "mu": kept.read().mu, "score": kept.here.item()}


POLICY = beginning("policy.")
ADAFEDPROX = replace(
    FEDAVG,
    name="adafedprox",
    network=replace(FEDAVG.network, build=build, at_home=POLICY),
    passes=(descend(graded),),
    travels=all_but(POLICY),
    adopt=decided,
    beside=fused_score,
    says=says,
)
