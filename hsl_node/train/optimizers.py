"""How a model's parameters are moved: the plan's optimizer, and its learning rate over the run."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.optim import Optimizer

from hsl_node.federation.plan import Plan


def by_plan(model: nn.Module, plan: Plan) -> dict[str, Optimizer]:
    """One optimizer, "main", for every parameter."""
    return {
        "main": torch.optim.Adam(model.parameters(), lr=plan.learning_rate, weight_decay=plan.weight_decay, fused=True)
    }


def learning_rate(plan: Plan, epoch: int) -> float:
    """Cosine annealing over the whole run's epochs (from 1), in closed form: nothing to save, nothing to step.

    Falls from learning_rate towards learning_rate_min within each period and starts anew with the next, like torch's
    CosineAnnealingWarmRestarts. torch's CosineAnnealingLR would instead climb back along the same cosine, a cycle of
    twice the period; "period 10 epochs" is read as a cycle of 10.
    """
    part = ((epoch - 1) % plan.cosine_period_epochs) / plan.cosine_period_epochs
    span = plan.learning_rate - plan.learning_rate_min
    return plan.learning_rate_min + span * (1 + math.cos(math.pi * part)) / 2
