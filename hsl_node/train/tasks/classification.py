"""A class is asked of an image: its loss, its probabilities, and the AUC that epochs and models are chosen by."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hsl_node.federation.plan import Plan
from hsl_node.train.task import Task
from hsl_node.train.tasks.metrics import measure


def outputs(plan: Plan) -> int:
    """Two classes: one logit. More: one per class."""
    return 1 if len(plan.classes) == 2 else len(plan.classes)


def primary_loss(logits: Tensor, label: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean loss over a batch: binary cross-entropy for (B, 1), cross-entropy for (B, C).

    weights: factors (C,) of the classes; a batch of rare ones then counts more, as the mean is over images.
    """
    of_each = None if weights is None else weights[label]
    if logits.shape[1] == 1:
        return F.binary_cross_entropy_with_logits(logits[:, 0], label.float(), of_each)
    if of_each is None:
        return F.cross_entropy(logits, label)
    return (F.cross_entropy(logits, label, reduction="none") * of_each).mean()


def probabilities(logits: Tensor) -> Tensor:
    """(N, 1) -> (N,), the probability of class 1; (N, C) -> (N, C)."""
    return torch.sigmoid(logits[:, 0]) if logits.shape[1] == 1 else torch.softmax(logits, dim=1)


def log_odds(logits: Tensor) -> Tensor:
    """(N, 1) -> (N,), of class 1; (N, C) -> (N, C) float64, of each class against the rest.

    What AUC ranks: the order is that of the probabilities, but a float32 probability is 1, and equal to all others,
    from log-odds of 17 on, which a confident network passes.
    """
    if logits.shape[1] == 1:
        return logits[:, 0]
    wide = logits.double()
    rest = [torch.cat([wide[:, :c], wide[:, c + 1 :]], dim=1).logsumexp(dim=1) for c in range(wide.shape[1])]
    return wide - torch.stack(rest, dim=1)


def auc(logits: Tensor, label: Tensor) -> float | None:
    return measure(label.numpy(), probabilities(logits).numpy(), log_odds(logits).numpy()).auc


CLASSIFICATION = Task("classification", primary_loss, probabilities, auc)
