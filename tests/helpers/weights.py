"""The weights of a tiny model, and fusion in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hsl_node.federation.names import Peer
from hsl_node.weights.checkpoint_file import MAGNITUDE_MAX, Array, Weights
from hsl_node.weights.combinations import COMBINATIONS, FullSet, Products, combine
from hsl_node.weights.fusion import RULES, shares_of, weighted_mean


def weights(value: float = 1.0) -> dict[str, Any]:
    return {"a.weight": np.full((50, 40), value, np.float32), "b.count": np.array([7], np.int64)}


@dataclass(frozen=True)
class Contribution:
    """What one peer brings to a fusion."""

    weights: Weights
    samples: int  # training images behind it
    said: Mapping[str, float] = field(default_factory=dict)


def fuse(rule: str, full_set: Mapping[Peer, Contribution], base: Weights | None = None, clip: float = 0.0) -> Weights:
    """The full set in, one set of weights out; `fuse_files` must give the same bytes."""
    peers = sorted(full_set)
    names = sorted(full_set[peers[0]].weights)
    of = {name: [full_set[p].weights[name] for p in peers] for name in names}
    shares = shares_of({p: full_set[p].samples for p in peers})
    fused = {name: RULES.get(rule, weighted_mean)(of[name], shares) for name in names}
    if rule in COMBINATIONS:
        taking = [name for name in names if COMBINATIONS[rule].takes(name, of[name][0].dtype.kind)]
        coefficients = coefficients_of(rule, full_set, taking, base)
        for name in taking:
            before = None if base is None else base[name]
            fused[name] = combine(of[name], coefficients, before, clip, MAGNITUDE_MAX)
    return fused


def coefficients_of(
    rule: str, full_set: Mapping[Peer, Contribution], taking: Sequence[str], base: Weights | None
) -> Sequence[float]:
    peers, products = sorted(full_set), Products(len(full_set))
    for name in taking if base is not None else ():
        flat: list[Array] = [full_set[p].weights[name].reshape(-1) for p in peers]
        products.see(base[name].reshape(-1), flat)
    samples, said = [full_set[p].samples for p in peers], [full_set[p].said for p in peers]
    return COMBINATIONS[rule].coefficients(FullSet(samples, said, products.table))
