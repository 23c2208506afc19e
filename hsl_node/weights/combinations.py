"""Fusions in which each peer has one coefficient: base + sum of c_k (w_k - base), the whole model alike. Pure.

The coefficients are all that is a rule's own: they follow from what the peers signed and, where a rule asks for it,
from the inner products of all updates w_k - base. Every peer must get the same digits, on any processor: no BLAS, no
`sum` of floats (other digits from Python 3.12 on), float64, a fixed order of adding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import fsum, inf, sqrt
from typing import TYPE_CHECKING

import numpy as np

from hsl_node.weights.active_sets import Table, nonnegative
from hsl_node.weights.fusion import weighted_mean
from hsl_node.weights.influence import STATISTICS

if TYPE_CHECKING:
    from hsl_node.weights.checkpoint_file import Array

BLOCK = 8192  # elements whose products are added in halves; a power of 2, and part of the protocol
NEAREST = 1e-12  # a distance below it counts as this: Weiszfeld divides by it
SWEEPS_MAX = 1000  # of Weiszfeld; 45 do where one of three is 1e13 away, 480 where 31 of 64 are
NO_BASE = 1e-12  # coefficients that add up to 1 but for rounding leave the base out
STILL = 1e-9  # of the longest update: a combined one that is shorter is none


@dataclass(frozen=True)
class FullSet:
    """What everybody knows of one exchange; peers in sorted order."""

    samples: Sequence[int]  # training images, which each counts for itself
    said: Sequence[Mapping[str, float]] = ()  # the numbers that the method says
    products: Table = ()  # of the updates, over the tensors that take the coefficients

    @property
    def shares(self) -> list[float]:
        total = sum(self.samples)
        return [n / total for n in self.samples]


@dataclass(frozen=True)
class Combination:
    coefficients: Callable[[FullSet], Sequence[float]]
    products: bool = False  # wants FullSet.products: one more pass over all files
    convex: bool = False  # none below 0, together 1. Else BatchNorm's statistics take the shares: no variance below 0

    def takes(self, tensor: str, kind: str) -> bool:
        """Do the numbers of this tensor take the coefficients?"""
        return kind == "f" and (self.convex or tensor.rpartition(".")[2] not in STATISTICS)


def nova(full: FullSet) -> list[float]:
    """FedNova (Wang et al., NeurIPS 2020): w + (sum p_j a_j) sum p_k (w_k - w) / a_k.

    a_k, said as "steps": how often a gradient entered peer k's update (train/methods/fednova.py).
    """
    shares, steps = full.shares, [said["steps"] for said in full.said]
    effective = fsum(p * a for p, a in zip(shares, steps, strict=True))
    return [effective * p / a for p, a in zip(shares, steps, strict=True)]


def come(full: FullSet) -> list[float]:
    """FedCOME (arXiv 2311.12358): each update gives way to the nearest vector that is against none; then by shares.

    That vector is v_k = d_k + sum of l_j d_j with the l >= 0 for which it is shortest (Moreau).
    """
    total = [[share] for share in full.shares]
    for k, share in enumerate(full.shares):
        for j, part in enumerate(nonnegative(full.products, k)):
            total[j].append(share * part)
    return [fsum(parts) for parts in total]


def entropy_weighted(full: FullSet) -> list[float]:
    """FedDyS: w + sum e_k (w_k - w) / sum e_j; e_k, said as "evenness", is the label entropy of what peer k trained on.

    Where all say 0, one class each, there is nothing to go by: the shares (ours; the release divides by zero).
    """
    evenness = [said["evenness"] for said in full.said]
    total = fsum(evenness)
    return [e / total for e in evenness] if total > 0 else full.shares


def interpolated(full: FullSet) -> list[float]:
    """AdaFedProx: w + (1 - mu) (mean - w); mu the mean of what all said, who derive the same one."""
    count = len(full.said)
    mu = fsum(said["mu"] for said in full.said) / count
    return [(1 - mu) / count] * count


def geometric_median(full: FullSet) -> list[float]:
    """The point with the least sum of distances to all checkpoints, vectors of a whole model each. Sizes don't count.

    Weiszfeld's iteration from the mean, on coefficients: for y = sum a_k w_k the square of |y - w_k| is
    a'Ga - 2 (Ga)_k + G_kk. Half of the peers or more must collude to move it far.
    """
    g, count = full.products, len(full.samples)
    a = [1 / count] * count
    for _ in range(SWEEPS_MAX):
        along = [fsum(x * y for x, y in zip(row, a, strict=True)) for row in g]
        square = fsum(x * y for x, y in zip(along, a, strict=True))
        near = [1 / max(NEAREST, sqrt(max(0.0, square - 2 * along[k] + g[k][k]))) for k in range(count)]
        total = fsum(near)
        before, a = a, [x / total for x in near]
        if a == before:
            break
    return a


COMBINATIONS: Mapping[str, Combination] = {
    "geometric_median": Combination(geometric_median, products=True, convex=True),
    "nova": Combination(nova),
    "come": Combination(come, products=True),
    "entropy_weighted": Combination(entropy_weighted, convex=True),
    "interpolated": Combination(interpolated),
}


def combine(
    chunks: Sequence[Array],
    coefficients: Sequence[float],
    base: Array | None = None,
    clip: float = 0.0,
    limit: float = inf,
) -> Array:
    """One chunk of base + sum of c_k (w_k - base), in float64 and in the given order, back in its own dtype.

    `clip`: no number moves further than this from the base; 0: as far as it will. `base` may be None where coefficients
    add up to 1 and nothing is clipped: no value is beyond all peers' then. Else none is beyond `limit`.
    """
    if not clip and abs(fsum(coefficients) - 1) < NO_BASE:
        return weighted_mean(chunks, coefficients)
    assert base is not None
    before = base.astype(np.float64)
    moved = np.zeros_like(before)
    for chunk, coefficient in zip(chunks, coefficients, strict=True):
        moved += (chunk - before) * coefficient
    if clip:
        np.clip(moved, -clip, clip, out=moved)
    top = min(limit, float(np.finfo(base.dtype).max))
    return np.clip(before + moved, -top, top).astype(base.dtype)


class Products:
    """Sums the inner products of all updates up, chunk by chunk in the order of the file: memory grows with a block."""

    def __init__(self, peers: int) -> None:
        self._total = np.zeros((peers, peers))

    def see(self, base: Array, chunks: Sequence[Array]) -> None:
        """The next chunk of a tensor; it begins at a multiple of BLOCK."""
        for at in range(0, len(base), BLOCK):
            before = base[at : at + BLOCK].astype(np.float64)
            updates = np.stack([chunk[at : at + BLOCK] - before for chunk in chunks])
            for k in range(len(chunks)):
                self._total[k, : k + 1] += _in_halves(updates[: k + 1] * updates[k])

    @property
    def table(self) -> Table:
        lower = self._total.tolist()
        return [[lower[max(i, j)][min(i, j)] for j in range(len(lower))] for i in range(len(lower))]


def _in_halves(rows: Array) -> Array:
    """The sum of each row: the second half is added to the first until one is left. numpy promises no order of its."""
    left = rows.shape[1]
    while left > 1:
        half = (left + 1) // 2
        rows[:, : left - half] += rows[:, half:left]
        left = half
    return rows[:, 0]


def stands_still(coefficients: Sequence[float], products: Table) -> bool:
    """Do the updates cancel each other out? FedCOME's do where they point in all directions."""
    along = [fsum(x * c for x, c in zip(row, coefficients, strict=True)) for row in products]
    square = fsum(x * c for x, c in zip(along, coefficients, strict=True))
    longest = max(row[k] for k, row in enumerate(products))
    return square < STILL**2 * longest
