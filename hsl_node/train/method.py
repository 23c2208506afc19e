"""A learning method is a value: which model, which loss, what is shared, how it is fused.

What all methods have in common (initial values, the epoch loop, schedule, choice of the best epoch, resuming) is in
loop.py and is not theirs to write. A method file touches neither the store nor the wire.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from hsl_node.federation.plan import Plan
from hsl_node.train.batches import Batch, Indices
from hsl_node.train.data.anchor import AnchorSet
from hsl_node.train.data.dataset import Dataset
from hsl_node.train.hardware import Hardware
from hsl_node.train.state_dict import all_tensors


@dataclass(frozen=True)
class Method:
    """One learning method as a value. All peers must run the same name and settings."""

    name: str
    build: Callable[[Plan], nn.Module]  # the architecture; values come from networks/initial.py
    losses: Callable[[nn.Module, Batch], tuple[Tensor, Tensor]]  # (primary, anchor), their sum is minimised
    logits: Callable[[nn.Module, Tensor, Tensor | None], Tensor]  # (B, 3, S, S), anchor embedding -> (B, C)
    fusion: str  # the rule its authors use (federation/fusion_rules.py), or "own": it never fuses
    embed_anchor: Callable[[nn.Module, Tensor], Tensor] | None = None  # (B, 3, S, S) -> (B, 512); None: no anchor task
    shared: Callable[[nn.Module], frozenset[str]] = all_tensors  # names of the tensors that may leave the hospital


@dataclass(frozen=True)
class Site:
    """What one hospital trains with."""

    peer: str
    run: str  # digest of the federation: an epoch checkpoint of another run is never resumed
    plan: Plan
    method: Method
    dataset: Dataset
    anchor: AnchorSet | None
    hardware: Hardware

    def indices(self, split: int) -> Indices:
        return np.flatnonzero(self.dataset.split == split)
