"""The weights of a tiny model, and fusion in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from hsl_node.federation.names import Peer
from hsl_node.weights.checkpoint_file import Weights
from hsl_node.weights.fusion import RULES, shares_of


def weights(value: float = 1.0) -> dict[str, Any]:
    return {"a.weight": np.full((50, 40), value, np.float32), "b.count": np.array([7], np.int64)}


@dataclass(frozen=True)
class Contribution:
    """What one peer brings to a fusion."""

    weights: Weights
    samples: int  # training images behind it


def fuse(rule: str, full_set: Mapping[Peer, Contribution]) -> Weights:
    """The full set in, one set of weights out; `fuse_files` must give the same bytes."""
    peers = sorted(full_set)
    shares = shares_of({p: full_set[p].samples for p in peers})
    names = sorted(full_set[peers[0]].weights)
    return {name: RULES[rule]([full_set[p].weights[name] for p in peers], shares) for name in names}
