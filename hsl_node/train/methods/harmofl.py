"""HarmoFL: images of one common amplitude spectrum, and descent to where the loss is flat (Jiang et al., AAAI 2022).

Exact: the amplitudes inside the box about zero frequency become the federation's, the phase stays; in the first round
the running mean of the own batches (momentum 0.1) stands for it, then the plain mean of all hospitals', which never
changes again. It is part of the model, so of an exported one too. The gradient is taken at w + alpha g / |g|, over all
parameters together, the step from w. Exact with `optimizer = "sgd"`; another optimizer gets that gradient.
Adapted: BatchNorm has running statistics, since without them a prediction depends on the images beside it; they are
those of the first of a step's two passes. Epochs and schedule are the plan's (published: 1 epoch, 100 rounds).
"""

from __future__ import annotations

from typing import cast

from torch import Tensor

from hsl_node.federation.plan import Plan
from hsl_node.train.method import Learner, Method, Network, Start, task_loss
from hsl_node.train.networks.amplitude import AmplitudeNorm
from hsl_node.train.networks.classifier import Classifier
from hsl_node.train.updates import perturbed


class Harmonised(Classifier):
    """A classifier whose images are normalised in amplitude first."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        self.normalise = AmplitudeNorm(plan.image_size, plan.settings["box"])

    def forward(self, image_BCHW: Tensor) -> Tensor:
        return super().forward(self.normalise(image_BCHW))


def learn_in_the_first_round(learner: Learner, start: Start) -> None:
    cast(Harmonised, learner.model).normalise.learning = start.round == 1


HARMOFL = Method(
    "harmofl",
    Network(build=Harmonised),
    passes=(perturbed(task_loss),),
    beside=learn_in_the_first_round,
    one_device="the spectrum that it learns in the first round is a mean over the batches as they come",
)
