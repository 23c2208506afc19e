"""Federated averaging (McMahan et al. 2017): one plain classifier, w = sum of n_k / n * w_k.

Exact: the weighting by training images, buffers included. Adapted: every peer takes part in every round and computes
the same average itself; local epochs and schedule are the plan's.
"""

from __future__ import annotations

from torch import Tensor, nn

from hsl_node.federation.plan import Plan
from hsl_node.train.batches import Batch
from hsl_node.train.method import Method
from hsl_node.train.networks.classifier import Classifier
from hsl_node.train.tasks.classification import outputs, primary_loss


def build(plan: Plan) -> nn.Module:
    return Classifier(plan.backbone, outputs(plan))


def losses(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    primary = primary_loss(model(batch.primary), batch.label)
    return primary, primary.new_zeros(())


def logits(model: nn.Module, image_BCHW: Tensor, _anchor_embedding: Tensor | None) -> Tensor:
    return model(image_BCHW)  # type: ignore[no-any-return]


FEDAVG = Method(
    name="fedavg",
    build=build,
    losses=losses,
    logits=logits,
    fusion="weighted_mean",
)
