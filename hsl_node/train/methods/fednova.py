"""FedNova (Wang et al., NeurIPS 2020): each peer's update counts by its mean step, not by how many steps it took.

Exact, of weights and with SGD, which the plan must name: w + (sum p_j a_j) sum p_k (w_k - w) / a_k (the fusion `nova`).
a_k, said as "steps", is how often a gradient entered the update, up to the epoch that is sent; momentum begins anew
each round. Ours: where the learning rate changes within a round a step weighs by its rate, relative to the first
epoch's. Adapted: with the proximal term (`mu`) the released code goes as far as the mean of the steps taken; here the
a_k count then too. Weight decay is a part of the gradient. Assumed: BatchNorm's statistics take the mean by images; the
released code leaves them at each client.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from hsl_node.train.method import Done, Learner, Start, Step, Terms, task_loss
from hsl_node.train.methods.fedavg import FEDAVG
from hsl_node.train.methods.fedprox import held_near
from hsl_node.train.updates import descend


def entered(rates: Iterable[float], momentum: float = 0.0, mu: float = 0.0) -> float:
    """How far SGD goes against a gradient that is 1 everywhere, with these learning rates step by step.

    >>> round(entered([0.1] * 4) / 0.1, 6), round(entered([0.1] * 4, momentum=0.5) / 0.1, 6)
    (4.0, 6.125)
    """
    way = velocity = 0.0
    for rate in rates:
        velocity = momentum * velocity + 1
        way += rate * (velocity - mu * way)
    return way


def says(learner: Learner, start: Start, done: Done) -> Mapping[str, float]:
    plan = learner.plan
    first = done.rates[0] or plan.learning_rate
    rates = [rate for rate, steps in zip(done.rates, done.steps, strict=True) for _ in range(steps)]
    return {"steps": max(1.0, entered(rates, plan.momentum, learner.settings["mu"]) / first)}


def plain_or_near(step: Step) -> Terms | None:
    return (near if step.settings["mu"] else plain)(step)


plain, near = descend(task_loss), held_near(task_loss)
FEDNOVA = replace(FEDAVG, name="fednova", passes=(plain_or_near,), says=says, forgets=True)
