"""AdaFedProx's policy: a small net that sees everybody's numbers and says how far to hold the mean back.

Numpy in float64, without BLAS: every peer must get the same digits, on any processor. The last column of a weight
matrix are its biases. N numbers of all peers go in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from hsl_node.federation.config import PEERS_MAX
from hsl_node.train.networks.initial import stream

Array = NDArray[np.float64]
Net = tuple[Array, Array, Array]

NUMBERS = ("entropy", "share", "epochs", "accuracy", "loss")  # of each peer, peers in the order of their names
INPUTS = PEERS_MAX * len(NUMBERS)
HIDDEN = (128, 64)  # as released
RATE = 1e-3
SPREAD = 0.1  # of the action around the policy's mean
KEPT = 0.9  # of the baseline, each round
WORST = 10.0  # of a loss: one that knows nothing has ln C. A peer says up to 1e6, and would drown all other numbers
STEEP = 700.0  # of a logit: exp overflows at 710, and the mean is 0 or 1 long before
UNDEFINED = 0.5  # stands for a score that a hospital cannot have, as with one class alone
DIGITS = 9  # of an action: what a libm's last bit changes is rounded off


@dataclass(frozen=True)
class Policy:
    """And what it must remember until the reward of an action is known, two rounds later."""

    net: Net
    states: Array  # (2, N) of the last two actions, the older first
    actions: Array  # (2,)
    pending: int = 0  # how many of them there are
    score: float = 0.0  # of the fused model, the last that was told
    baseline: float = 0.0

    @property
    def mu(self) -> float:
        return float(self.actions[1])


def entropy(labels: NDArray[np.int64], classes: int) -> float:
    """Of the shares of the labels, over its largest value, ln C."""
    shares = (np.bincount(labels, minlength=classes) / len(labels)).tolist()
    return min(1.0, max(0.0, -math.fsum(p * math.log(p) for p in shares if p > 0) / math.log(classes)))


def seen(said: Mapping[str, Mapping[str, float]], samples: Mapping[str, int]) -> Array:
    """What the policy sees of a round, (N,); 0 where there is no peer."""
    images, state = sum(samples.values()), np.zeros((PEERS_MAX, len(NUMBERS)))
    for row, peer in zip(state, sorted(said), strict=False):
        told = {**said[peer], "share": samples[peer] / images, "loss": min(said[peer]["loss"], WORST)}
        row[:] = [told[name] for name in NUMBERS]
    return state.ravel()


def new(inputs: int, seed: int) -> Policy:
    """First weights as torch's linear layers have them, from the plan's seed."""
    widths = (inputs, *HIDDEN, 1)
    net = [
        stream(seed, f"policy.{n}").uniform(-1, 1, (out, into + 1)) / math.sqrt(into)
        for n, (into, out) in enumerate(pairwise(widths))
    ]
    return Policy((net[0], net[1], net[2]), np.zeros((2, inputs)), np.zeros(2))


def mean(net: Net, state: Array) -> float:
    """The action in the middle, in (0, 1)."""
    return _forward(net, state)[-1]


def next_round(policy: Policy, state: Array, score: float, z: float) -> Policy:
    """Learn from the reward that `score` tells of, then act: clip(mean + 0.1 z, 0, 1).

    `score` is the fused model's before this round's; that of the action before last, which made it, is known now.
    """
    net, baseline = policy.net, policy.baseline
    if policy.pending == 2:
        reward = score - policy.score
        net = reinforced(net, policy.states[0], float(policy.actions[0]), reward - baseline)
        baseline = KEPT * baseline + (1 - KEPT) * reward
    action = round(min(1.0, max(0.0, mean(net, state) + SPREAD * z)), DIGITS)
    return replace(
        policy,
        net=net,
        states=np.stack([policy.states[1], state]),
        actions=np.array([policy.actions[1], action]),
        pending=min(policy.pending + 1, 2),
        score=score,
        baseline=baseline,
    )


def reinforced(net: Net, state: Array, action: float, advantage: float) -> Net:
    """One step of REINFORCE: theta + rate * advantage * gradient of log N(action; mean, 0.1^2)."""
    x0, x1, x2, m = _forward(net, state)
    out = np.array([(action - m) / SPREAD**2 * m * (1 - m)])  # d log / d logit
    gradients = []
    for weight, into in zip(reversed(net), (x2, x1, x0), strict=True):
        gradients.append(out[:, None] * into)
        out = np.add.reduce(weight[:, :-1] * out[:, None], axis=0) * (into[:-1] > 0)
    return tuple(w + RATE * advantage * g for w, g in zip(net, reversed(gradients), strict=True))  # type: ignore[return-value]


def _forward(net: Net, state: Array) -> tuple[Array, Array, Array, float]:
    """What goes into each layer, with a 1 for its biases, and the mean."""
    x0 = np.append(state, 1.0)
    x1 = np.append(np.maximum(np.add.reduce(net[0] * x0, axis=1), 0), 1.0)
    x2 = np.append(np.maximum(np.add.reduce(net[1] * x1, axis=1), 0), 1.0)
    logit = float(np.add.reduce(net[2] * x2, axis=1)[0])
    return x0, x1, x2, 1 / (1 + math.exp(-max(-STEEP, logit)))


class Kept(nn.Module):
    """A policy as buffers of a model, so that a checkpoint of all tensors holds it and no optimizer moves it."""

    here: torch.Tensor

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        for name, array in self._arrays(policy).items():
            self.register_buffer(name, torch.from_numpy(array.copy()))
        self.register_buffer("here", torch.full((1,), UNDEFINED, dtype=torch.float64))  # the fused model's score here

    def read(self) -> Policy:
        a = {name: buffer.cpu().numpy().copy() for name, buffer in self.named_buffers()}
        pending, score, baseline = a["facts"].tolist()
        net = (a["weight0"], a["weight1"], a["weight2"])
        return Policy(net, a["states"], a["actions"], int(pending), score, baseline)

    def write(self, policy: Policy) -> None:
        for name, array in self._arrays(policy).items():
            self.get_buffer(name).copy_(torch.from_numpy(array))

    @staticmethod
    def _arrays(policy: Policy) -> dict[str, Array]:
        facts = np.array([policy.pending, policy.score, policy.baseline])
        weights = {f"weight{n}": weight for n, weight in enumerate(policy.net)}
        return {**weights, "states": policy.states, "actions": policy.actions, "facts": facts}
