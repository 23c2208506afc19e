"""Personalised federated learning, as in the release of HeteroSync Learning: half own, half the others' mean.

Exact, on HSL's network with its anchor task: a hospital starts from own * w_k + (1 - own) * mean of the others' w_j,
own 0.5: every tensor, BatchNorm's statistics too; the largest counters. All fuse the same plain mean m, of which the
others' mean is (K m - w_k) / (K - 1), so nothing more travels; with another fusion rule than `mean` it is an
adaptation. The release's README divides own weights by 0.5 instead. Between two hospitals half and half is the mean:
nothing is personal then. A hospital's model is its own start; what others would get is the mean (assumed).
"""

from __future__ import annotations

from dataclasses import replace

import torch

from hsl_node.train.method import Learner, Start, put, take_fused
from hsl_node.train.methods.hsl import HSL


@torch.no_grad()
def half_own(learner: Learner, start: Start) -> None:
    take_fused(learner, start)
    peers = len(start.samples)
    if not start.mine or peers < 2:
        return
    mean = (1 - learner.settings["own"]) * peers / (peers - 1)
    mixed = {
        name: (1 - mean) * start.mine[name].double() + mean * fused.double()
        for name, fused in start.fused.items()
        if fused.is_floating_point()
    }
    put(learner.model, mixed)


PERSONALISED = replace(HSL, name="personalised", adopt=half_own)
