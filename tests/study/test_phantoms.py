"""Synthetic ultrasound: the same seed gives the same pictures, the classes can be told apart, and not at a glance."""

from __future__ import annotations

import csv
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hsl_node.federation.node_toml import DataConfig
from hsl_node.federation.plan import Plan
from hsl_node.study import phantoms
from hsl_node.study.phantoms import HOSPITALS, Hospital
from hsl_node.train.data.dataset import open_dataset

SMALL = replace(HOSPITALS[0], patients=24)
SIZE = 64


def pictures(hospital: Hospital, patients: int, seed: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(N, S, S) uint8, (N,) labels, (N,) patients."""
    drawn = [(n, *view) for n in range(patients) for view in phantoms.patient(hospital, n, seed=seed, size=SIZE)]
    return np.stack([p for _, p, _ in drawn]), np.array([v for _, _, v in drawn]), np.array([n for n, _, _ in drawn])


def test_same_seed_gives_the_same_pictures_and_another_seed_others() -> None:
    first, again, other = (pictures(SMALL, 5, seed)[0] for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first[:5], other[:5])


def test_more_patients_never_change_the_earlier_ones(tmp_path: Path) -> None:
    """A hospital's number of patients is no part of what a patient looks like."""
    few = phantoms.write(tmp_path / "few", replace(SMALL, patients=6), seed=1, size=SIZE).parent
    many = phantoms.write(tmp_path / "many", replace(SMALL, patients=9), seed=1, size=SIZE).parent
    names = sorted(p.relative_to(few) for p in few.rglob("*.png"))
    assert 6 <= len(names) <= 12
    assert all((few / n).read_bytes() == (many / n).read_bytes() for n in names)


@pytest.mark.parametrize("hospital", HOSPITALS, ids=lambda h: h.name)
def test_prevalence_is_what_the_hospital_says_to_within_two_patients(hospital: Hospital) -> None:
    labels = [phantoms.patient(hospital, n, seed=1, size=16)[0][1] for n in range(hospital.patients)]
    assert abs(sum(labels) - hospital.prevalence * hospital.patients) <= 2


def test_both_views_of_a_patient_have_the_same_label_but_are_different_pictures() -> None:
    views = [phantoms.patient(SMALL, n, seed=1, size=SIZE) for n in range(20)]
    twice = [v for v in views if len(v) == 2]
    assert 5 <= len(twice) < 20
    for (first, label), (second, label_again) in twice:
        assert label == label_again
        assert not np.array_equal(first, second)


def test_signs_of_malignancy_overlap_between_the_classes() -> None:
    """Spicules and shadow are frequent in one class and do occur in the other: no sign decides alone."""
    rng = np.random.default_rng(3)
    share = {}
    for malignant in (False, True):
        lesions = [phantoms.draw_lesion(rng, SMALL, malignant) for _ in range(400)]
        share[malignant] = [np.mean([len(i.spikes) > 0 for i in lesions]), np.mean([i.below_db < 0 for i in lesions])]
    for benign, malignant in zip(share[False], share[True], strict=True):
        assert 0.02 < benign < 0.2
        assert 0.5 < malignant < 0.98


def test_a_lesion_is_darker_than_the_tissue_around_it() -> None:
    """Averaged over many pictures, since speckle and fat lobules hide it in some."""
    images, _, _ = pictures(SMALL, 24)
    middle = images[:, 26:36, 26:38].mean()
    sides = images[:, 26:36, :8].mean()
    assert sides - middle > 15


def test_hospitals_draw_with_different_brightness_and_grain() -> None:
    images = {h.name: pictures(h, 12)[0].astype(float) for h in HOSPITALS}
    brightness = {n: i.mean() for n, i in images.items()}
    # Neighbouring pixels differ less where the probe is blunt: the grain is coarser.
    grain = {n: np.abs(np.diff(i, axis=2)).mean() / i.std() for n, i in images.items()}
    assert brightness["meadow"] < brightness["harbour"] < brightness["summit"]
    assert grain["summit"] < grain["meadow"] < grain["harbour"]


def test_a_linear_look_at_the_pixels_sees_the_classes_but_far_from_perfectly() -> None:
    """Trained on half of the patients, tested on the others: learnable, and not trivial."""
    from sklearn.decomposition import PCA
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.pipeline import make_pipeline

    images, labels, patients = pictures(HOSPITALS[0], 240)
    coarse = images.reshape(-1, 32, 2, 32, 2).mean(axis=(2, 4)).reshape(len(images), -1)
    train = patients < 120
    model = make_pipeline(PCA(40, random_state=0), LogisticRegression(max_iter=1000))
    model.fit(coarse[train], labels[train])
    found = roc_auc_score(labels[~train], model.predict_proba(coarse[~train])[:, 1])
    assert 0.6 < found < 0.95


def test_written_table_is_a_data_source_that_keeps_patients_on_one_side(tmp_path: Path) -> None:
    table = phantoms.write(tmp_path / "images", replace(SMALL, patients=40), seed=1, size=SIZE)
    plan = Plan(method="fedavg", classes=phantoms.CLASSES, image_size=32)
    dataset = open_dataset(DataConfig(path=table), plan, cache=tmp_path / "cache", ledger=tmp_path / "splits.json")
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [phantoms.CLASSES[n] for n in dataset.labels] == [r["label"] for r in rows]
    sides = defaultdict(set)
    for row, side in zip(rows, dataset.split, strict=True):
        sides[row["patient"]].add(int(side))
    assert len(sides) == 40
    assert all(len(s) == 1 for s in sides.values())


def test_every_picture_says_that_it_is_synthetic(tmp_path: Path) -> None:
    phantoms.write(tmp_path, replace(SMALL, patients=3), seed=1, size=32)
    for path in tmp_path.rglob("*.png"):
        assert path.name.startswith("synthetic_")
        with Image.open(path) as image:
            assert "no patient" in image.text["Description"]  # type: ignore[attr-defined]


def test_further_hospitals_are_drawn_from_the_seed_and_differ() -> None:
    five, again, other = (phantoms.hospitals(5, seed) for seed in (1, 1, 2))
    assert five == again
    assert five[:3] == HOSPITALS == other[:3]
    assert len({h.scanner for h in five}) == 5
    assert five[3:] != other[3:]
