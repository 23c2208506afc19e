"""The fusion rules that a plan may name. Without numpy: the command line's help reads it. Pure.

The only list of them: configuration, help, docs/researcher/plan.md and tests are fed from it or compared with it. The
arithmetic of a rule is the function of the same name in `fusion.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

ROBUST_PEERS_MIN = 3  # with two, median and trimmed mean are the mean: there is no majority to side with


@dataclass(frozen=True)
class FusionRule:
    does: str  # in a line
    robust: bool  # a minority, whatever it sends, moves a coordinate no further than the others' range
    peers_min: int = 1
    by_images: bool = False  # peers count by what each says of itself

    @property
    def line(self) -> str:
        return self.does + (f" (robust, from {self.peers_min} peers on)" if self.robust else "")


FUSION_RULES: Mapping[str, FusionRule] = {
    "mean": FusionRule("every peer counts the same", robust=False),
    "weighted_mean": FusionRule(
        "peers count by their training images, which each counts for itself", robust=False, by_images=True
    ),
    "trimmed_mean": FusionRule("the mean without the smallest and largest fifth", True, ROBUST_PEERS_MIN),
    "median": FusionRule("the middle value", True, ROBUST_PEERS_MIN),
}
