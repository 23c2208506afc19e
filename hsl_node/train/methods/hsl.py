"""HeteroSync Learning: the private task co-trained with the shared anchor task (Hu et al. 2025).

Exact: model, losses, pairing, plain mean of every tensor. Ours: logits instead of probabilities in the loss, all
experts in one product, and a fixed anchor embedding beside the patient's image in scoring.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from hsl_node.federation.plan import Plan
from hsl_node.train.batches import Batch
from hsl_node.train.method import Method
from hsl_node.train.networks.mmoe import MMoE
from hsl_node.train.tasks.classification import outputs, primary_loss


def build(plan: Plan) -> nn.Module:
    return MMoE(
        backbone=plan.backbone,
        outputs=outputs(plan),
        **plan.settings,
    )


def losses(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    assert batch.anchor is not None and batch.anchor_label is not None
    primary, anchor = model(batch.primary, batch.anchor)  # (B, C), (B, 1)
    return primary_loss(primary, batch.label), primary_loss(anchor, batch.anchor_label)


def logits(model: nn.Module, image_BCHW: Tensor, anchor_embedding: Tensor | None) -> Tensor:
    assert anchor_embedding is not None
    mmoe = cast(MMoE, model)
    return mmoe.primary_logits(mmoe.encode_primary(image_BCHW), anchor_embedding)


def embed_anchor(model: nn.Module, image_BCHW: Tensor) -> Tensor:
    return cast(MMoE, model).encode_anchor(image_BCHW)


HSL = Method(
    name="hsl",
    build=build,
    losses=losses,
    logits=logits,
    fusion="mean",
    embed_anchor=embed_anchor,
)
