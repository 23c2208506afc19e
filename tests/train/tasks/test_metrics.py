"""Metrics, with numbers worked out by hand, and against scikit-learn on random scores."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as sklearn_metrics

from hsl_node.train.tasks.metrics import Threshold, auc, choose_threshold, measure, roc


def two(labels: list[int], scores: list[float]) -> tuple[np.ndarray, np.ndarray]:
    return np.array(labels, np.int64), np.array(scores, np.float32)


def test_two_classes_by_hand() -> None:
    found = measure(*two([0, 0, 0, 1, 1], [0.1, 0.6, 0.2, 0.5, 0.4]))
    # predictions at 0.5: 0 1 0 1 0; pairs won by the positives: 0.5 beats 0.1, 0.2; 0.4 beats 0.1, 0.2 = 4 of 6
    assert found.confusion == ((2, 1), (1, 1))
    assert found.auc == pytest.approx(4 / 6)
    assert found.accuracy == pytest.approx(3 / 5)
    assert found.recall == found.sensitivity == pytest.approx(1 / 2)
    assert found.specificity == pytest.approx(2 / 3)
    assert found.precision == pytest.approx(1 / 2)
    assert found.f1 == pytest.approx(1 / 2)
    assert found.images == 5


def test_roc_points_by_hand() -> None:
    labels, scores = two([0, 0, 1, 1], [0.1, 0.5, 0.5, 0.9])
    assert roc(labels == 1, scores) == ((0.0, 0.0), (0.0, 0.5), (0.5, 1.0), (1.0, 1.0))  # the tie is one slanted step
    assert auc(labels == 1, scores) == pytest.approx(3.5 / 4)


def test_one_class_only_leaves_auc_undefined_never_0_or_a_half() -> None:
    healthy = measure(*two([0, 0, 0], [0.1, 0.2, 0.9]))
    assert healthy.auc is None and healthy.roc == ((),)
    assert healthy.recall is None and healthy.sensitivity is None
    assert healthy.specificity == pytest.approx(2 / 3) and healthy.accuracy == pytest.approx(2 / 3)
    ill = measure(*two([1, 1], [0.1, 0.9]))
    assert ill.auc is None and ill.specificity is None and ill.recall == 0.5


def test_precision_is_undefined_where_nothing_was_called_positive() -> None:
    found = measure(*two([0, 1], [0.1, 0.2]))
    assert found.precision is None
    assert found.recall == 0.0 and found.f1 == 0.0  # these are known, and bad


def test_no_images_leave_everything_undefined() -> None:
    found = measure(*two([], []))
    assert found.images == 0
    assert {found.auc, found.accuracy, found.recall, found.precision, found.f1, found.specificity} == {None}


def test_all_scores_equal_is_a_known_half() -> None:
    assert measure(*two([0, 1], [0.3, 0.3])).auc == 0.5


def test_exactly_one_half_counts_as_positive() -> None:
    assert measure(*two([0, 1], [0.4999, 0.5])).confusion == ((1, 0), (0, 1))


def test_a_probability_that_is_not_a_number_is_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        measure(*two([0, 1], [0.1, float("nan")]))


def test_three_classes_by_hand() -> None:
    labels = np.array([0, 1, 2, 2], np.int64)
    probabilities = np.array([[0.8, 0.1, 0.1], [0.2, 0.5, 0.3], [0.6, 0.3, 0.1], [0.1, 0.2, 0.7]])
    found = measure(labels, probabilities)  # predictions 0 1 0 2
    assert found.confusion == ((1, 0, 0), (0, 1, 0), (1, 0, 1))
    assert found.accuracy == pytest.approx(3 / 4)
    assert found.recall == pytest.approx((1 + 1 + 1 / 2) / 3)
    assert found.precision == pytest.approx((1 / 2 + 1 + 1) / 3)
    assert found.specificity == pytest.approx((2 / 3 + 1 + 1) / 3)
    # class 2 against the rest: 0.1 ties with 0.1 and loses to 0.3; 0.7 beats both = 2.5 of 4
    assert found.auc == pytest.approx((1 + 1 + 2.5 / 4) / 3)


def test_a_class_without_images_leaves_the_mean_to_the_classes_that_there_are() -> None:
    labels = np.array([0, 1, 0])
    found = measure(labels, np.array([[0.8, 0.1, 0.1], [0.2, 0.5, 0.3], [0.3, 0.6, 0.1]]))  # predictions 0 1 1
    # class 0: 0.8 and 0.3 beat 0.2; class 1: 0.5 beats 0.1 and loses to 0.6. Recall 1/2 and 1; precision 1 and 1/2
    assert found.auc == pytest.approx((1 + 1 / 2) / 2) and found.classes == 2
    assert found.recall == pytest.approx(3 / 4) and found.precision == pytest.approx(3 / 4)
    assert found.specificity == pytest.approx((1 + 1 / 2) / 2) and found.accuracy == pytest.approx(2 / 3)
    assert found.roc[2] == () and found.roc[0] != ()


def test_one_of_three_classes_alone_leaves_auc_undefined() -> None:
    found = measure(np.array([1, 1]), np.array([[0.8, 0.1, 0.1], [0.2, 0.5, 0.3]]))
    assert found.auc is None and found.classes == 1 and found.recall == 0.5


@given(
    st.lists(st.tuples(st.integers(0, 1), st.integers(0, 8)), min_size=2, max_size=60).filter(
        lambda rows: len({label for label, _ in rows}) == 2
    )
)
def test_two_classes_agree_with_scikit_learn(rows: list[tuple[int, int]]) -> None:
    labels, scores = two([a for a, _ in rows], [b / 8 for _, b in rows])
    found, predicted = measure(labels, scores), (scores >= 0.5).astype(int)
    assert found.auc == pytest.approx(sklearn_metrics.roc_auc_score(labels, scores))
    fpr, tpr, _ = sklearn_metrics.roc_curve(labels, scores, drop_intermediate=False)
    assert np.allclose(found.roc[0], np.stack([fpr, tpr], 1))
    assert np.array_equal(found.confusion, sklearn_metrics.confusion_matrix(labels, predicted, labels=[0, 1]))
    assert found.f1 == pytest.approx(sklearn_metrics.f1_score(labels, predicted, zero_division=0))


@given(st.integers(0, 2**31))
def test_many_classes_agree_with_scikit_learn(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(4), rng.integers(0, 4, 20)])
    probabilities = rng.dirichlet(np.ones(4), 24)
    found = measure(labels, probabilities)
    expected = sklearn_metrics.roc_auc_score(labels, probabilities, multi_class="ovr", average="macro")
    assert found.auc == pytest.approx(expected)
    predicted = probabilities.argmax(1)
    assert found.f1 == pytest.approx(sklearn_metrics.f1_score(labels, predicted, average="macro"))


# ------------------------------------------------------------------ the threshold


def test_threshold_of_the_largest_youden_index_by_hand() -> None:
    """10 well at 0.00 to 0.09, two of them raised to 0.7; 10 ill at 0.5 to 0.59: from 0.5 on all ill are found, and
    two of ten well called ill: J = 0.8. From 0.7 on J = -0.2."""
    labels = np.repeat([0, 1], 10)
    scores = np.concatenate([np.arange(8) / 100, [0.7, 0.7], 0.5 + np.arange(10) / 100])
    found = choose_threshold(labels, scores)
    assert found == Threshold(0.5, "largest Youden's J on 10 positive and 10 negative validation images")


def test_threshold_of_a_given_sensitivity_is_the_highest_that_reaches_it() -> None:
    labels = np.repeat([0, 1], 10)
    scores = np.concatenate([np.zeros(10), np.arange(1, 11) / 10])
    assert choose_threshold(labels, scores, 0.8).value == pytest.approx(0.3)  # 0.3 to 1.0: 8 of 10
    assert choose_threshold(labels, scores, 1.0).value == pytest.approx(0.1)
    assert "sensitivity of at least 0.8 on 10 positive" in choose_threshold(labels, scores, 0.8).rule


@pytest.mark.parametrize("labels", [[], [1] * 30, [0] * 30 + [1] * 9])
def test_with_too_few_validation_images_no_threshold_is_chosen(labels: list[int]) -> None:
    found = choose_threshold(np.array(labels, np.int64), np.linspace(0, 1, len(labels)))
    assert found.value == 0.5 and "too few to choose one" in found.rule


def test_a_sensitivity_that_a_threshold_has_exactly_is_reached_by_it() -> None:
    """11 of 20 are 0.55, though 0.55 times 20 is more than 11 in binary."""
    for ill in (20, 40, 100):
        labels, score = np.repeat([1, 0], ill), np.linspace(1, 0, 2 * ill)
        for hits in range(1, ill + 1):
            found = choose_threshold(labels, score, round(hits / ill, 4))
            assert (score[:ill] >= found.value).sum() == hits


def test_equal_scores_give_a_threshold_that_finds_all() -> None:
    assert choose_threshold(np.repeat([0, 1], 10), np.full(20, 0.3)).value == pytest.approx(0.3)
