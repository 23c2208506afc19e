"""FedDP: own heads on a common trunk, then calibrated where the hospitals' heads disagree (Wang et al., TMI 2023).

Adapted: published, the query projections of attention stay private; here the last linear layer does, which is FedPer
with a calibration. Published, the calibration follows the run, when all have all the others' models; here it is the
last planned round, for which each head travels once, in buffers of the checkpoint of the round before (zeros until
then): the trunk of all is the fused one. A run that ends earlier has no calibration, and no head ever leaves. An image
has one disagreement, of its class probabilities. Optimizer, schedule, clipping: the plan's (published: Adam, elements
clipped to 1). Assumed: the calibration's weight, 1, and its rate, the plan's at the end of the run.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from hsl_node.federation.plan import Plan
from hsl_node.train.method import Learner, Method, Network, Start, Step, Terms, all_but, beginning, fused_model
from hsl_node.train.networks.classifier import Classifier
from hsl_node.train.tasks.disagreement import Panel, disagreement, loss_of_each, of_each_class
from hsl_node.train.updates import descend


class Telling(Classifier):
    """A classifier with room for a copy of its head: the copy travels, the head doesn't."""

    told_weight: Tensor
    told_bias: Tensor

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        self.register_buffer("told_weight", torch.zeros_like(self.out.weight))
        self.register_buffer("told_bias", torch.zeros_like(self.out.bias))


def panel(learner: Learner, start: Start) -> Panel | None:
    """In the last planned round; before it there is none."""
    if start.round < learner.plan.rounds or not start.full_set:
        return None
    heads = [(theirs["told_weight"], theirs["told_bias"]) for _, theirs in sorted(start.full_set.items())]
    return Panel(cast(Telling, fused_model(learner, start)).trunk, heads)


def calibrated(step: Step) -> Terms:
    logits = step.model(step.batch.image)
    terms = {"primary": step.task.loss(logits, step.batch.target)}
    if step.beside is not None:
        each = loss_of_each(of_each_class(logits), step.batch.target)
        terms["calibration"] = (
            step.settings["calibration"] * (disagreement(step.beside(step.batch.image)) * each).mean()
        )
    return terms


def descend_and_tell(step: Step) -> Terms | None:
    """In the round before the last one the head is told after each step, so that it's the chosen epoch's."""
    terms = descend(calibrated)(step)
    if step.round == step.learner.plan.rounds - 1:
        model = cast(Telling, step.model)
        model.told_weight.copy_(model.out.weight.detach())
        model.told_bias.copy_(model.out.bias.detach())
    return terms


FEDDP = Method(
    "feddp",
    Network(build=Telling, at_home=beginning("told_")),
    passes=(descend_and_tell,),
    travels=all_but(beginning("out.")),
    beside=panel,
)
