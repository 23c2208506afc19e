"""Every learning method that has code, with a plan in which it is small and fast."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec

import learning

from hsl_node.federation.methods import CARDS, Need
from hsl_node.federation.names import Peer
from hsl_node.federation.plan import Plan
from hsl_node.train.bundle import Card, Computed
from hsl_node.train.data.preprocessing import Preprocessing
from hsl_node.train.method import Site

PEERS = tuple(map(Peer, ("ash", "birch", "cedar")))
SIZES = {"ash": 24, "birch": 16, "cedar": 18}  # training images: unlike, so that weights show


SMALL: Mapping[str, Mapping[str, object]] = {
    "fedppkt": {"teacher_epochs": 2, "images": 8, "pool": 16, "distillations": 1, "refinements": 1},
    "fedtp": {"hidden": 2},
}
IDLE_FIRST_ROUND = {"fedppkt"}  # it trains what stays; test_fedppkt.py looks at the second


def runnable() -> list[str]:
    """Methods of a federation, by name; one whose torch half is not written yet is left out."""
    return [
        name
        for name, card in CARDS.items()
        if not card.simulation_only and find_spec(card.code.partition(":")[0]) is not None
    ]


def plan_for(name: str, **changes: object) -> Plan:
    card = CARDS[name]
    settings: dict[str, object] = {"method": name, "epochs_per_round": 2, "plateau_rounds": 100}
    if card.optimizer:
        settings["optimizer"] = card.optimizer
    if Need.TRANSFORMER in card.needs:
        settings["backbone"] = "vit_tiny"
    if name in SMALL:
        settings[name] = SMALL[name]
    return learning.small_plan(**{**settings, **changes})


def card_of(plan: Plan) -> Card:
    """Of a model that is taken away."""
    return Card(
        classes=plan.classes,
        decision=None,
        preprocessing=Preprocessing.of(plan),
        plan=plan,
        hardware=Computed(**learning.CPU.facts, processor="any"),
        round=1,
        source_weights_sha256="0" * 64,
    )


def sites_for(plan: Plan) -> Mapping[Peer, Site]:
    return {
        peer: learning.site(plan, learning.dataset(SIZES[peer], 8, 4, seed=n), peer) for n, peer in enumerate(PEERS)
    }
