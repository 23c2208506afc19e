"""FedCOME: FedAvg's training. The fusion is what is its own, and its numbers: tests/weights/test_combinations.py."""

from __future__ import annotations

from dataclasses import replace

from hsl_node.federation.plan import Plan
from hsl_node.train.methods.fedavg import FEDAVG
from hsl_node.train.methods.fedcome import FEDCOME


def test_it_trains_as_fedavg_and_fuses_without_conflict_and_without_a_clip():
    plan = Plan(method="fedcome")
    assert replace(FEDCOME, name="fedavg") == FEDAVG
    assert (plan.rule, plan.settings, plan.fusion_clip) == ("come", {"clip": 0.0}, 0.0)
    assert Plan(method="fedcome", settings={"clip": 0.005}).fusion_clip == 0.005
    assert Plan(method="fedcome", settings={"clip": 0.005}, fusion="mean").fusion_clip == 0.0
