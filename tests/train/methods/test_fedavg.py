"""FedAvg: the worked numbers of its sum, buffers included, and what a plain mean or a mean of parameters would miss."""

from __future__ import annotations

import numpy as np
import pytest
from weights import Contribution, fuse

from hsl_node.federation.names import Peer
from hsl_node.federation.plan import Plan

RULE = Plan(method="fedavg").rule
SENT = (  # images, weights, BatchNorm's mean and its counter
    (10, (1.0, -2.0), 0.0, 7),
    (30, (2.0, 0.0), 1.0, 3),
    (60, (4.0, 1.0), 3.0, 5),
)


def peers(*sent: tuple[int, tuple[float, ...], float, int]) -> dict[Peer, Contribution]:
    return {
        Peer(f"p{k}"): Contribution(
            {"fc.weight": np.array(w), "bn.running_mean": np.array([mean]), "bn.num_batches_tracked": np.array(count)},
            images,
        )
        for k, (images, w, mean, count) in enumerate(sent)
    }


def test_the_worked_example_buffers_too() -> None:
    """Not: every peer the same (2.33333, -0.333333), nor a mean of two and then of that and the third (2.75, 0)."""
    fused = fuse(RULE, peers(*SENT))
    assert fused["fc.weight"] == pytest.approx([3.1, 0.4]) and fused["bn.running_mean"] == pytest.approx([2.1])
    assert fused["bn.num_batches_tracked"] == 7
    assert fuse("mean", peers(*SENT))["fc.weight"] == pytest.approx([7 / 3, -1 / 3])


def test_what_all_have_more_the_sum_has_more() -> None:
    more = [(n, (w[0] + 5, w[1] - 3), mean + 1, count) for n, w, mean, count in SENT]
    fused = fuse(RULE, peers(*more))
    assert fused["fc.weight"] == pytest.approx([8.1, -2.6]) and fused["bn.running_mean"] == pytest.approx([3.1])


def test_a_hospital_in_two_halves_counts_as_before() -> None:
    first, second, (n, w, mean, count) = SENT
    half = (n // 2, w, mean, count)
    halves = fuse(RULE, peers(first, second, half, half))
    assert halves["fc.weight"] == pytest.approx([3.1, 0.4])


def test_a_difference_of_batchnorm_alone_shows() -> None:
    (n, w, _, count), *others = SENT
    assert fuse(RULE, peers((n, w, 10.0, count), *others))["bn.running_mean"] == pytest.approx([3.1])
