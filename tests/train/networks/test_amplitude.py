"""Amplitude normalisation: what changes, what stays, and what the running mean of a first round is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hsl_node.train.data.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from hsl_node.train.networks.amplitude import AmplitudeNorm, amplitude, with_amplitude


def pixels(count: int = 3, side: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def normalised(x: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(v, dtype=x.dtype).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (x - mean) / std


# ---------------------------------------------------------------- the change of an image


def test_without_a_box_it_is_a_shift_of_the_mean_by_hand():
    """METHODS, HarmoFL, point 8: an image of mean 1.875, a target of mean 2.4375."""
    image = torch.tensor([[1, 2, 3, 4], [0, 1, 2, 1], [2, 2, 2, 2], [1, 3, 2, 2]], dtype=torch.float64).view(1, 1, 4, 4)
    assert image.mean() == 1.875
    found = with_amplitude(image, torch.full((1, 1, 1), 16 * 2.4375, dtype=torch.float64))
    assert found[0, 0, 0].tolist() == [1.5625, 2.5625, 3.5625, 4.5625]


def test_the_shift_is_what_the_fourier_transform_gives():
    x, target = pixels(), amplitude(pixels(1, seed=5), 0)[0]
    spectrum = torch.fft.fft2(x)
    spectrum[..., 0, 0] = torch.polar(target[:, 0, 0].expand(3, 3), spectrum[..., 0, 0].angle())
    torch.testing.assert_close(with_amplitude(x, target), torch.fft.ifft2(spectrum).real, rtol=0, atol=1e-12)


@pytest.mark.parametrize("side", [8, 9])
@pytest.mark.parametrize("half", [0, 1, 3])
def test_an_image_with_its_own_amplitude_is_itself(half: int, side: int):
    x = pixels(1, side)
    torch.testing.assert_close(with_amplitude(x, amplitude(x, half)[0]), x, rtol=0, atol=1e-12)


@given(st.integers(1, 3), st.integers(8, 9), st.integers(0, 99))
def test_inside_the_box_amplitudes_are_the_targets_outside_nothing_changes_and_phases_stay(
    half: int, side: int, seed: int
):
    x, target = pixels(2, side, seed), amplitude(pixels(3, side, seed + 100), half).mean(dim=0)
    before, after = torch.fft.fft2(x), torch.fft.fft2(with_amplitude(x, target))
    torch.testing.assert_close(amplitude(with_amplitude(x, target), half), target.expand(2, -1, -1, -1))
    torch.testing.assert_close(after / after.abs(), before / before.abs())  # no phase moved: so it is a real image
    frequency = (torch.fft.fftfreq(side) * side).round()
    outside = (frequency.abs()[:, None] > half) | (frequency.abs()[None] > half)
    torch.testing.assert_close(after[..., outside], before[..., outside])


# ---------------------------------------------------------------- the layer


def test_the_running_mean_begins_with_the_first_batch_and_takes_a_tenth_of_each_later_one():
    """Zero frequency 30, then 48: 31.8. The published extension makes the momentum an integer, 0, and stays at 30."""
    layer = AmplitudeNorm(4, 0.0).double()
    layer.learning = True
    for total in (30.0, 48.0):
        layer(normalised(torch.full((2, 3, 4, 4), total / 16, dtype=torch.float64)))
    torch.testing.assert_close(layer.amplitude, torch.full((3, 1, 1), 31.8, dtype=torch.float64), rtol=1e-5, atol=0)
    assert layer.batches == 2


def test_before_the_first_batch_nothing_changes():
    image = normalised(pixels()).float()
    assert torch.equal(AmplitudeNorm(8, 0.25).eval()(image), image)


@pytest.mark.parametrize(("training", "learning"), [(True, False), (False, True)])
def test_it_learns_only_in_training_and_only_where_it_is_told_to(training: bool, learning: bool):
    layer = AmplitudeNorm(8, 0.25).train(training)
    layer.learning = learning
    layer(normalised(pixels()).float())
    assert layer.batches == 0 and not layer.amplitude.any()


def test_what_travels_is_the_box_alone():
    """A mean image's whole spectrum would say more of a small hospital's images than the method uses."""
    state = AmplitudeNorm(224, 0.0).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {"amplitude": (3, 1, 1), "batches": ()}
    assert AmplitudeNorm(224, 0.1).state_dict()["amplitude"].shape == (3, 45, 45)


def test_images_of_two_scanners_have_one_brightness_after_it():
    layer = AmplitudeNorm(8, 0.0)
    layer.learning = True
    dark, bright = normalised(pixels() * 0.4).float(), normalised(pixels() * 0.4 + 0.5).float()
    layer(torch.cat([dark, bright]))
    torch.testing.assert_close(layer(dark).mean(dim=(2, 3)), layer.eval()(bright).mean(dim=(2, 3)))
