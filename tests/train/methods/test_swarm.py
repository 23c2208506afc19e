"""Swarm learning: FedAvg's training, merged as the plan says; the merges themselves: tests/weights."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hsl_node.federation.fusion_rules import FUSION_RULES
from hsl_node.federation.methods import CARDS
from hsl_node.federation.plan import Plan
from hsl_node.train.methods.fedavg import FEDAVG
from hsl_node.train.methods.swarm import SWARM


def test_it_trains_as_fedavg_and_merges_by_the_plain_mean_unless_the_plan_says_otherwise():
    assert replace(SWARM, name="fedavg") == FEDAVG
    assert CARDS["swarm"].fusion == "mean" and Plan(method="swarm").rule == "mean"


@pytest.mark.parametrize("merge", ["mean", "weighted_mean", "median", "geometric_median"])
def test_every_merge_of_the_publication_is_a_rule_that_its_plan_may_name(merge):
    assert Plan(method="swarm", fusion=merge).rule == merge
    assert not FUSION_RULES[merge].said  # nothing that its peers don't say
