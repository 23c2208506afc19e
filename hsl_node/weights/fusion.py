"""Fuse checkpoints. numpy in, numpy out. Pure.

A rule sees one tensor (or one chunk of it) of every peer at a time, in sorted peer order, so that memory grows with a
chunk and not with the number of peers, and every peer computes the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Protocol

import numpy as np

from hsl_node.federation.fusion_rules import ROBUST_PEERS_MIN
from hsl_node.federation.names import Peer

if TYPE_CHECKING:
    from hsl_node.weights.checkpoint_file import Array

TRIM_DIVISOR = 5  # a fifth of the peers is trimmed on each side


class Rule(Protocol):
    """Fuses one chunk of one tensor: `chunks`, the same one of every peer in sorted peer order; `shares` add up to 1.

    It sees no other chunk, is not told which tensor this is, and keeps nothing from one chunk to the next. So what
    needs whole checkpoints at once does not fit: geometric median, Krum, a bound on the norm of a whole update.
    """

    def __call__(self, chunks: Sequence[Array], shares: Sequence[float]) -> Array: ...


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


def trimmed_mean(chunks: Sequence[Array], shares: Sequence[float]) -> Array:
    """Coordinate by coordinate, the plain mean of what is left without the k smallest and the k largest values.

    k is a fifth of the peers, rounded down, but at least 1 from 3 peers on; so up to k peers, whatever they send, move
    a coordinate no further than the others' range (Yin, Chen, Ramchandran, Bartlett: Byzantine-Robust Distributed
    Learning, ICML 2018; their beta is k / n). With 3 peers it is the median. Sizes don't count; integers as in `mean`.
    """
    peers = len(chunks)
    trim = max(1, peers // TRIM_DIVISOR) if peers >= ROBUST_PEERS_MIN else 0
    return _middle(chunks, trim)


def median(chunks: Sequence[Array], shares: Sequence[float]) -> Array:
    """Coordinate by coordinate, the middle value; the mean of the two middle ones for an even number of peers.

    Any minority of peers moves a coordinate no further than the others' range (Yin et al. 2018). Sizes don't count;
    integers as in `mean`.
    """
    return _middle(chunks, (len(chunks) - 1) // 2)


# What each one does, and for how many peers: `fusion_rules.py`.
RULES: Mapping[str, Rule] = {
    "mean": mean,
    "weighted_mean": weighted_mean,
    "trimmed_mean": trimmed_mean,
    "median": median,
}


def shares_of(samples: Mapping[Peer, int]) -> list[float]:
    """n_k / n in sorted peer order.

    Raises:
        ValueError: no samples at all (the receiver's checks refuse such a manifest before this).
    """
    total = sum(samples.values())
    if total <= 0 or min(samples.values()) < 0:
        raise ValueError(f"sample counts {dict(samples)} add up to nothing")
    return [samples[p] / total for p in sorted(samples)]


def _middle(chunks: Sequence[Array], trim: int) -> Array:
    """The mean of every coordinate without its `trim` smallest and largest values, in float64, smallest first."""
    if chunks[0].dtype.kind != "f":
        return _maximum(chunks)
    rows = [chunk.copy() for chunk in chunks]
    for low, high in _exchanges(len(rows)):
        smaller = np.minimum(rows[low], rows[high])
        np.maximum(rows[low], rows[high], out=rows[high])
        rows[low] = smaller
    kept = rows[trim : len(rows) - trim]
    total = np.zeros(chunks[0].shape, np.float64)  # 0 + -0 is 0: which peer's zero it was can't show
    for row in kept:
        total += row
    total /= len(kept)
    return total.astype(chunks[0].dtype)


@cache
def _exchanges(count: int) -> tuple[tuple[int, int], ...]:
    """Pairs that sort `count` rows when compared and exchanged one after the other (Knuth, volume 3, algorithm 5.2.2M).

    Whole rows at a time: with 5 peers 18 times as fast as numpy's sort along the peers, which calls a sort for every
    coordinate.
    """
    pairs = []
    top = 1 << max(0, (count - 1).bit_length() - 1)
    p = top
    while p:
        q, r, d = top, 0, p
        while True:
            pairs += [(i, i + d) for i in range(count - d) if i & p == r]
            if q == p:
                break
            d, q, r = q - p, q // 2, p
        p //= 2
    return tuple(pairs)


def _maximum(chunks: Sequence[Array]) -> Array:
    result = chunks[0].copy()
    for chunk in chunks[1:]:
        np.maximum(result, chunk, out=result)
    return result
