"""How much, and in which direction, each peer's update pulls a fusion; and which of these numbers are not usual. Pure.

An update is a checkpoint minus the fused model that the round began with. Pure numpy: fed with the chunks that
`fuse_files` reads anyway, it keeps a table of inner products for each part of the model, so memory doesn't grow with
the tensors. A *part* is what stands before the first dot of a tensor's name: encoder, tower_anchor, ...

It changes no byte of a fusion and can't prove anything: small or well-aimed poison looks like an unusual hospital, and
the other way round. The limits were measured on HSL federations of phantoms, 2 to 5 unlike hospitals, honest and not.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hsl_node.federation.names import Peer, Round

if TYPE_CHECKING:
    from hsl_node.weights.checkpoint_file import Array

# Honest norms differ by the hospital's size, by the epoch that was its best and by the learning rate then: up to 16
# times the others' median of one round, but only 2.4 times their median over some rounds.
NORM_LIMIT = 6.0
ROUNDS_BACK = 4  # earlier rounds whose norms count as usual; norms shrink as training goes on
# Of the whole update: honest ones were 0.49 and more, with the sign flipped -0.5 and less.
OPPOSITE_COSINE = -0.2
AGREEING_COSINE = 0.2  # the others among each other; where they don't agree, nobody can be against them
# A label-flipped peer still learns the anchor task: only parts of its update turn against the others, and stay so. Of
# honest small hospitals, which learn noise, the gates and towers, a few numbers each, turn for many rounds (cosines
# down to -0.99), large parts for two at most. Simulated, three hospitals, 120 rounds, labels half noise: 3 false alarms
# by the rule before (two parts of any size, two rounds in a row), none by this one, which names a flipped one in round
# 3 to 5 (the rule before: 4, 5, 6 or never). Among two nobody can be the odd one.
PART_SHARE = 0.2  # of the norm of the peer's whole update: a smaller part does not count
OPPOSED_ROUNDS = 3  # in a row
OPPOSED_PEERS_MIN = 3
STATISTICS = ("running_mean", "running_var")  # BatchNorm's
SHARE_LIMIT = 0.5  # of all images: beyond it a weighted mean is one peer's word
SHARE_PEERS_MIN = 3  # of two peers one always has half or more
CHANGE_LIMIT = 2.0  # times as many images as the round before, or as few: data come in batches, seldom such ones
BLOCK = 32 * 1024  # elements: a block of every peer fits the processor's cache, three times as fast as whole chunks

Table = NDArray[np.float64]  # (peers, peers) inner products of updates


@dataclass(frozen=True)
class Figures:
    """One peer's update in one round."""

    norm: float  # of the parameters' update
    statistics: float  # norm of BatchNorm's running statistics' update
    cosine: float | None  # of the parameters' update with the mean update of the others
    agreement: float  # the smallest such cosine between two of the others; 1 where there is only one other
    opposed: tuple[tuple[str, float], ...]  # large parts against the others, who agree there, and the cosine


class Influence:
    """Watches one fusion. BatchNorm's running statistics are kept apart, and only their norm is judged: they say how
    bright a hospital's images are, so honest ones point in opposite directions (cosines down to -0.24 were seen).

    A tensor of no layer, without a dot in its name, is what a method sends beside weights (FedDpS's mixtures, FedDP's
    heads), far from everybody else's in each round and no update: it is watched where there is nothing else (FedKTL).
    """

    def __init__(self, peers: Sequence[Peer]) -> None:
        """`peers` sorted."""
        self.peers = tuple(peers)
        nothing = np.zeros((len(peers), len(peers)))
        self._statistics: Table = nothing
        self._parts: defaultdict[str, Table] = defaultdict(nothing.copy)
        self._beside: defaultdict[str, Table] = defaultdict(nothing.copy)

    def see(self, tensor: str, base: Array, chunks: Sequence[Array]) -> None:
        """The same chunk of a tensor: in the model that the round began with, and of every peer."""
        if base.dtype.kind != "f":
            return
        products = np.zeros((len(chunks), len(chunks)))
        for at in range(0, len(base), BLOCK):
            products += _products([chunk[at : at + BLOCK] for chunk in chunks], base[at : at + BLOCK])
        part, _, name = tensor.partition(".")
        if name.rpartition(".")[2] in STATISTICS:
            self._statistics = self._statistics + products
        else:
            (self._parts if name else self._beside)[part] += products

    @np.errstate(over="ignore", invalid="ignore", divide="ignore")
    def figures(self) -> dict[Peer, Figures]:
        parts = self._parts or self._beside
        whole = sum(parts.values(), np.zeros_like(self._statistics))
        found = {}
        for i, peer in enumerate(self.peers):
            least = PART_SHARE * _norm(whole, i)
            large = {name: t for name, t in parts.items() if _norm(t, i) >= least}
            cosines = {name: _cosine(t, i) for name, t in large.items() if _agreement(t, i) > AGREEING_COSINE}
            found[peer] = Figures(
                norm=_norm(whole, i),
                statistics=_norm(self._statistics, i),
                cosine=_cosine(whole, i),
                agreement=_agreement(whole, i),
                opposed=tuple((n, c) for n, c in sorted(cosines.items()) if c is not None and c < 0),
            )
        return found


def unusual(now: Mapping[Peer, Figures], before: Sequence[Mapping[Peer, Figures]]) -> dict[Peer, str]:
    """Whose update is not usual, and by which numbers; `before`: earlier rounds, newest last."""
    rounds = [*before[-ROUNDS_BACK:], now]
    found = {}
    for peer, its in now.items():
        says = []
        for what, key in (("update", "norm"), ("update of the normalisation statistics", "statistics")):
            usual = float(np.median([getattr(f, key) for r in rounds for p, f in r.items() if p != peer]))
            mine = getattr(its, key)
            if mine > NORM_LIMIT * usual:
                says.append(f"its {what} has norm {mine:.3g}, the others' median is {usual:.3g}")
        lately = [r[peer] for r in rounds[-OPPOSED_ROUNDS:] if peer in r]
        if len(now) < OPPOSED_PEERS_MIN:
            pass
        elif its.cosine is not None and its.cosine < OPPOSITE_COSINE and its.agreement > AGREEING_COSINE:
            says.append(f"its update points against the others', cosine {its.cosine:.2f}")
        elif len(lately) == OPPOSED_ROUNDS and all(f.opposed for f in lately):
            parts = ", ".join(f"{name} {cosine:.2f}" for name, cosine in its.opposed)
            says.append(f"for {OPPOSED_ROUNDS} rounds parts of its update point against the others', cosine {parts}")
        if says:
            found[peer] = "; ".join(says)
    return found


def largest_share(now: Mapping[Peer, int]) -> dict[Peer, str]:
    """Who has more than half of the training images, where peers count by them, and so most of the fused model.

    Nobody can check such a number: it is what a peer says of itself.
    """
    total = sum(now.values())
    return {
        peer: f"it counts {count:,} of {total:,} images, {100 * count / total:.3g} % of the fused model"
        for peer, count in now.items()
        if len(now) >= SHARE_PEERS_MIN and count > SHARE_LIMIT * total
    }


def largest_weight(weights: Mapping[Peer, float], said: Mapping[Peer, Mapping[str, float]]) -> dict[Peer, str]:
    """As `largest_share`, where the weight of each in the fusion follows from signed numbers."""
    total = sum(abs(weight) for weight in weights.values())
    told = {peer: ", ".join(f"{name} {value:,.6g}" for name, value in said[peer].items()) for peer in weights}
    return {
        peer: f"by what it says of itself ({told[peer]}) it is {100 * abs(weight) / total:.3g} % of the fused model"
        for peer, weight in weights.items()
        if len(weights) >= SHARE_PEERS_MIN and abs(weight) > SHARE_LIMIT * total
    }


def changed_numbers(
    now: Mapping[Peer, Mapping[str, float]],
    before: Mapping[Peer, Mapping[str, float]],
    round: Round,
    limit: float = CHANGE_LIMIT,
) -> dict[Peer, str]:
    """Whose signed numbers, by which a fusion counts, are quite others in `round` (`now`) than in the one `before`."""
    found = {}
    for peer, numbers in now.items():
        pairs = {name: (before.get(peer, {}).get(name, value), value) for name, value in numbers.items()}
        told = [
            f"it said {name} {last:,.6g} in round {round - 1} and {value:,.6g} in round {round}"
            for name, (last, value) in pairs.items()
            if max(abs(last), abs(value)) > limit * min(abs(last), abs(value))
        ]
        if told:
            found[peer] = "; ".join(told)
    return found


def changed_counts(now: Mapping[Peer, int], before: Mapping[Peer, int], round: Round) -> dict[Peer, str]:
    """Whose number of training images is quite another in `round` (`now`) than in the one `before`."""
    return {
        peer: f"it said {last:,} images in round {round - 1} and {count:,} in round {round}"
        for peer, count in now.items()
        if max(count, last := before.get(peer, count)) > CHANGE_LIMIT * min(count, last)
    }


@np.errstate(over="ignore", invalid="ignore")
def _products(rows: Sequence[Array], base: Array) -> Table:
    """Of the updates of one block. One product of a matrix and a row at a time: so few rows are no work for a product
    of matrices."""
    updates = np.empty((len(rows), len(base)), np.promote_types(base.dtype, np.float32))
    for update, row in zip(updates, rows, strict=True):
        np.subtract(row, base, out=update)
    products = np.zeros((len(rows), len(rows)))
    for i in range(len(rows)):
        products[i, : i + 1] = updates[: i + 1] @ updates[i]
    if not np.isfinite(products).all():  # a huge update: no float32 overflows in float64
        wide = np.stack(rows).astype(np.float64) - base
        return wide @ wide.T
    return products + np.tril(products, -1).T


def _norm(table: Table, i: int) -> float:
    """Finite: what overflows float64 is as good as the largest number."""
    return float(np.nan_to_num(np.sqrt(table[i, i]), nan=np.finfo(float).max))


def _cosine(table: Table, i: int) -> float | None:
    """Of peer i's update with the sum of the others'; None where one of the two is zero, or not finite."""
    along = table[i].sum() - table[i, i]
    others = table.sum() - 2 * table[i].sum() + table[i, i]
    length = np.sqrt(table[i, i]) * np.sqrt(np.maximum(others, 0.0))
    return float(np.clip(along / length, -1, 1)) if 0 < length < np.inf else None


def _agreement(table: Table, i: int) -> float:
    """The smallest cosine between two of the others; 1 where there is only one other."""
    others = np.delete(np.delete(table, i, 0), i, 1)
    norms = np.sqrt(np.diag(others))
    cosines = others / np.outer(norms, norms)
    pairs = cosines[np.triu_indices(len(norms), 1)]
    return float(np.nan_to_num(pairs, nan=-1.0).min(initial=1.0))
