"""HeteroSync Learning: the private task co-trained with the shared anchor task (Hu et al. 2025).

Exact with `preset = "published"`: model, losses, pairing, plain mean of every tensor; without it one encoder serves
both tasks, whose features are joined otherwise, and the anchor loss weighs less. Adapted: towers begin as torch draws
linear layers, in the release Xavier-uniform, and trunks at random unless the plan names a weight file. Ours: logits
instead of probabilities in the loss, all experts in one product, and a fixed anchor embedding beside the patient's
image in scoring.
"""

from __future__ import annotations

from typing import cast

from hsl_node.train.method import Method, Step, Terms
from hsl_node.train.networks.mmoe import MMOE, MMoE
from hsl_node.train.updates import descend


def both_tasks(step: Step) -> Terms:
    """Between two batches with anchor images the last ones' mean embedding stands for them, as in scoring."""
    batch, model = step.batch, cast(MMoE, step.model)
    if batch.anchor is None:
        return {"primary": step.task.loss(model.primary(batch.image), batch.target)}
    primary, anchor = model(batch.image, batch.anchor)  # (B, C), (B, 1)
    anchor_loss = step.learner.site.task.loss(anchor, batch.anchor_label)
    return {
        "primary": step.task.loss(primary, batch.target),
        "anchor": anchor_loss * step.settings["anchor_weight"],  # published: 1
    }


HSL = Method("hsl", MMOE, passes=(descend(both_tasks),))
