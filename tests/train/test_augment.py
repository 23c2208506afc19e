"""Random changes of training images: what each setting does, that draws are the epoch's, and that none means none."""

from __future__ import annotations

from typing import Any

import learning
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hsl_node.federation.plan import UNALTERED, Augment
from hsl_node.train.augment import Changes, change, draw
from hsl_node.train.batches import upload

ALL = Augment(flip=True, flip_upright=True, shift=0.1, zoom=0.2, turn=15, brightness=0.2, contrast=0.3)


class Fixed:
    """A generator whose numbers are given: one row for each image."""

    def __init__(self, **columns: float) -> None:
        names = ("flip", "flip_upright", "x", "y", "zoom", "turn", "brightness", "contrast")
        self.row = [columns.get(name, 0.5) for name in names]  # 0.5: no flip, no change

    def random(self, shape: tuple[int, int]) -> np.ndarray:
        return np.tile(self.row, (shape[0], 1))


def altered(**only: float) -> Augment:
    return UNALTERED.model_copy(update=only)


def images(count: int = 4, size: int = 16, colour: bool = False, seed: int = 0) -> torch.Tensor:
    shape = (count, size, size, 3) if colour else (count, size, size)
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def changed(pixels: torch.Tensor, augment: Augment, **columns: float) -> torch.Tensor:
    rng: Any = Fixed(**columns)
    changes = draw(augment, rng, len(pixels))
    assert changes is not None
    return change(pixels, changes)


def close(found: torch.Tensor, wanted: torch.Tensor, within: float = 0.01) -> None:
    torch.testing.assert_close(found, wanted.float(), rtol=0, atol=within)


# ---------------------------------------------------------------- nothing


def test_without_a_setting_nothing_is_drawn_and_the_bytes_are_as_before():
    rng = np.random.default_rng(3)
    assert draw(UNALTERED, rng, 7) is None
    assert rng.random() == np.random.default_rng(3).random()
    pixels = images().numpy()
    assert torch.equal(upload(pixels, learning.CPU, None), upload(pixels, learning.CPU))


# ---------------------------------------------------------------- what each setting does


@pytest.mark.parametrize("colour", [False, True])
def test_each_flip_mirrors_its_own_axis_and_half_of_the_images(colour: bool):
    pixels = images(400, 8, colour)
    for augment, axis in ((altered(flip=True), 2), (altered(flip_upright=True), 1)):
        changes = draw(augment, np.random.default_rng(0), 400)
        assert changes is not None
        found, mirrored = change(pixels, changes), pixels.flip(axis).float()
        is_mirrored = (found - mirrored).abs().amax(dim=tuple(range(1, found.ndim))) < 0.01
        is_itself = (found - pixels).abs().amax(dim=tuple(range(1, found.ndim))) < 0.01
        assert bool((is_mirrored ^ is_itself).all())
        assert 160 < int(is_mirrored.sum()) < 240  # 200 +- 4 standard deviations of 10


def test_a_shift_by_whole_pixels_moves_them_and_brings_black():
    pixels = images(2, 16)
    found = changed(pixels, altered(shift=0.25), x=0.75, y=0.0)  # half of 0.25 x 16 px to the right; 4 px up
    wanted = torch.zeros(2, 16, 16)
    wanted[:, :12, 2:] = pixels[:, 4:, :14].float()
    close(found, wanted)


def test_a_turn_by_a_right_angle_is_that_of_the_array():
    pixels = images(2, 16)
    close(changed(pixels, altered(turn=90), turn=1.0), torch.rot90(pixels, -1, (1, 2)), 0.05)
    close(changed(pixels, altered(turn=90), turn=0.0), torch.rot90(pixels, 1, (1, 2)), 0.05)


def test_a_zoom_enlarges_about_the_middle():
    pixels = torch.zeros(1, 16, 16, dtype=torch.uint8)
    pixels[:, 6:10, 6:10] = 200  # a square of 4 px: of 6 px at 1.5, of 2 px at 0.5
    larger = changed(pixels, altered(zoom=0.5), zoom=1.0)
    smaller = changed(pixels, altered(zoom=0.5), zoom=0.0)
    assert larger.sum().item() == pytest.approx(200 * 36, rel=0.02)
    assert smaller.sum().item() == pytest.approx(200 * 4, rel=0.02)
    for found in (larger, smaller):
        close(found, found.flip(1))
        close(found, found.flip(2))


def test_a_flip_comes_before_a_turn_and_a_shift():
    """The order is part of what a seed means: p' = zoom R F p + shift."""
    pixels = images(1, 16)
    found = changed(pixels, altered(flip=True, turn=90, shift=0.25), flip=0.0, turn=1.0, x=1.0)
    wanted = torch.zeros(1, 16, 16)
    wanted[:, :, 4:] = torch.rot90(pixels.flip(2), -1, (1, 2))[:, :, :12].float()
    close(found, wanted, 0.05)


def test_brightness_is_a_factor_so_black_stays_black():
    pixels = images(2) // 2
    pixels[:, 0] = 0
    close(changed(pixels, altered(brightness=0.5), brightness=1.0), pixels * 1.5)
    close(changed(pixels, altered(brightness=0.5), brightness=0.0), pixels * 0.5)
    assert changed(torch.full((1, 4, 4), 250), altered(brightness=0.5), brightness=1.0).max() == 255


def test_contrast_keeps_each_images_mean():
    pixels = images(3) // 4 + 90  # 90..153: nothing is cut off
    found = changed(pixels, altered(contrast=0.5), contrast=1.0)
    close(found.mean((1, 2)), pixels.float().mean((1, 2)), 0.01)
    torch.testing.assert_close(found.std((1, 2)), 1.5 * pixels.float().std((1, 2)))


def test_grey_and_the_same_image_as_colour_are_changed_alike():
    pixels = images(6)
    changes = draw(ALL, np.random.default_rng(1), 6)
    assert changes is not None
    grey, colour = change(pixels, changes), change(pixels.unsqueeze(-1).expand(-1, -1, -1, 3), changes)
    assert grey.shape == pixels.shape and colour.shape == (*pixels.shape, 3)
    for channel in range(3):
        close(colour[..., channel], grey)


@given(
    st.builds(
        Augment,
        flip=st.booleans(),
        flip_upright=st.booleans(),
        shift=st.sampled_from([0.0, 0.5]),
        zoom=st.sampled_from([0.0, 0.5]),
        turn=st.sampled_from([0.0, 180.0]),
        brightness=st.sampled_from([0.0, 1.0]),
        contrast=st.sampled_from([0.0, 1.0]),
    ),
    st.integers(0, 2**32),
)
def test_pixels_stay_finite_and_within_their_range(augment: Augment, seed: int):
    changes = draw(augment, np.random.default_rng(seed), 3)
    if changes is not None:
        found = change(images(3, 8), changes)
        assert bool(torch.isfinite(found).all()) and found.min() >= 0 and found.max() <= 255.001


# ---------------------------------------------------------------- draws


def test_draws_do_not_depend_on_how_images_are_batched():
    whole = draw(ALL, np.random.default_rng(5), 12)
    rng = np.random.default_rng(5)
    parts = [draw(ALL, rng, n) for n in (5, 3, 4)]
    assert whole is not None
    for name in ("source", "gain", "contrast"):
        joined = np.concatenate([getattr(part, name) for part in parts])
        assert np.array_equal(getattr(whole, name), joined)


def test_a_setting_that_is_switched_on_moves_no_other_ones_draws():
    few, more = (draw(a, np.random.default_rng(5), 9) for a in (altered(brightness=0.2), ALL))
    assert few is not None and more is not None
    assert np.array_equal(few.gain, more.gain)


def test_draws_of_a_seed_are_the_same_everywhere():
    """Worked out once; another machine, or numpy, that gives others would train another model."""
    changes = draw(ALL, np.random.default_rng(0), 1)
    assert isinstance(changes, Changes)
    u = np.array([0.636962, 0.269787, 0.040974, 0.016528, 0.813270, 0.912756, 0.606636, 0.729497])
    zoom, angle = 1 + 0.2 * (2 * u[4] - 1), np.deg2rad(15 * (2 * u[5] - 1))
    cos, sin = np.cos(angle) / zoom, np.sin(angle) / zoom
    x, y = 0.2 * (2 * u[2] - 1), 0.2 * (2 * u[3] - 1)
    by_hand = [[cos, sin, -cos * x - sin * y], [sin, -cos, -sin * x + cos * y]]  # flipped up-down only: u[1] < 0.5
    np.testing.assert_allclose(changes.source[0], by_hand, atol=1e-5)
    assert changes.gain[0] == pytest.approx(1 + 0.2 * (2 * u[6] - 1), abs=1e-5)
    assert changes.contrast[0] == pytest.approx(1 + 0.3 * (2 * u[7] - 1), abs=1e-5)
