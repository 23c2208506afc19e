"""FedProx (Li et al. 2020): training is held near the fused model, F(v) + mu/2 |v - w|^2.

Exact with SGD: v <- v - rate (g + mu (v - w)), momentum of g alone; and the sum of n_k / n * w_k as the authors' code
has it (their text draws peers instead). With Adam or AdamW the term is part of the loss, so it is scaled alike.
Not part of it: the partial work of stragglers, since all peers do all epochs.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from hsl_node.train.method import Loss, Step, Terms, Update, plus, task_loss
from hsl_node.train.methods.fedavg import FEDAVG
from hsl_node.train.updates import descend


def proximal(step: Step) -> Terms:
    """Over the parameters that travel: BatchNorm's statistics are no parameters, and `start.fused` never moves."""
    fused = step.start.fused
    gaps = [(p - fused[name]).square().sum() for name, p in step.model.named_parameters() if name in fused]
    return {"proximal": step.settings["mu"] / 2 * torch.stack(gaps).sum()}


def held_near(loss: Loss) -> Update:
    """Descend a loss, held near the fused model."""
    together, alone = descend(plus(loss, proximal)), descend(loss)

    def update(step: Step) -> Terms | None:
        if step.learner.plan.optimizer != "sgd":
            return together(step)
        term = {name: value.detach() for name, value in proximal(step).items()}
        travelling = [(p, step.start.fused[n]) for n, p in step.model.named_parameters() if n in step.start.fused]
        ways = [(p, (p - w).detach()) for p, w in travelling]
        terms = alone(step)
        if terms is None:
            return None
        pull = step.settings["mu"] * step.learner.optimizers["main"].param_groups[0]["lr"]
        with torch.no_grad():
            for p, way in ways:
                p.sub_(way, alpha=pull)
        return {**terms, **term}

    return update


FEDPROX = replace(FEDAVG, name="fedprox", passes=(held_near(task_loss),))
