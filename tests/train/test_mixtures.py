"""Densities of a hospital's images: worked numbers, and what must hold of weights and samples drawn by them."""

from __future__ import annotations

import learning
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hsl_node.train.mixtures import COMPONENTS, Mixture, fitted, joined, principal, resampled, weights

X = np.array([[-0.5], [0.0], [0.5], [1.0], [2.0]])


def in_one_dimension(*means: float) -> Mixture:
    count = len(means)
    return Mixture(np.full(count, 1 / count), np.array(means)[:, None], np.full((count, 1), 0.25))


# ---------------------------------------------------------------- worked numbers: METHODS, FedDpS, point 8


def test_densities_weights_and_sample_of_two_hospitals_by_hand():
    a, b = in_one_dimension(0.0, 1.0), in_one_dimension(2.0)
    everybody = joined([a, b], [100, 300])
    found = np.exp(a.log_density(X)), np.exp(everybody.log_density(X)), weights(X, a, everybody)
    np.testing.assert_allclose(found[0], [0.246403, 0.452933, 0.483941, 0.452933, 0.0541248], rtol=2e-6)
    np.testing.assert_allclose(found[1], [0.0616029, 0.113434, 0.127633, 0.19422, 0.611945], rtol=4e-6)
    np.testing.assert_allclose(found[2], [0.0223362, 0.022375, 0.0235627, 0.0383101, 0.893416], rtol=4e-6)
    assert resampled(found[2], 0.5).tolist() == [3, 4, 4, 4, 4]


# ---------------------------------------------------------------- densities


def test_the_joined_density_integrates_to_one():
    everybody = joined([in_one_dimension(0.0, 1.0), in_one_dimension(2.0)], [100, 300])
    grid = np.linspace(-10, 10, 20_001)[:, None]
    assert np.exp(everybody.log_density(grid)).sum() * 0.001 == pytest.approx(1, abs=1e-9)


def test_densities_of_many_dimensions_do_not_underflow():
    far = Mixture(np.ones(1), np.zeros((1, 64)), np.full((1, 64), 0.01))
    x = np.full((2, 64), [[3.0], [3.1]])
    assert np.exp(far.log_density(x)).tolist() == [0, 0]  # as a number
    assert np.isfinite(far.log_density(x)).all() and far.log_density(x)[0] > far.log_density(x)[1]


def test_moving_all_features_by_a_constant_changes_no_weight():
    rng = np.random.default_rng(0)
    here, there = rng.normal(0, 1, (60, 3)), rng.normal(1, 1, (90, 3))

    def found(by: float) -> np.ndarray:
        mine, theirs = fitted(here + by, 1), fitted(there + by, 2)
        return weights(here + by, mine, joined([mine, theirs], [60, 90]))

    np.testing.assert_allclose(found(0.0), found(7.0), rtol=1e-6)


# ---------------------------------------------------------------- samples


def test_with_equal_mixtures_every_image_is_taken_once():
    mixture = in_one_dimension(0.0, 1.0)
    weight = weights(X, mixture, joined([mixture, mixture], [10, 40]))
    np.testing.assert_allclose(weight, 0.2)
    assert resampled(weight, 0.3).tolist() == [0, 1, 2, 3, 4]


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=40), st.floats(0.001, 0.999))
def test_an_image_is_taken_as_often_as_it_weighs_within_one(ratios: list[float], u: float):
    weight = np.array(ratios) / sum(ratios)
    found = resampled(weight, u)
    assert len(found) == len(ratios)
    times = np.bincount(found, minlength=len(ratios))
    assert (np.abs(times - len(ratios) * weight) < 1 + 1e-9).all()


# ---------------------------------------------------------------- what is told


def test_no_component_is_of_fewer_than_ten_images():
    """One or two images apart from the others would get a component of their own: a patient's features."""
    x = np.concatenate([np.random.default_rng(0).normal(0, 1, (48, 2)), [[40.0, 40.0], [41.0, 40.0]]])
    found = fitted(x, 3)
    present = found.share[found.share > 0]
    assert (present * len(x) >= 10 - 1e-6).all() and present.sum() == pytest.approx(1)
    assert np.abs(found.mean).max() < 20  # nowhere near 40


def test_of_fewer_than_ten_images_nothing_is_told_and_nothing_drawn_anew():
    none, other = fitted(np.zeros((9, 4)), 1), fitted(np.random.default_rng(0).normal(0, 1, (30, 4)), 1)
    assert none.share.tolist() == [0] * COMPONENTS and not none.mean.any()
    everybody = joined([none, other], [9, 30])
    np.testing.assert_allclose(everybody.share.sum(), 1)
    assert weights(np.zeros((9, 4)), none, everybody).tolist() == [1 / 9] * 9


def test_a_constant_feature_has_a_density_all_the_same():
    x = np.random.default_rng(0).normal(0, 1, (30, 2))
    x[:, 1] = 5.0
    found = fitted(x, 1)
    assert np.isfinite(found.log_density(x)).all()


def test_the_same_images_and_seed_give_the_same_mixture():
    x = np.random.default_rng(0).normal(0, 1, (80, 6))
    one, again = fitted(x, 5), fitted(x, 5)
    assert np.array_equal(one.mean, again.mean) and np.array_equal(one.variance, again.variance)


# ---------------------------------------------------------------- features


def test_principal_components_are_centred_on_the_reference_and_uncorrelated_there():
    images, _ = learning.blobs(60, seed=1)
    found = principal(images, images, 16)
    assert found.shape == (60, 16)
    np.testing.assert_allclose(found.mean(axis=0), 0, atol=1e-9)
    covariance = np.cov(found.T)
    np.testing.assert_allclose(covariance, np.diag(np.diag(covariance)), atol=1e-9)
    assert (np.diff(np.diag(covariance)) <= 1e-12).all()  # the strongest first


def test_few_reference_images_leave_features_empty_rather_than_arbitrary():
    reference, _ = learning.blobs(5, seed=1)
    images, _ = learning.blobs(20, seed=2)
    found = principal(reference, images, 64)
    assert found[:, :4].any(axis=0).all() and not found[:, 5:].any()


def test_grey_images_and_the_same_in_colour_have_the_same_features():
    images, _ = learning.blobs(30, seed=1)
    colour = np.repeat(images[..., None], 3, axis=3)
    np.testing.assert_allclose(principal(images, colour, 8), principal(images, images, 8), atol=1e-6)
