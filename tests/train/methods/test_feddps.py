"""FedDpS (as assumed): what is told of a hospital's images, and which of them it then trains on.

The densities, weights and samples by hand are in tests/train/test_mixtures.py.
"""

from __future__ import annotations

from dataclasses import replace

import learning
import numpy as np
import pytest
import torch
from torch import Tensor

from hsl_node.train.hardware import prepare
from hsl_node.train.method import Learner, Start
from hsl_node.train.methods.feddps import FEATURES, FEDDPS, NAMES, features, sample
from hsl_node.train.site import initial_model
from hsl_node.train.start import new_learner


@pytest.fixture(autouse=True)
def deterministic() -> None:
    prepare(device="cpu", threads=1, precision="float32", image_size=learning.SIZE)


def learner_of(peer: str, brightness: int, *, anchor: bool = False) -> Learner:
    data = learning.dataset(60, 12, 8, seed=len(peer))
    data.images[:] = data.images // 2 + brightness
    site = learning.site(learning.small_plan(method="feddps"), data, peer)
    return new_learner(replace(site, anchor=learning.anchor(80) if anchor else None))


def told(learner: Learner) -> dict[str, Tensor]:
    """What its checkpoint of round 1 says."""
    assert sample(learner, Start(1, {})).tolist() == list(range(60)), "all, as they lie"
    return {name: learner.model.state_dict()[name].clone() for name in NAMES}


def second_round(learner: Learner, full_set: dict[str, dict[str, Tensor]]) -> np.ndarray:
    return sample(learner, Start(2, {}, samples=dict.fromkeys(full_set, 60), full_set=full_set))


@pytest.mark.parametrize("anchor", [True, False])
def test_images_like_the_other_hospitals_are_drawn_more_often(anchor: bool):
    dark, mixed = learner_of("dark", 0, anchor=anchor), learner_of("mixed", 0, anchor=anchor)
    mixed.site.dataset.images[:20] += 100  # a third of its training images are bright; all of the other's are
    bright = learner_of("bright", 100, anchor=anchor)
    whole = {learner.me: told(learner) for learner in (mixed, bright)}
    found = second_round(mixed, whole)
    assert len(found) == 60 and found.max() < 60  # as many as before, all of the training set
    assert (found < 20).mean() > 0.5 > 20 / 60
    alike = {"dark": told(dark), "other": told(dark)}
    assert second_round(dark, alike).tolist() == list(range(60))  # equal mixtures: each image once


@pytest.mark.parametrize(
    ("what", "value"), [("variance", 0.0), ("variance", -1.0), ("share", 1e9), ("share", -0.2)], ids=str
)
def test_a_peer_whose_mixture_is_no_density_is_left_out_and_named(
    what: str, value: float, caplog: pytest.LogCaptureFixture
):
    """Finite numbers, which every check of a checkpoint lets pass. All other hospitals trained on their first image
    alone, or, with shares of 1e9, on all images alike."""
    mixed, bright = learner_of("mixed", 0), learner_of("bright", 100)
    mixed.site.dataset.images[:20] += 100
    whole = {learner.me: told(learner) for learner in (mixed, bright)}
    honest = second_round(mixed, whole)
    evil = {**whole["mixed"], what: torch.full_like(whole["mixed"][what], value)}
    assert np.array_equal(second_round(mixed, {**whole, "rogue": evil}), honest)
    assert "rogue" in caplog.text


def test_the_sample_is_the_same_in_every_round_and_epoch():
    mixed, bright = learner_of("mixed", 0), learner_of("bright", 100)
    whole = {learner.me: told(learner) for learner in (mixed, bright)}
    first = second_round(mixed, whole)
    torch.manual_seed(99)
    later = sample(mixed, Start(7, {}, samples=dict.fromkeys(whole, 60), full_set=whole))
    assert later is not None and np.array_equal(first, later)
    assert FEDDPS.samples is not None
    assert all(np.array_equal(FEDDPS.samples(mixed, Start(2, {}), first, epoch), first) for epoch in (1, 2))


def test_the_own_mixture_stays_in_the_own_checkpoint_whatever_is_fused():
    mixed, bright = learner_of("mixed", 0), learner_of("bright", 100)
    whole = {learner.me: told(learner) for learner in (mixed, bright)}
    with torch.no_grad():
        mixed.model.mean.zero_()  # as if a fused model had been taken
    second_round(mixed, whole)
    for name in NAMES:
        assert torch.equal(mixed.model.state_dict()[name], whole["mixed"][name])
        assert name in FEDDPS.travels(mixed.model)


def test_the_initial_trunks_features_do_not_depend_on_what_was_learned():
    learner = learner_of("mixed", 0)
    before = features(learner)
    learner.model.load_state_dict(initial_model(learner.plan.model_copy(update={"seed": 7}), FEDDPS, None).state_dict())
    assert before.shape == (60, FEATURES) and np.array_equal(features(learner), before)


def test_validation_and_test_images_are_in_no_mixture():
    learner = learner_of("mixed", 0)
    before = told(learner)
    learner.site.dataset.images[60:] = 255
    again = told(learner)
    assert all(torch.equal(again[name], before[name]) for name in NAMES)
