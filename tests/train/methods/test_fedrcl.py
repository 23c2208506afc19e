"""FedRCL: both terms by hand, and what must hold of them."""

from __future__ import annotations

import math
from typing import Any

import learning
import pytest
import torch
import torch.nn.functional as F
from steps import batch_of, step_of
from torch import Tensor, nn

from hsl_node.errors import ConfigError
from hsl_node.train.methods.fedrcl import FEDRCL, UNLIKE, contrast, relaxation, relaxed_contrastive
from hsl_node.train.start import new_learner

FEATURE = torch.tensor([[1, 0], [0.9, 0.1], [0, 1], [0.6, 0.8], [0.8, 0.6]], dtype=torch.float64)
LABEL = torch.tensor([0, 0, 1, 1, 2])
TAU, SIMILAR = 0.05, 0.7


def likeness(feature: Tensor) -> Tensor:
    unit = F.normalize(feature)
    return unit @ unit.T


class Stages(nn.Module):
    """A network whose one stage is its parameter: (B, C, 1, 1)."""

    def __init__(self, feature: Tensor) -> None:
        super().__init__()
        self.feature = nn.Parameter(feature.clone())

    def with_stages(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        return self.feature.sum(dim=1, keepdim=True), [self.feature[:, :, None, None]]


def rcl(**settings: float) -> Any:
    return learning.site(learning.small_plan(method="fedrcl", fedrcl=settings))


# ---------------------------------------------------------------- worked numbers: METHODS, FedRCL, point 8


def test_both_terms_of_five_images_by_hand():
    s = likeness(FEATURE)
    pull, push = contrast(s, LABEL, TAU), relaxation(s, LABEL, TAU, SIMILAR)
    assert pull.tolist() == pytest.approx([0.0208589, 0.0701675, 0.0181509, 3.24385, 0.413316], rel=2e-5)
    assert pull.mean().item() == pytest.approx(0.753268, rel=1e-5)
    assert push.tolist() == pytest.approx([0.633854, 0.633854, 0.0181499, 0.0181499, 0], rel=1e-5, abs=1e-12)
    assert push.mean().item() == pytest.approx(0.260801, rel=1e-5)


# ---------------------------------------------------------------- the contrast


def test_a_batch_of_one_class_pulls_nothing_and_has_gradients():
    feature = FEATURE.clone().requires_grad_()
    found = contrast(likeness(feature), torch.zeros(5, dtype=torch.int64), TAU)
    found.sum().backward()
    assert found.tolist() == [0] * 5 and feature.grad is not None and bool(torch.isfinite(feature.grad).all())


def test_the_contrast_falls_when_an_outlier_of_the_class_comes_closer():
    """By the least similar image of the class: a sum over all of them, or the most similar one, would hardly move."""
    others = [[1.0, 0.0], [0.95, 0.05], [0.0, 1.0], [0.1, 0.9]]
    label = torch.tensor([0, 0, 1, 1, 0])
    found = [
        contrast(likeness(torch.tensor([*others, [math.cos(a), math.sin(a)]])), label, TAU)[0].item()
        for a in (1.5, 1.4, 1.2)
    ]
    assert found[0] > 2 * found[1] > 4 * found[2] > 0


def test_only_the_two_most_similar_images_of_other_classes_count():
    label = torch.tensor([0, 0, 1, 1, 1])
    near = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.9, 0.4], [0.8, 0.6], [0.0, 1.0]])
    moved = near.clone()
    moved[4] = torch.tensor([-1.0, 0.2])  # the third: even further away
    assert contrast(likeness(near), label, TAU)[0] == contrast(likeness(moved), label, TAU)[0]


# ---------------------------------------------------------------- the relaxation


def test_identical_images_of_a_class_are_pushed_by_log_two_and_unlike_ones_not_at_all():
    label = torch.tensor([0, 0, 1, 1])
    same = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [math.sin(0.8), math.cos(0.8)]], dtype=torch.float64)
    found = relaxation(likeness(same), label, TAU, SIMILAR)
    assert found[:2].tolist() == pytest.approx([math.log(2)] * 2, rel=1e-12)
    assert math.cos(0.8) < SIMILAR and bool((found[2:] < 1e-14).all())


def test_the_least_similar_pair_of_a_class_says_whether_it_has_collapsed():
    """Not the most similar one: images 0 and 2 have a twin in their class, and one that is unlike them."""
    s = torch.tensor([[1.0, 0.99, 0.5], [0.99, 1.0, 0.99], [0.5, 0.99, 1.0]], dtype=torch.float64)
    found = relaxation(s, torch.zeros(3, dtype=torch.int64), TAU, SIMILAR)
    assert bool((found[[0, 2]] < 1e-14).all()) and found[1].item() == pytest.approx(math.log1p(math.exp(-0.01 / TAU)))


def test_an_image_alone_in_its_class_is_not_pushed():
    found = relaxation(likeness(FEATURE), torch.arange(5), TAU, SIMILAR)
    assert found.tolist() == pytest.approx([math.log1p(math.exp((UNLIKE - 1) / TAU))] * 5)


# ---------------------------------------------------------------- the step


def test_the_length_of_features_does_not_matter():
    batch = batch_of(5)
    batch = type(batch)(batch.image, LABEL % 2, batch.where)
    one, other = (
        relaxed_contrastive(step_of(Stages(FEATURE.float() * by), site=rcl(), batch=batch)) for by in (1.0, 1000.0)
    )
    for name in ("contrast", "relaxation"):
        torch.testing.assert_close(one[name], other[name])
    assert one["primary"] != other["primary"]


def test_its_weights_are_settings():
    batch = batch_of(5)
    plain, heavy = (
        relaxed_contrastive(step_of(Stages(FEATURE.float()), site=rcl(**weights), batch=batch))
        for weights in ({}, {"contrast": 3.0, "relaxation": 0.0})
    )
    torch.testing.assert_close(heavy["contrast"], 3 * plain["contrast"])
    assert heavy["relaxation"] == 0 and heavy["primary"] == plain["primary"]


def test_every_stage_counts_before_its_relu_and_the_fused_model_does_not():
    site = rcl()
    learner = new_learner(site)
    batch = batch_of(8, site)
    with torch.no_grad():
        _, stages = learner.model.eval().with_stages(batch.image)  # type: ignore[operator]
    assert len(stages) == 3  # tiny's stem and its two blocks
    assert all(bool((stage < 0).any()) for stage in stages)
    other = {name: torch.zeros_like(tensor) for name, tensor in learner.model.state_dict().items()}
    one, two = (
        relaxed_contrastive(step_of(learner.model.eval(), site=site, batch=batch, fused=f)) for f in (None, other)
    )
    assert all(torch.equal(one[name], two[name]) for name in one)
    expected = [contrast(likeness(stage.mean(dim=(2, 3))), batch.target, TAU).mean() for stage in stages]
    torch.testing.assert_close(one["contrast"], torch.stack(expected).mean())


def test_a_trunk_whose_stages_nobody_knows_is_refused_before_training():
    with pytest.raises(ConfigError, match="those of torchvision:squeezenet1_1 are not known") as refusal:
        FEDRCL.network.build(rcl().plan.model_copy(update={"backbone": "torchvision:squeezenet1_1"}))
    assert "tiny" in refusal.value.remedy
