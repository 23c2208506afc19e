"""Swarm learning: FedAvg's training, merged as the plan says; more on the merges: tests/weights."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from weights import Contribution, fuse

from hsl_node.federation.fusion_rules import FUSION_RULES
from hsl_node.federation.methods import CARDS
from hsl_node.federation.names import Peer
from hsl_node.federation.plan import Plan
from hsl_node.train.methods.fedavg import FEDAVG
from hsl_node.train.methods.swarm import SWARM


def test_it_trains_as_fedavg_and_merges_by_the_plain_mean_unless_the_plan_says_otherwise():
    assert replace(SWARM, name="fedavg") == FEDAVG
    assert CARDS["swarm"].fusion == "mean" and Plan(method="swarm").rule == "mean"


@pytest.mark.parametrize(
    ("merge", "near", "far"),
    [
        ("mean", (1 / 3, 1 / 3), (1 / 3, 1000 / 3)),
        ("median", (0, 0), (0, 0)),
        ("geometric_median", (0.211325, 0.211325), (0.499423, 0.288675)),
    ],
)
def test_the_worked_example_and_what_becomes_of_it_where_one_of_three_is_far_away(merge, near, far):
    for last, expected in ((1.0, near), (1000.0, far)):
        points = ((0.0, 0.0), (1.0, 0.0), (0.0, last))
        sent = {Peer(f"p{k}"): Contribution({"w": np.array(point)}, 1) for k, point in enumerate(points)}
        assert fuse(merge, sent, {"w": np.zeros(2)})["w"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("merge", ["mean", "weighted_mean", "median", "geometric_median"])
def test_every_merge_of_the_publication_is_a_rule_that_its_plan_may_name(merge):
    assert Plan(method="swarm", fusion=merge).rule == merge
    assert not FUSION_RULES[merge].said  # nothing that its peers don't say
