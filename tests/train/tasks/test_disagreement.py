"""How far models disagree about an image: by hand, and what must hold of it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hsl_node.train.tasks.disagreement import disagreement, loss_of_each, of_each_class


def two_classes(*rows: list[float]) -> torch.Tensor:
    """Each model's probabilities of class 1 -> (K, B, 2)."""
    p = torch.tensor(rows)
    return torch.stack([1 - p, p], dim=2)


def test_three_hospitals_and_four_images_by_hand():
    """Deviations of class 1 (unbiased): 0, 0.2, 0.1, 0; class 0 has the same; the largest is 1."""
    found = disagreement(two_classes([0.5, 0.2, 0.5, 0.9], [0.5, 0.4, 0.6, 0.9], [0.5, 0.6, 0.7, 0.9]))
    torch.testing.assert_close(found, torch.tensor([0.0, 1.0, 0.5, 0.0]), atol=1e-6, rtol=0)


def test_hospitals_that_agree_do_not_disagree_by_rounding():
    answers = two_classes([0.3, 0.8], [0.3, 0.8], [0.3, 0.8])
    answers[1] += 1e-8
    assert disagreement(answers).tolist() == [0, 0]


@given(st.integers(0, 99), st.integers(2, 5), st.integers(2, 4))
def test_it_is_a_share_whatever_the_order_of_hospitals_and_whatever_all_add(seed: int, models: int, classes: int):
    generator = torch.Generator().manual_seed(seed)
    answers = torch.rand(models, 6, classes, generator=generator, dtype=torch.float64)
    found = disagreement(answers)
    assert found.min() >= 0 and found.max() == pytest.approx(1)
    torch.testing.assert_close(disagreement(answers + 0.25), found)
    torch.testing.assert_close(disagreement(answers[torch.randperm(models, generator=generator)]), found)


def test_each_images_loss_by_hand_and_certainty_is_cut_off():
    p = torch.tensor([[0.2, 0.8], [0.9, 0.1], [1.0, 0.0]])
    found = loss_of_each(p, torch.tensor([1, 1, 1])).tolist()
    assert found == pytest.approx([-math.log(0.8), -math.log(0.1), -math.log(1e-5)], rel=1e-4)


def test_one_logit_is_two_classes():
    found = of_each_class(torch.tensor([[0.0], [math.log(3)]]))
    torch.testing.assert_close(found, torch.tensor([[0.5, 0.5], [0.25, 0.75]]))
    assert of_each_class(torch.zeros(2, 3)).tolist() == [[pytest.approx(1 / 3)] * 3] * 2
