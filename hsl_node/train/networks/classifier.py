"""A plain classifier, the network of every method without an anchor task."""

from __future__ import annotations

from torch import Tensor, nn

from hsl_node.federation.plan import Plan
from hsl_node.train.method import Network
from hsl_node.train.networks.backbone import Trunk
from hsl_node.train.tasks.classification import outputs


class Classifier(nn.Module):
    """A trunk and one linear layer: (B, 3, S, S) -> (B, C)."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.trunk = Trunk(plan.backbone, plan.norm, plan.image_size)
        self.out = nn.Linear(self.trunk.features, outputs(plan))

    def forward(self, image_BCHW: Tensor) -> Tensor:
        return self.out(self.trunk(image_BCHW))  # type: ignore[no-any-return]

    def with_stages(self, image_BCHW: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits (B, C) and the trunk's stages, in one pass."""
        feature, stages = self.trunk.with_stages(image_BCHW)
        return self.out(feature), stages


CLASSIFIER = Network(build=Classifier)
