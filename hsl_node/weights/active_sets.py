"""The shortest d_k + sum of l_j d_j with l >= 0, from inner products alone, without BLAS: FedCOME's vectors. Pure.

Found exactly, in steps that depend on the numbers alone; an interior-point solver gives other digits elsewhere, and
projections one after the other leave products below 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import fsum, sqrt

Table = Sequence[Sequence[float]]  # (peers, peers) inner products of updates

AGAINST = 1e-12  # a cosine this far below 0 is one. Updates opposite to five digits are not told from exactly opposite
TURNS_MAX = 10  # for each peer; random updates took one at most


def nonnegative(products: Table, k: int) -> list[float]:
    """The l >= 0 for which d_k + sum of l_j d_j is shortest; its product with each d_j is 0 or more then.

    By active sets (Lawson, Hanson: Solving Least Squares Problems, 1974, chapter 23), on the d brought to length 1.
    """
    length = [sqrt(row[j]) for j, row in enumerate(products)]
    some = [j for j, size in enumerate(length) if size > 0]
    if k not in some:
        return [0.0] * len(length)
    cosine = {j: {i: products[j][i] / (length[j] * length[i]) for i in some} for j in some}
    x, active, left_out = dict.fromkeys(some, 0.0), list[int](), set[int]()
    for _ in range(TURNS_MAX * len(some)):
        slope = {j: fsum([cosine[j][k], *(cosine[j][i] * x[i] for i in active)]) for j in some}
        against = [j for j in some if slope[j] < -AGAINST and j not in active and j not in left_out]
        if not against:
            break
        new = min(against, key=lambda j: slope[j])
        x, active = _feasible(cosine, x, sorted([*active, new]), k)
        left_out = {*left_out, new} if new not in active else set()
    return [x.get(j, 0.0) * length[k] / length[j] if x.get(j) else 0.0 for j in range(len(length))]


def _feasible(
    cosine: Mapping[int, Mapping[int, float]], x: Mapping[int, float], active: list[int], k: int
) -> tuple[dict[int, float], list[int]]:
    """From `x` towards the best values of the active ones; whoever would fall below 0 is 0 and active no more."""
    x = dict(x)
    while active:
        best = _solved(cosine, active, k)
        low = {j: x[j] / (x[j] - best[j]) if x[j] > 0 else 0.0 for j in active if best[j] <= 0}
        if not low:
            return {**x, **best}, active
        first = min(low, key=lambda j: low[j])
        x.update({j: x[j] + low[first] * (best[j] - x[j]) for j in active})
        x[first] = 0.0
        active = [j for j in active if j != first]
    return x, active


def _solved(cosine: Mapping[int, Mapping[int, float]], active: Sequence[int], k: int) -> dict[int, float]:
    """cosine x = -cosine[k] over the active ones, by Cholesky; 0 for who points where others of them do already."""
    factor: dict[int, dict[int, float]] = {}
    rest: dict[int, float] = {}
    for i in active:
        row: dict[int, float] = {}
        for j in factor:
            row[j] = fsum([cosine[i][j], *(-row[m] * factor[j][m] for m in row)]) / factor[j][j]
        pivot = fsum([cosine[i][i], *(-r * r for r in row.values())])
        if pivot > AGAINST:
            factor[i] = {**row, i: sqrt(pivot)}
            rest[i] = fsum([-cosine[i][k], *(-row[m] * rest[m] for m in row)]) / factor[i][i]
    x = dict.fromkeys(active, 0.0)
    for i in reversed(factor):
        x[i] = fsum([rest[i], *(-factor[j][i] * x[j] for j in factor if j > i)]) / factor[i][i]
    return x
