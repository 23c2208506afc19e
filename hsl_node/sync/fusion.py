"""Fuse checkpoints. Pure: numpy in, numpy out.

A rule sees one tensor (or one chunk of it) of every peer at a time, in sorted peer order, so that memory grows with a
chunk and not with the number of peers, and every peer computes the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hsl_node.errors import FederationMismatch
from hsl_node.sync.names import Peer
from hsl_node.sync.tensors import Array, Weights

# (the same chunk of every peer, in sorted peer order; share of each peer, adding up to 1) -> fused chunk
Rule = Callable[[Sequence[Array], Sequence[float]], Array]


@dataclass(frozen=True)
class Contribution:
    """What one peer brings to a fusion."""

    weights: Weights
    samples: int  # training images behind it


def mean(chunks: Sequence[Array], shares: Sequence[float]) -> Array:
    """Plain mean (HSL paper, equation 1): every peer counts the same, whatever its size.

    Floats accumulate in float64, in the given order, and return in their own dtype. Integers (BatchNorm's batch
    counters) take the maximum: their mean has no meaning.
    """
    if chunks[0].dtype.kind != "f":
        return _maximum(chunks)
    total = chunks[0].astype(np.float64)
    for chunk in chunks[1:]:
        total += chunk
    total /= len(chunks)
    return total.astype(chunks[0].dtype)


def weighted_mean(chunks: Sequence[Array], shares: Sequence[float]) -> Array:
    """Mean weighted by training images, sum of (n_k / n) w_k (FedAvg; UltraFedFM). Integers as in `mean`."""
    if chunks[0].dtype.kind != "f":
        return _maximum(chunks)
    total = chunks[0].astype(np.float64)
    total *= shares[0]
    for chunk, share in zip(chunks[1:], shares[1:], strict=True):
        total += chunk.astype(np.float64) * share
    return total.astype(chunks[0].dtype)


RULES: Mapping[str, Rule] = {"mean": mean, "weighted_mean": weighted_mean}


def fuse(rule: str, full_set: Mapping[Peer, Contribution]) -> Weights:
    """The full set in, one set of weights out; in memory. On disk: `fuse_files`, with the same bytes.

    Raises:
        FederationMismatch: a peer lacks a tensor, or shape or dtype differ.
    """
    peers = sorted(full_set)
    parts = [full_set[p].weights for p in peers]
    for peer, part in zip(peers, parts, strict=True):
        if _shapes(part) != _shapes(parts[0]):
            raise FederationMismatch(
                f"the tensors of {peer} are not those of {peers[0]}",
                remedy="install the same version at both sites",
            )
    shares = shares_of({p: full_set[p].samples for p in peers})
    return {name: RULES[rule]([part[name] for part in parts], shares) for name in sorted(parts[0])}


def shares_of(samples: Mapping[Peer, int]) -> list[float]:
    """n_k / n in sorted peer order.

    Raises:
        ValueError: no samples at all (the receiver's checks refuse such a manifest before this).
    """
    total = sum(samples.values())
    if total <= 0 or min(samples.values()) < 0:
        raise ValueError(f"sample counts {dict(samples)} add up to nothing")
    return [samples[p] / total for p in sorted(samples)]


def _maximum(chunks: Sequence[Array]) -> Array:
    result = chunks[0].copy()
    for chunk in chunks[1:]:
        np.maximum(result, chunk, out=result)
    return result


def _shapes(weights: Weights) -> dict[str, tuple[tuple[int, ...], str]]:
    return {name: (array.shape, array.dtype.str) for name, array in weights.items()}
