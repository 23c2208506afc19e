"""How much of the anchor task reaches what the primary task stands on: the measure of HSL's promise.

The paper's text wants a shared architecture through which the anchor task aligns the hospitals' representations. Where
the anchor loss has no gradient there, two networks are trained side by side, and nothing is aligned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hsl_node.train.networks.mmoe import MMoE


@dataclass(frozen=True)
class Reach:
    """The length of the anchor loss's gradient as a share of the primary loss's."""

    features: float  # on the primary images' features (B, 512)
    encoder: float  # on the weights of the encoder that sees the primary images
    experts: float  # on the experts' weights

    @property
    def aligns(self) -> bool:
        """Does the anchor task move the encoder by 1 % of what the primary task does, or more?"""
        return self.encoder >= 0.01


def anchor_reach(
    model: MMoE,
    image_BCHW: Tensor,
    target: Tensor,
    anchor_BCHW: Tensor,
    anchor_label: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
    weight: float = 1.0,  # of the anchor loss
) -> Reach:
    """One batch of pairs, as in training (batch statistics) but without dropout, so that it is the same each time."""
    was_training = model.training
    statistics = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.train()
    for part in (model.experts, model.tower_primary, model.tower_anchor):
        part.eval()
    f_p, f_a = model.encode(image_BCHW, anchor_BCHW)
    answers = model.answers(f_p, f_a)
    losses = loss(answers[0], target), loss(answers[1], anchor_label) * weight
    encoder: nn.Module = model.encoder if model.shared_encoder else model.encoder_primary

    def share(of: Iterable[Tensor]) -> float:
        tensors = list(of)
        primary, anchor = (_length(torch.autograd.grad(one, tensors, retain_graph=True)) for one in losses)
        return anchor / primary

    found = Reach(share([f_p]), share(encoder.parameters()), share(model.experts.parameters()))
    model.train(was_training)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(statistics[name])
    return found


def _length(gradients: Iterable[Tensor]) -> float:
    return float(torch.stack([g.double().square().sum() for g in gradients]).sum().sqrt())
