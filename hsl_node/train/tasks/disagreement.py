"""How far several models disagree about each image. Shapes: K models, B images, C classes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hsl_node.train.tasks.classification import probabilities

AGREED = 1e-6  # a largest deviation below this is rounding, which would be blown up to 1
CERTAIN = 1e-5  # probabilities are kept so far from 0 and 1


@dataclass(frozen=True)
class Panel:
    """Everybody's model, frozen: one trunk, and the linear head (weight, bias) of each."""

    trunk: nn.Module
    heads: list[tuple[Tensor, Tensor]]

    @torch.no_grad()
    def __call__(self, image_BCHW: Tensor) -> Tensor:
        """(B, 3, S, S) -> (K, B, C) probabilities"""
        feature = self.trunk(image_BCHW)
        return torch.stack([of_each_class(F.linear(feature, *head)) for head in self.heads])


def disagreement(answers: Tensor) -> Tensor:
    """(K, B, C) probabilities -> (B,) in 0..1: the unbiased deviation over the models, the mean over the classes, as a
    share of the batch's largest."""
    spread = answers.std(dim=0).mean(dim=1)
    largest = spread.max()
    return torch.where(largest < AGREED, torch.zeros_like(spread), spread / largest.clamp_min(AGREED))


def loss_of_each(probability: Tensor, target: Tensor) -> Tensor:
    """(B, C) probabilities, (B,) classes -> (B,): each image's cross-entropy."""
    of_truth = probability.clamp(CERTAIN, 1 - CERTAIN).gather(1, target[:, None])
    return -of_truth[:, 0].log()


def of_each_class(logits: Tensor) -> Tensor:
    """(B, 1) or (B, C) logits -> (B, 2) or (B, C) probabilities."""
    p = probabilities(logits)
    return torch.stack([1 - p, p], dim=1) if p.ndim == 1 else p
