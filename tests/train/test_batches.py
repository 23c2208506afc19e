"""Which images make a batch: an epoch over the own images, anchors in some batches, classes that count alike."""

from __future__ import annotations

from pathlib import Path

import learning
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hsl_node.federation.plan import Augment
from hsl_node.train import batches
from hsl_node.train.augment import draw
from hsl_node.train.batches import class_weights, epoch_pairs

COUNTS = st.lists(st.integers(0, 30), min_size=2, max_size=6).filter(lambda counts: sum(counts) > 0)


def labels_of(counts: list[int]) -> np.ndarray:
    return np.repeat(np.arange(len(counts)), counts).astype(np.int64)


# ---------------------------------------------------------------- an epoch


@pytest.mark.parametrize(("primary", "anchor"), [(5, 20), (20, 5), (1, 9), (9, 0)])
@pytest.mark.parametrize("batch_size", [2, 4, 8])
def test_an_own_epoch_is_one_pass_over_the_own_images_with_anchors_drawn_to_fit(
    primary: int, anchor: int, batch_size: int
):
    pairs = epoch_pairs(np.random.default_rng(0), primary, anchor, batch_size, own=True)
    own = np.concatenate([p for p, _ in pairs])
    if primary > 1:
        assert sorted(own.tolist()) == list(range(primary))
    else:
        assert own.tolist() == [0, 0]  # BatchNorm can't work with one image
    anchors = np.concatenate([a for _, a in pairs])
    assert len(anchors) == (len(own) if anchor else 0)
    if anchor >= len(own):
        assert len(set(anchors.tolist())) == len(own)  # none twice, as long as there are others


def test_an_own_epoch_sees_other_anchors_each_time():
    one, other = (epoch_pairs(np.random.default_rng(seed), 4, 100, 4, own=True)[0][1] for seed in (1, 2))
    assert set(one.tolist()) != set(other.tolist())


def test_only_each_so_many_th_batch_has_anchors_and_the_own_images_stay_the_same():
    every, third = (epoch_pairs(np.random.default_rng(0), 20, 20, 2, anchor_every=k) for k in (1, 3))
    assert [len(a) for _, a in third] == [2, 0, 0, 2, 0, 0, 2, 0, 0, 2]
    assert all(np.array_equal(p, q) for (p, _), (q, _) in zip(every, third, strict=True))
    assert np.array_equal(every[3][1], third[3][1])


# ---------------------------------------------------------------- classes


@given(COUNTS)
def test_weighted_classes_count_alike_and_their_mean_over_the_images_is_one(counts: list[int]):
    labels = labels_of(counts)
    weights = class_weights(labels, len(counts)).astype(float)
    assert weights[labels].mean() == pytest.approx(1)
    totals = [weights[c] * n for c, n in enumerate(counts) if n]
    assert totals == pytest.approx([totals[0]] * len(totals))
    assert all(weights[c] == 0 for c, n in enumerate(counts) if not n)


def test_equal_classes_weigh_one():
    assert class_weights(labels_of([7, 7, 7]), 3).tolist() == [1, 1, 1]


@given(COUNTS, st.integers(0, 99))
def test_the_sampler_draws_only_images_that_are_there(counts: list[int], seed: int):
    labels = labels_of(counts)
    pairs = epoch_pairs(np.random.default_rng(seed), len(labels), 0, 4, balanced=labels)
    drawn = np.concatenate([p for p, _ in pairs])
    assert len(drawn) == max(len(labels), 2) and drawn.min() >= 0 and drawn.max() < len(labels)


def test_the_sampler_draws_each_class_as_often_and_each_of_its_images():
    labels = labels_of([900, 90, 10])
    rng = np.random.default_rng(0)
    drawn = np.concatenate([p for _ in range(9) for p, _ in epoch_pairs(rng, 1000, 0, 64, balanced=labels)])
    of_class = np.bincount(labels[drawn])
    assert abs(of_class - 3000).max() < 4 * (9000 * 2 / 9) ** 0.5  # four standard deviations
    assert abs(np.bincount(drawn)[990:] - 300).max() < 4 * 300**0.5


def test_the_sampler_follows_from_the_seed():
    labels = labels_of([30, 3])
    one, again, other = (
        epoch_pairs(np.random.default_rng(seed), 33, 5, 8, balanced=labels)[0][0].tolist() for seed in (1, 1, 2)
    )
    assert one == again != other


# ---------------------------------------------------------------- where the bytes lie


@pytest.mark.parametrize("colour", [False, True])
def test_images_that_lie_on_the_device_give_the_same_batches_as_the_memory_map(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, colour: bool
) -> None:
    """On the CPU that is forced here; a GPU's own bytes are not tested."""
    rng = np.random.default_rng(0)
    shape = (11, 16, 16, 3) if colour else (11, 16, 16)
    mapped = np.memmap(tmp_path / "images.u8", np.uint8, "w+", shape=shape)
    mapped[:] = rng.integers(0, 256, shape, dtype=np.uint8)
    monkeypatch.setattr(batches, "RESIDENT_BLOCK", 4)
    asleep = batches.Pixels(mapped, learning.CPU)
    assert asleep.resident is None
    monkeypatch.setattr(batches, "fits", lambda *_: True)
    there = batches.Pixels(mapped, learning.CPU)
    assert there.resident is not None and there.resident.dtype == torch.uint8
    changes = draw(Augment(flip=True, shift=0.1, brightness=0.2), np.random.default_rng(1), 5)
    where = np.array([7, 0, 10, 3, 3])
    for changed in (None, changes):
        assert torch.equal(there(where, changed), asleep(where, changed))


def test_the_constants_of_normalising_serve_training_after_scoring_made_them() -> None:
    batches._scale_on.cache_clear()
    with torch.inference_mode():
        first = batches.upload(np.zeros((1, 4, 4), np.uint8), learning.CPU)
    weight = torch.ones(1, 3, 4, 4, requires_grad=True)
    again = batches.upload(np.zeros((1, 4, 4), np.uint8), learning.CPU)
    (again * weight).sum().backward()
    assert weight.grad is not None and torch.equal(weight.grad, first)
