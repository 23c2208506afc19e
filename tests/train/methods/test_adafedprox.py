"""AdaFedProx: the policy's gradient and rewards, what is held back, and that all peers derive the same number."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import learning
import numpy as np
import pytest
import torch
from every_method import PEERS, plan_for, sites_for
from torch import nn
from weights import Contribution, fuse

from hsl_node.federation.names import Peer
from hsl_node.study.simulate import simulate
from hsl_node.train.method import Batch, Learner, Start, Step
from hsl_node.train.methods.adafedprox import graded
from hsl_node.train.networks.policy import INPUTS, Kept, entropy, mean, new, next_round, reinforced, seen
from hsl_node.weights.checkpoint_file import read_weights

SAID = {
    "birch": {"entropy": 0.5, "epochs": 1.0, "accuracy": 0.75, "loss": 0.4, "mu": 0.0, "score": 0.8},
    "ash": {"entropy": 1.0, "epochs": 0.5, "accuracy": 0.5, "loss": 0.7, "mu": 0.0, "score": 0.6},
}


def log_density(net: tuple, state: np.ndarray, action: float) -> float:
    return -((action - mean(net, state)) ** 2) / (2 * 0.1**2)


# ---------------------------------------------------------------- what goes in


def test_the_entropy_of_the_labels_by_hand() -> None:
    """The released code has -0.405465 and -2.30259: the logarithm of class 0 alone, without the sign."""
    assert entropy(np.repeat([0, 1], [100, 50]), 2) * math.log(2) == pytest.approx(0.636514, abs=1e-6)
    assert entropy(np.repeat([0, 1], [20, 180]), 2) * math.log(2) == pytest.approx(0.325083, abs=1e-6)
    assert entropy(np.arange(6) % 3, 3) == pytest.approx(1.0)  # ln C of ln C
    assert entropy(np.zeros(4, np.int64), 2) == 0.0


def test_the_policy_sees_five_numbers_of_each_peer_in_the_order_of_their_names() -> None:
    found = seen(SAID, {"birch": 30, "ash": 10})
    assert found[:10].tolist() == [1.0, 0.25, 0.5, 0.5, 0.7, 0.5, 0.75, 1.0, 0.75, 0.4]
    assert found.shape == (INPUTS,) and not found[10:].any()


@pytest.mark.parametrize("seed", range(4))
def test_a_peer_that_says_the_largest_loss_neither_ends_the_run_of_all_nor_decides_alone(seed: int) -> None:
    """1e6 is within the card's bounds. It overflowed the policy at every peer, in each attempt at the round, or had mu
    at 0 or 1, whatever all others said."""
    honest, images = {**SAID, "cedar": SAID["ash"]}, {"birch": 30, "ash": 10, "cedar": 20}
    policy = new(INPUTS, seed)
    usual = next_round(policy, seen(honest, images), 0.7, z=0.0)
    lied = next_round(policy, seen({**honest, "cedar": {**SAID["ash"], "loss": 1e6}}, images), 0.7, z=0.0)
    assert 0.05 < lied.mu < 0.95 and abs(lied.mu - usual.mu) < 0.3
    assert mean(policy.net, np.full(INPUTS, 1e9)) in (0.0, pytest.approx(0.0), pytest.approx(1.0))  # and no overflow


# ---------------------------------------------------------------- the policy


def test_a_step_is_the_gradient_of_the_log_density() -> None:
    rng = np.random.default_rng(0)
    net, state = new(8, seed=3).net, rng.uniform(size=8)
    after = reinforced(net, state, action=0.9, advantage=1.0)
    for layer, (before, then) in enumerate(zip(net, after, strict=True)):
        for at in [(0, 0), (0, -1), (-1, 1)]:
            step = np.zeros_like(before)
            step[at] = 1e-6
            up, down = ([*net[:layer], before + sign * step, *net[layer + 1 :]] for sign in (1, -1))
            slope = (log_density(up, state, 0.9) - log_density(down, state, 0.9)) / 2e-6
            assert (then - before)[at] == pytest.approx(1e-3 * slope, rel=1e-4, abs=1e-10)


@pytest.mark.parametrize("action", [0.1, 0.9])
def test_an_action_that_was_worth_it_becomes_likelier_and_one_that_was_not_less(action: float) -> None:
    net, state = new(8, seed=3).net, np.linspace(0, 1, 8)
    before = log_density(net, state, action)
    assert log_density(reinforced(net, state, action, 0.5), state, action) > before
    assert log_density(reinforced(net, state, action, -0.5), state, action) < before
    assert mean(reinforced(net, state, action, 0.0), state) == mean(net, state)


def test_the_reward_of_an_action_is_what_its_fusion_changed_two_rounds_later() -> None:
    states = [np.full(8, x) for x in (0.1, 0.2, 0.3, 0.4)]
    policy = new(8, seed=3)
    for state, score in zip(states[:2], (0.5, 0.6), strict=True):  # of the models before the first action had an effect
        policy = next_round(policy, state, score, z=0.0)
        assert policy.net is not None and mean(policy.net, states[0]) == mean(new(8, 3).net, states[0])
    first = policy.actions[0]
    after = next_round(policy, states[2], 0.9, z=1.0)
    learnt = reinforced(policy.net, states[0], first, 0.9 - 0.6)  # the baseline is still 0
    assert all(np.array_equal(a, b) for a, b in zip(after.net, learnt, strict=True))
    assert after.baseline == pytest.approx(0.1 * 0.3)
    assert after.mu == pytest.approx(mean(after.net, states[2]) + 0.1, abs=1e-9)
    again = next_round(after, states[3], 0.8, z=0.0)
    expected = reinforced(after.net, states[1], float(after.actions[0]), (0.8 - 0.9) - 0.03)
    assert all(np.array_equal(a, b) for a, b in zip(again.net, expected, strict=True))


@pytest.mark.parametrize(("z", "mu"), [(50.0, 1.0), (-50.0, 0.0)])
def test_an_action_stays_between_0_and_1(z: float, mu: float) -> None:
    assert next_round(new(8, 1), np.zeros(8), 0.5, z).mu == mu


def test_a_model_keeps_a_policy_to_the_bit() -> None:
    policy = next_round(new(8, 1), np.linspace(0, 1, 8), 0.7, 0.3)
    kept = Kept(new(8, 2))
    kept.write(policy)
    found = kept.read()
    assert replace(found, net=policy.net, states=policy.states, actions=policy.actions) == policy
    assert all(np.array_equal(a, b) for a, b in zip(found.net, policy.net, strict=True))
    assert found.mu == policy.mu and np.array_equal(found.states, policy.states)


# ---------------------------------------------------------------- what is fused


@pytest.mark.parametrize(("mu", "expected"), [(0.25, [1.5, 0.75]), (0.0, [2.0, 1.0]), (1.0, [0.0, 0.0])])
def test_the_mean_is_held_back_by_mu(mu: float, expected: list[float]) -> None:
    """1 leaves the base as it was, 0 is the mean; the released code passes neither."""
    sent = {"ash": [1.0, 2.0], "birch": [3.0, 0.0]}
    peers = {Peer(p): Contribution({"w": np.array(w, np.float32)}, 10, {"mu": mu}) for p, w in sent.items()}
    assert fuse("interpolated", peers, {"w": np.zeros(2, np.float32)})["w"].tolist() == expected


def test_all_peers_derive_the_same_policy_and_it_never_travels(tmp_path: Path) -> None:
    plan = plan_for("adafedprox", rounds=4, epochs_per_round=1)
    rounds = list(simulate(sites_for(plan), tmp_path))
    said = [{peer: best.said for peer, best in done.best.items()} for done in rounds[1:]]
    for number, told in enumerate(said, 1):
        assert len({numbers["mu"] for numbers in told.values()}) == 1
        assert (told[PEERS[0]]["mu"] == 0) is (number == 1)
    assert len({told[PEERS[0]]["mu"] for told in said}) == 4, "the policy acts anew in each round"
    own = [read_weights(rounds[-1].own[peer]) for peer in PEERS]
    names = [name for name in own[0] if name.startswith("policy.") and name != "policy.here"]
    assert len(names) == 6 and all(own[0][n].tobytes() == o[n].tobytes() for o in own[1:] for n in names)
    assert not any(name.startswith("policy.") for name in read_weights(rounds[-1].sent[PEERS[0]]))
    assert not np.array_equal(own[0]["policy.weight2"], new(INPUTS, plan.seed).net[2]), "it has learnt"


def test_accuracy_stands_beside_the_loss_without_a_gradient() -> None:
    """Two of three images are called by their class: the sum of the terms has the loss's gradient alone."""
    site = learning.site(plan_for("adafedprox"))
    answers = torch.tensor([[2.0], [-1.0], [0.5]], requires_grad=True)
    network = replace(site.method.network, ask=lambda model, image, reference: answers)
    batch = Batch(torch.zeros(3, 3, 1, 1), torch.tensor([1, 1, 1]), np.arange(3))
    site = replace(site, method=replace(site.method, network=network))
    terms = graded(Step(Learner(site, nn.Module(), {}), batch, Start(1, {}), None, {}, 1.0, 1, 1))
    assert terms["accuracy"].item() == pytest.approx(2 / 3) and not terms["accuracy"].requires_grad
    (whole,) = torch.autograd.grad(sum(terms.values()), answers, retain_graph=True)
    (alone,) = torch.autograd.grad(terms["primary"], answers)
    assert torch.equal(whole, alone)
