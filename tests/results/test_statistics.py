"""Intervals and comparisons: by hand where they can be, else what must hold of any set; and nothing ever raises."""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sklearn_metrics

from hsl_node.results.statistics import RESAMPLES, Estimate, Statistics, describe
from hsl_node.results.words import by_whom

TWO = ("benign", "malignant")


def described(
    labels: Sequence[int] | np.ndarray,
    patients: Sequence[str | None] | None = None,
    classes: Sequence[str] = TWO,
    ids: Sequence[str] | None = None,
    thresholds: dict[str, float] | None = None,
    log_odds: dict[str, np.ndarray] | None = None,
    **scores: Any,
) -> Statistics:
    values = {name: np.asarray(score, np.float64) for name, score in scores.items()}
    every = range(len(labels))
    return describe(
        classes,
        np.asarray(labels, np.int64),
        ids or [f"{n:064x}" for n in every],
        patients or [None for _ in every],
        values,
        np.random.default_rng(1),
        thresholds or {},
        log_odds or {},
    )


def noisy(rng: np.random.Generator, labels: np.ndarray, signal: float) -> np.ndarray:
    return 1 / (1 + np.exp(-(signal * labels + rng.normal(size=len(labels)))))


def patients_of_three(n: int) -> list[str | None]:
    return [f"p{i // 3}" for i in range(n)]


@st.composite
def sets(draw: st.DrawFn) -> tuple[np.ndarray, list[str | None], np.ndarray, np.ndarray]:
    """Labels, patients (some, all or none known) and the scores of two models, with ties."""
    n = draw(st.integers(24, 90))
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    patients = [draw(st.sampled_from([f"p{i // 2}", f"p{i}", None])) if n < 40 else f"p{i}" for i in range(n)]
    labels = np.arange(n) % 2
    scores = [np.round(noisy(rng, labels, draw(st.floats(-2, 4))), draw(st.integers(1, 6))) for _ in range(2)]
    return labels, patients, scores[0], scores[1]


def every(found: Statistics) -> list[Estimate]:
    models = [(m.auc, m.auprc, m.brier, m.sensitivity, m.specificity, m.auc_patients) for m in found.models.values()]
    classes = [(c.auc, c.auprc) for m in found.models.values() for c in m.classes.values()]
    return [*chain(*models, *classes), *(c.difference for c in found.comparisons)]


# ------------------------------------------------------------------ what must hold of any set


@settings(max_examples=25, deadline=None)
@given(sets())
def test_every_interval_holds_its_figure_and_the_figures_are_scikit_learns(given_: Any) -> None:
    labels, patients, one, two = given_
    found = described(labels, patients, thresholds={"one": 0.5}, one=one, two=two)
    for estimate in every(found):
        if estimate.low is not None:
            assert estimate.low <= estimate.value <= estimate.high
    assert found.models["one"].auc.value == pytest.approx(sklearn_metrics.roc_auc_score(labels, one))
    assert found.models["one"].auprc.value == pytest.approx(sklearn_metrics.average_precision_score(labels, one))
    assert found.models["one"].brier.value == pytest.approx(sklearn_metrics.brier_score_loss(labels, one))
    recall = sklearn_metrics.recall_score(labels, one >= 0.5)
    assert found.models["one"].sensitivity.value == pytest.approx(recall)


@settings(max_examples=15, deadline=None)
@given(sets())
def test_swapping_two_models_negates_the_difference(given_: Any) -> None:
    labels, patients, one, two = given_
    (there,) = described(labels, patients, one=one, two=two).comparisons
    (back,) = described(labels, patients, two=two, one=one).comparisons
    assert back.difference.value == pytest.approx(-there.difference.value)
    if there.difference.low is not None:
        assert (back.difference.low, back.difference.high) == pytest.approx(
            (-there.difference.high, -there.difference.low)
        )
        assert back.p == there.p
    turned = {"better": "worse", "worse": "better"}
    assert back.verdict == turned.get(there.verdict, there.verdict)


def test_the_same_inputs_give_the_same_statistics() -> None:
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 2, 90)
    scores = {"own": noisy(rng, labels, 1), "fused": noisy(rng, labels, 2)}
    assert described(labels, patients_of_three(90), **scores) == described(labels, patients_of_three(90), **scores)


# ------------------------------------------------------------------ patients


def width(estimate: Estimate) -> float:
    assert estimate.low is not None and estimate.high is not None
    return estimate.high - estimate.low


def test_every_image_twice_makes_no_interval_narrower() -> None:
    """Copies tell nothing new. By image, which is wrong, the interval would shrink by a third."""
    rng = np.random.default_rng(5)
    labels = np.arange(60) % 2
    score = noisy(rng, labels, 1)
    patients: list[str | None] = [f"p{i}" for i in range(60)]
    once = described(labels, patients, own=score).models["own"].auc
    twice = described(np.tile(labels, 2), patients * 2, own=np.tile(score, 2)).models["own"].auc
    assert twice == once
    by_image = described(np.tile(labels, 2), own=np.tile(score, 2)).models["own"].auc
    assert width(by_image) < 0.8 * width(once)


def test_the_same_image_twice_counts_once_for_the_interval_where_no_patient_is_known() -> None:
    rng = np.random.default_rng(5)
    labels = np.arange(60) % 2
    score, ids = noisy(rng, labels, 1), [f"{n:064x}" for n in range(60)]
    once = described(labels, ids=ids, own=score)
    twice = described(np.tile(labels, 2), ids=ids * 2, own=np.tile(score, 2))
    assert twice.models["own"].auc == once.models["own"].auc
    assert twice.patients_of == once.patients_of == {"benign": 30, "malignant": 30}


def test_images_of_one_patient_that_are_alike_widen_the_interval() -> None:
    """40 patients of 5 images each, which the model scores alike: as sure as of 40 images, not of 200."""
    rng = np.random.default_rng(7)
    labels = np.arange(40) % 2
    score = noisy(rng, labels, 1)
    five = np.repeat(score, 5) + rng.normal(0, 1e-4, 200)
    patients: list[str | None] = [f"p{i // 5}" for i in range(200)]
    clustered = described(np.repeat(labels, 5), patients, own=five).models["own"].auc
    assert width(clustered) > 1.8 * width(described(np.repeat(labels, 5), own=five).models["own"].auc)
    assert width(clustered) == pytest.approx(width(described(labels, own=score).models["own"].auc), rel=0.1)


def test_patients_and_images_without_one_are_counted() -> None:
    found = described([0, 0, 1, 1, 1], ["a", "a", "b", None, None], own=[0.1, 0.2, 0.3, 0.4, 0.5])
    assert (found.images, found.patients, found.without_patient, found.unit) == (5, 4, 2, "patient")
    assert (found.images_of, found.patients_of) == ({"benign": 2, "malignant": 3}, {"benign": 1, "malignant": 3})
    unknown = described([0, 1], own=[0.1, 0.2])
    assert (unknown.patients, unknown.without_patient, unknown.unit) == (None, 0, "image")


def test_a_patient_is_scored_by_the_mean_of_its_images_and_is_ill_with_one_ill_image() -> None:
    """Patients: a 0.2 well, b (0.1 + 0.9)/2 = 0.5 ill by its second image, c 0.4 ill: both above a."""
    found = described([0, 0, 0, 1, 1], ["a", "a", "b", "b", "c"], own=[0.1, 0.3, 0.1, 0.9, 0.4])
    assert found.models["own"].auc_patients.value == 1.0
    assert found.models["own"].auc.value == 1.0  # 0.9 and 0.4 above 0.1, 0.3, 0.1
    worse = described([0, 0, 0, 1, 1], ["a", "a", "b", "b", "c"], own=[0.1, 0.9, 0.1, 0.5, 0.4])
    assert worse.models["own"].auc_patients.value == 0.0  # a 0.5; b 0.3, c 0.4
    assert worse.models["own"].auc.value == pytest.approx(4 / 6)
    assert found.mixed == 1


# ------------------------------------------------------------------ verdicts


def test_too_few_patients_of_a_class_give_no_interval_and_no_verdict() -> None:
    labels = [0] * 12 + [1] * 9
    found = described(labels, own=np.linspace(0, 1, 21), fused=np.linspace(1, 0, 21))
    assert found.too_few == "images: 9 of malignant; at least 10 of each class are needed"
    assert found.models["own"].auc == Estimate(1.0)
    (comparison,) = found.comparisons
    assert (comparison.verdict, comparison.p) == ("too few", None)
    assert comparison.difference == Estimate(1.0)
    assert found.best(("own", "fused")) is None
    assert not described([0] * 12 + [1] * 10, own=np.linspace(0, 1, 22)).too_few


def test_many_images_of_few_patients_are_too_few() -> None:
    labels = np.arange(300) % 2
    found = described(labels, [f"p{i % 6}" for i in range(300)], own=np.linspace(0, 1, 300))
    assert found.too_few == "patients: 3 of benign, 3 of malignant; at least 10 of each class are needed"


def test_the_better_model_is_named_whoever_it_is_and_nobody_of_equals() -> None:
    rng = np.random.default_rng(11)
    labels = np.arange(200) % 2
    good, poor = noisy(rng, labels, 3), noisy(rng, labels, 0)
    three = ("fused", "local", "alone")
    assert described(labels, fused=good, local=poor, alone=poor).best(three) == "fused"
    found = described(labels, fused=poor, local=poor, alone=good)
    assert found.best(three) == "alone"
    lost = found.find("fused", "alone")
    assert lost is not None and lost.verdict == "worse" and lost.difference.high is not None
    assert lost.difference.high < 0 and lost.p == pytest.approx(2 / (RESAMPLES + 1))
    tie = described(labels, fused=good, local=poor, alone=good)
    assert tie.best(three) is None
    same = tie.find("fused", "alone")
    assert same is not None and same.difference == Estimate(0.0, 0.0, 0.0) and same.p == 1.0
    assert described(labels, fused=good).best(("fused",)) is None, "one alone is better than nobody"


def test_a_pair_is_compared_on_the_same_patients() -> None:
    """Two models that err on the same patients: the difference is far surer than either figure."""
    rng = np.random.default_rng(13)
    labels = np.arange(120) % 2
    base = noisy(rng, labels, 1.5)
    found = described(labels, own=base, fused=base + rng.normal(0, 0.01, 120))
    (comparison,) = found.comparisons
    assert width(comparison.difference) < 0.3 * width(found.models["own"].auc)


# ------------------------------------------------------------------ degenerate sets


@pytest.mark.parametrize(
    ("labels", "score", "value"),
    [
        ([], [], None),
        ([1], [0.3], None),
        ([0] * 30, np.linspace(0, 1, 30), None),
        ([0, 1] * 15, [0.4] * 30, 0.5),
        ([0] * 15 + [1] * 15, np.linspace(0, 1, 30), 1.0),
    ],
    ids=["no image", "one image", "one class", "equal scores", "perfect"],
)
def test_a_degenerate_set_has_no_interval_and_raises_nothing(labels: Any, score: Any, value: float | None) -> None:
    """Of a perfect separation every resample is perfect too: that says nothing of how sure it is."""
    found = described(labels, own=score, fused=score, thresholds={"own": 0.5})
    assert found.models["own"].auc == Estimate(value)
    (comparison,) = found.comparisons
    assert comparison.verdict == ("too few" if value is None else "no difference")
    assert found.models["own"].sensitivity.value == {1: 0.0}.get(len(labels), None if value is None else pytest.approx(
        np.mean(np.asarray(score)[np.asarray(labels) == 1] >= 0.5)
    ))  # fmt: skip


# ------------------------------------------------------------------ several classes, calibration


def test_several_classes_have_a_figure_each_and_their_mean() -> None:
    rng = np.random.default_rng(17)
    classes, labels = ("a", "b", "c"), np.arange(90) % 3
    chances = np.eye(3)[labels] * 0.5 + rng.dirichlet(np.ones(3), 90)
    chances /= chances.sum(axis=1, keepdims=True)
    found = described(labels, patients_of_three(90), classes=classes, own=chances).models["own"]
    expected = sklearn_metrics.roc_auc_score(labels, chances, multi_class="ovr", average="macro")
    assert found.auc.value == pytest.approx(expected)
    assert [found.classes[c].auc.value for c in classes] == pytest.approx(
        [sklearn_metrics.roc_auc_score(labels == n, chances[:, n]) for n in range(3)]
    )
    assert np.mean([found.classes[c].auprc.value for c in classes]) == pytest.approx(found.auprc.value)
    assert found.brier.value == pytest.approx(np.square(chances - np.eye(3)[labels]).sum(axis=1).mean())
    assert found.sensitivity == Estimate(None) and found.calibration == ()
    assert found.auc_patients == Estimate(None), "each patient has an image of every class: none has one of its own"


def test_patients_with_images_of_several_classes_are_counted_where_they_are_left_out() -> None:
    """Of three classes no patient here has one class alone; of two a patient with one ill image is ill."""
    labels, chances = np.arange(90) % 3, np.full((90, 3), 1 / 3)
    of_three = described(labels, patients_of_three(90), classes=("a", "b", "c"), own=chances)
    assert by_whom(of_three).endswith("With images of several classes, so not in the AUC by patient: 30.")
    assert "several" not in by_whom(described(labels > 0, patients_of_three(90), own=chances[:, 0]))


def test_a_class_without_images_leaves_mean_and_intervals_to_the_others() -> None:
    rng = np.random.default_rng(3)
    labels = np.arange(60) % 2  # none of c
    chances = np.eye(3)[labels] * 0.3 + rng.dirichlet(np.ones(3), 60)
    chances /= chances.sum(axis=1, keepdims=True)
    found = described(labels, classes=("a", "b", "c"), own=chances)
    own = found.models["own"]
    by_hand = [sklearn_metrics.roc_auc_score(labels == n, chances[:, n]) for n in range(2)]
    assert own.auc.value == pytest.approx(np.mean(by_hand)) and own.auc.low is not None
    assert own.classes["c"].auc == Estimate(None) and found.images_of["c"] == 0 and not found.too_few
    assert described([1] * 30, classes=("a", "b", "c"), own=chances[:30]).too_few.startswith("images: 0 of a, 0 of c;")


def test_probabilities_that_rounding_made_equal_are_ranked_by_their_log_odds() -> None:
    labels = np.repeat([0, 1], 15)
    odds = np.linspace(20, 60, 30)  # all of them 1 as float32 probabilities
    sure = np.ones(30, np.float32)
    assert described(labels, own=sure).models["own"].auc.value == 0.5
    assert described(labels, own=sure, log_odds={"own": odds}).models["own"].auc.value == 1.0


def test_calibration_bins_hold_as_many_images_each() -> None:
    score = np.arange(100) / 100
    found = described((np.arange(100) % 10 < 3).astype(int), own=score).models["own"].calibration
    assert [n for _, _, n in found] == [10] * 10
    assert [share for _, share, _ in found] == [0.3] * 10
    assert found[0][0] == pytest.approx(0.045)  # the mean of 0.00 to 0.09
    assert described([0, 1] * 9, own=np.linspace(0, 1, 18)).models["own"].calibration == ()


# ------------------------------------------------------------------ many images


def test_twenty_thousand_images_take_less_than_four_bytes_for_each_and_each_resample() -> None:
    rng = np.random.default_rng(5)
    labels = rng.integers(0, 2, 20_000)
    score = noisy(rng, labels, 1)
    tracemalloc.start()
    found = described(labels, thresholds={"own": 0.5}, own=score)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 4 * 20_000 * RESAMPLES
    assert found.models["own"].auc.value == pytest.approx(sklearn_metrics.roc_auc_score(labels, score))
    assert found.models["own"].auc_patients == found.models["own"].auc
