"""The fusion rules that a plan may name. Without numpy: the command line's help reads it. Pure.

The only list of them: configuration, help, docs/researcher/plan.md and tests are fed from it or compared with it. The
arithmetic of a rule is in `weights/`, under the same name: in `RULES` of `fusion.py` where each number of the result
hangs on the same number of every peer alone, in `COMBINATIONS` of `combinations.py` where each peer has a coefficient.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

ROBUST_PEERS_MIN = 3  # with two, median and trimmed mean are the mean: there is no majority to side with


@dataclass(frozen=True)
class FusionRule:
    does: str  # in a line
    robust: bool  # whatever a minority sends, the result stays near the others
    peers_min: int = 1
    by_images: bool = False  # peers count by the number of training images that each says of itself
    said: tuple[str, ...] = ()  # and by these signed numbers: the method must be one that says them
    needs_base: bool = False  # reads the fused model that the round began with
    measures: bool = False  # how whole checkpoints lie to each other

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
    "geometric_median": FusionRule(
        "the model with the least sum of distances to all", True, ROBUST_PEERS_MIN, needs_base=True, measures=True
    ),
    "nova": FusionRule(
        "the mean step of each peer, by its images, as far as all together went (FedNova)",
        robust=False,
        by_images=True,
        said=("steps",),
        needs_base=True,
    ),
    "come": FusionRule(
        "peers count by their images; what one peer's update takes from another's is left out (FedCOME)",
        robust=False,
        by_images=True,
        needs_base=True,
        measures=True,
    ),
    "entropy_weighted": FusionRule(
        "peers count by how even their classes are (FedDyS)", robust=False, said=("evenness",)
    ),
    "interpolated": FusionRule(
        "the mean, held back towards the fused model before by the peers' own number (AdaFedProx)",
        robust=False,
        said=("mu",),
        needs_base=True,
    ),
}
