"""HeteroSync Learning: the private task co-trained with the shared anchor task (Hu et al. 2025).

Exact: model, losses, pairing, plain mean of every tensor. Ours: logits instead of probabilities in the loss, all
experts in one product, and a fixed anchor embedding beside the patient's image in scoring.
"""

from __future__ import annotations

from hsl_node.train.method import Method, Step, Terms
from hsl_node.train.networks.mmoe import MMOE
from hsl_node.train.updates import descend


def both_tasks(step: Step) -> Terms:
    batch, loss = step.batch, step.task.loss
    assert batch.anchor is not None and batch.anchor_label is not None
    primary, anchor = step.model(batch.image, batch.anchor)  # (B, C), (B, 1)
    weight = step.settings["anchor_weight"]  # published: 1
    return {"primary": loss(primary, batch.target), "anchor": loss(anchor, batch.anchor_label) * weight}


HSL = Method("hsl", MMOE, passes=(descend(both_tasks),))
