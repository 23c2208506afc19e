"""FlexFair (after the authors' code, MaksimXing/FlexFair): hospitals that do worse than the mean count for more.

Published: one step down sum_k L_k + lambda mean_k (L_k - m)^2 over all sites in every batch, m = sum_k q_k L_k by
shares of images, and the gradient flows through m. Adapted: the others' losses are those that they said of the last
round, so peer k's gradient is that of its own loss times c_k = 1 + 2 lambda / K [(L_k - m) - q_k sum_j (L_j - m)], and
the sum is the fusion, by images. L_k is the mean over the epoch's images so far; c_k below 0, which would climb, is 0;
round 1, where nobody has said anything, is FedAvg. SGD alone: Adam would divide a constant c_k out again. Groups within
one hospital, and Dice beside the penalty, are not built.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hsl_node.train.method import Done, Learner, Start, Step, Terms, task_loss
from hsl_node.train.methods.fedavg import FEDAVG
from hsl_node.train.updates import descend

LOSS_MAX = 1e6  # of the card


def coefficient(k: int, losses: Tensor, shares: Tensor, weight: float) -> Tensor:
    """c_k of all peers' losses (K,) and shares (K,); 1 to the bit where all losses are equal, never below 0."""
    above = ((losses[:, None] - losses[None, :]) * shares).sum(dim=1)  # L_j - m, as a sum of differences
    return (1 + 2 * weight / len(losses) * (above[k] - shares[k] * above.sum())).clamp(min=0)


@dataclass
class Others:
    """What all said of the last round, and this epoch's own mean so far; that begins anew with each epoch, so a resumed
    one has the same."""

    me: int
    losses: Tensor  # (K,) float64
    shares: Tensor
    epoch: int = 0
    images: int = 0
    total: Tensor | float = 0.0

    def mean(self, epoch: int, loss: Tensor, images: int) -> Tensor:
        if epoch != self.epoch:
            self.epoch, self.images, self.total = epoch, 0, 0.0
        self.images += images
        self.total = self.total + loss.detach().double() * images
        return self.total / self.images


def said_by_all(learner: Learner, start: Start) -> Others | None:
    peers = sorted(start.said)
    if learner.me not in peers:
        return None  # round 1
    losses = torch.tensor([start.said[p]["loss"] for p in peers], dtype=torch.float64, device=learner.device)
    images = torch.tensor([start.samples[p] for p in peers], dtype=torch.float64, device=learner.device)
    return Others(peers.index(learner.me), losses, images / images.sum())


def fair(step: Step) -> Terms:
    """The task's loss, and what the penalty adds to it: together c_k times the loss."""
    terms, others = task_loss(step), step.beside
    if others is None:
        return terms
    losses = others.losses.clone()
    losses[others.me] = others.mean(step.epoch, terms["primary"], len(step.batch.image))
    c = coefficient(others.me, losses, others.shares, step.settings["lambda"])
    return {**terms, "fairness": (c - 1).to(terms["primary"].dtype) * terms["primary"]}


def says(learner: Learner, start: Start, done: Done) -> Mapping[str, float]:
    return {"loss": min(done.terms["primary"], LOSS_MAX)}


FLEXFAIR = replace(FEDAVG, name="flexfair", passes=(descend(fair),), beside=said_by_all, says=says)
