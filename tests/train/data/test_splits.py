"""60/10/30 by patient: on one side each, near the ratio, and there to stay."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hsl_node.train.data.splits import Image, SplitConflict, assign, patient_key

PERCENT = (60, 10, 30)


def singles(label: int, count: int, first: int = 0) -> list[Image]:
    """Images without a known patient."""
    return [Image(f"{label}-{n}", label, f"{label}-{n}") for n in range(first, first + count)]


def of_patient(name: str, label: int, count: int, fixed: int | None = None) -> list[Image]:
    return [Image(f"{name}-{n}", label, patient_key(name), fixed) for n in range(count)]


def counts(images: list[Image], split: tuple[int, ...]) -> dict[int, list[int]]:
    """label -> images per split"""
    table: dict[int, list[int]] = defaultdict(lambda: [0, 0, 0])
    for image, side in zip(images, split, strict=True):
        table[image.label][side] += 1
    return dict(table)


def test_ratios_are_exact_where_they_can_be() -> None:
    """100 and 50 single images give 60/10/30 and 30/5/15."""
    images = singles(0, 100) + singles(1, 50)
    assert counts(images, assign(images, PERCENT, seed=1).split) == {0: [60, 10, 30], 1: [30, 5, 15]}


@pytest.mark.parametrize("count", [3, 4, 5, 6, 7])
def test_three_patients_of_a_class_are_enough_for_all_three_sides(count: int) -> None:
    images = singles(0, count) + singles(1, 40)
    assert min(counts(images, assign(images, PERCENT, seed=1).split)[0]) >= 1


def test_another_seed_is_another_split_and_the_same_seed_the_same() -> None:
    images = singles(0, 100)
    assert assign(images, PERCENT, 1).split == assign(images, PERCENT, 1).split
    assert assign(images, PERCENT, 1).split != assign(images, PERCENT, 2).split


def test_the_order_of_the_images_does_not_matter() -> None:
    images = singles(0, 40) + singles(1, 30) + of_patient("a", 0, 4)
    there, back = assign(images, PERCENT, 1), assign(images[::-1], PERCENT, 1)
    assert there.split == back.split[::-1]


def test_a_patient_with_both_labels_counts_for_the_rarer_one() -> None:
    """Three patients with one rare image each: every side gets one of them, though they are mostly of the other."""
    images = singles(0, 50)
    for name in "abc":
        images += [*of_patient(name, 0, 3), Image(f"rare-{name}", 1, patient_key(name))]
    assert counts(images, assign(images, PERCENT, 1).split)[1] == [1, 1, 1]


patients = st.lists(
    st.tuples(st.integers(0, 15), st.integers(0, 2), st.integers(1, 6)), min_size=1, max_size=40
)  # (patient, label, images)


def images_of(drawn: list[tuple[int, int, int]], tag: str = "") -> list[Image]:
    return [
        Image(f"{tag}{number}:{n}", label, patient_key(f"{tag}{patient}"))
        for number, (patient, label, count) in enumerate(drawn)
        for n in range(count)
    ]


@given(patients, st.integers(0, 5))
def test_threat_31_images_of_one_patient_never_straddle_splits(drawn: list[tuple[int, int, int]], seed: int) -> None:
    images = images_of(drawn)
    sides: dict[str, set[int]] = defaultdict(set)
    for image, side in zip(images, assign(images, PERCENT, seed).split, strict=True):
        sides[image.key].add(side)
    assert all(len(s) == 1 for s in sides.values())


@given(patients, patients, st.integers(0, 5))
def test_threat_31_images_added_later_move_no_known_patient(
    before: list[tuple[int, int, int]], added: list[tuple[int, int, int]], seed: int
) -> None:
    """Also where known patients get more images, of whatever label."""
    old = images_of(before)
    ledger = assign(old, PERCENT, seed).keys
    more = [replace(image, sha256="later " + image.sha256) for image in images_of(added)]
    grown = assign(old + more, PERCENT, seed, known=ledger)
    assert {key: grown.keys[key] for key in ledger} == ledger


@given(st.integers(3, 200), st.integers(0, 20))
@settings(max_examples=40)
def test_every_split_is_within_one_image_of_its_share(count: int, seed: int) -> None:
    """Single images: no share is missed by more than one, but for the one image that every side must have."""
    got = counts(images := singles(0, count), assign(images, PERCENT, seed).split)[0]
    for have, percent in zip(got, PERCENT, strict=True):
        assert abs(have - max(1, count * percent / 100)) <= 1.0


def test_new_patients_mend_the_ratio() -> None:
    """given a ledger in which all ten are in training, ten more fill up validation and test: 12/2/6 of 20."""
    old = singles(0, 10)
    images = old + singles(0, 10, first=10)
    known = {image.key: 0 for image in old}
    assert counts(images, assign(images, PERCENT, 1, known).split)[0] == [12, 2, 6]


def test_threat_31_the_same_image_under_two_patients_joins_them() -> None:
    """One picture filed twice would otherwise be trained on and tested with."""
    images = singles(0, 30)
    for n in range(20):  # twenty such pairs: they can't all be on one side by luck
        images += [Image(f"shared {n}", 1, patient_key(f"a{n}")), Image(f"shared {n}", 1, patient_key(f"b{n}"))]
        images += [Image(f"own {n}", 1, patient_key(f"b{n}"))]
    result = assign(images, PERCENT, 1)
    sides: dict[str, set[int]] = defaultdict(set)
    for image, side in zip(images, result.split, strict=True):
        sides[image.sha256.split()[-1] if " " in image.sha256 else image.sha256].add(side)
    assert all(len(s) == 1 for s in sides.values())
    assert result.joined == 20


def test_threat_31_a_copy_that_joins_patients_of_two_sides_is_refused() -> None:
    """Neither may move: one was trained on already, the other is a test patient."""
    images = [Image("x", 0, patient_key("a")), Image("x", 0, patient_key("b")), *singles(0, 9)]
    with pytest.raises(SplitConflict, match="already on different sides") as caught:
        assign(images, PERCENT, 1, known={patient_key("a"): 0, patient_key("b"): 2})
    assert caught.value.images == (0, 1)


def test_a_given_split_is_honoured() -> None:
    images = [Image(f"{n}", n % 2, f"{n}", fixed=n % 3) for n in range(30)]
    assert assign(images, PERCENT, 1).split == tuple(n % 3 for n in range(30))


def test_a_given_split_wins_over_the_ledger() -> None:
    images = [Image(f"{n}", 0, f"{n}", fixed=n % 3) for n in range(9)]
    assert assign(images, PERCENT, 1, known={f"{n}": 0 for n in range(9)}).split == (0, 1, 2) * 3


def test_threat_31_a_patient_on_two_sides_of_the_given_split_is_an_error() -> None:
    images = [*of_patient("a", 0, 2, fixed=0), Image("other", 0, patient_key("a"), fixed=2)]
    with pytest.raises(SplitConflict, match="on two sides") as caught:
        assign(images, PERCENT, 1)
    assert caught.value.images == (0, 1, 2)


def test_an_image_without_a_given_split_follows_its_patient() -> None:
    images = [*of_patient("a", 0, 2, fixed=2), Image("new", 0, patient_key("a"))]
    assert assign(images, PERCENT, 1).split == (2, 2, 2)


def test_given_train_and_test_without_validation_take_it_from_train() -> None:
    """70 given for training become 60 and 10; the 30 for testing stay."""
    images = [Image(f"{n}", 0, f"{n}", fixed=0) for n in range(70)] + [
        Image(f"t{n}", 0, f"t{n}", fixed=2) for n in range(30)
    ]
    split = assign(images, PERCENT, 1).split
    assert Counter(split) == {0: 60, 1: 10, 2: 30}
    assert set(split[70:]) == {2}


def test_threat_19_the_patient_key_does_not_show_the_patient() -> None:
    assert "4711" not in patient_key("4711") and len(patient_key("4711")) == 64
    assert patient_key("4711") != patient_key("4712")
