"""No step waits for a GPU: on torch's device "meta" tensors have no values, and whatever asks for one raises."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from every_method import PEERS, plan_for, runnable, sites_for

from hsl_node.federation.plan import Augment
from hsl_node.train import loop
from hsl_node.train.augment import draw
from hsl_node.train.method import Start
from hsl_node.train.start import Training, new_learner

WAIT = {
    "frozen": "features are looked up by the bytes of each image",
    "fedppkt": "its phase and how full its pool is are tensors of the checkpoint",
}


def take_a_step(method: str) -> None:
    site = sites_for(plan_for(method))[PEERS[0]]
    sgd = replace(site.method, optimizers=lambda model, plan: {"main": torch.optim.SGD(model.parameters(), 0.1)})
    site = replace(site, method=sgd, hardware=replace(site.hardware, device=torch.device("meta")))
    learner = new_learner(site)
    learner.model.train()
    state = learner.model.state_dict()
    training = Training(learner, Start(1, {name: state[name].clone() for name in site.method.travels(learner.model)}))
    where = np.arange(6)
    anchors = where if site.anchor and site.method.network.reference else where[:0]
    batch = loop._batch(training, where, anchors, draw(Augment(), np.random.default_rng(0), len(where)))
    for update in site.method.passes:
        update(training.step(batch, {}, 1.0, 1))


@pytest.mark.parametrize("method", [name for name in runnable() if name not in WAIT])
def test_a_step_of_the_first_round_asks_no_tensor_for_its_value(method: str) -> None:
    take_a_step(method)


@pytest.mark.parametrize("method", WAIT)
def test_the_two_that_do_wait_are_noticed(method: str) -> None:
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        take_a_step(method)
