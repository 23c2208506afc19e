"""Densities of what a hospital's images are like: features of images, and Gaussian mixtures with diagonal covariance.

Shapes: N images, F features, K components.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float64]

COMPONENTS = 5
IMAGES_OF_A_COMPONENT = 10  # at least: one of a single image would tell that patient's features
STEPS = 100  # of expectation and maximisation
VARIANCE_MIN = 1e-3  # of the feature's variance
ROUNDING = 1e-3  # by which shares may add up to more than 1
THUMBNAIL = 16  # px
NO_STRENGTH = 1e-9  # of a principal component, as a share of the strongest's
AT_ONCE = 64  # images


Images = NDArray[np.uint8]  # (N, S, S[, 3])


def principal(of: Images, images: Images, features: int) -> Floats:
    """(N, F): thumbnails of `images` along the strongest principal components of those of `of`."""
    reference = in_parts(of, _thumbnails)
    strength, components = (v[..., : -features - 1 : -1] for v in np.linalg.eigh(np.cov(reference.T)))
    strongest = components[np.abs(components).argmax(axis=0), np.arange(features)]
    axes = components * np.sign(strongest)  # a component has no sign of its own: peers must choose the same
    axes = axes * (strength > strength[0] * NO_STRENGTH)  # nor, where there are few images, a direction
    found: Floats = (in_parts(images, _thumbnails) - reference.mean(axis=0)) @ axes
    return found


@torch.no_grad()
def in_parts(images: Images, function: Callable[[Images], Tensor]) -> Floats:
    """What a function says of each image, rows stacked."""
    parts = [function(images[at : at + AT_ONCE]).cpu().double() for at in range(0, len(images), AT_ONCE)]
    found: Floats = torch.cat(parts).numpy()
    return found


def _thumbnails(images: Images) -> Tensor:
    pixels = torch.from_numpy(np.ascontiguousarray(images)).float() / 255
    grey = pixels.mean(dim=3) if pixels.ndim == 4 else pixels
    return F.adaptive_avg_pool2d(grey.unsqueeze(1), THUMBNAIL).flatten(1)  # (B, 256)


@dataclass(frozen=True)
class Mixture:
    """Components without a share are not there."""

    share: Floats  # (K,)
    mean: Floats  # (K, F)
    variance: Floats  # (K, F)

    @property
    def sound(self) -> bool:
        """Is it a density? A variance of 0 would make all weights NaN, and shares of 1e9 drown everybody else's."""
        return bool(
            (self.share >= 0).all() and self.share.sum() <= 1 + ROUNDING and (self.variance[self.share > 0] > 0).all()
        )

    def log_density(self, x: Floats) -> Floats:
        """(N, F) -> (N,). In many dimensions densities themselves are 0 to a computer."""
        there = self.share > 0
        mean, variance = self.mean[there], self.variance[there]
        distance = ((x[:, None] - mean) ** 2 / variance).sum(axis=2)  # (N, K)
        constant = np.log(self.share[there]) - 0.5 * np.log(2 * math.pi * variance).sum(axis=1)
        return _log_sum_exp(constant - 0.5 * distance)


def fitted(x: Floats, seed: int) -> Mixture:
    """(N, F) -> a mixture of at most 5 components, each of ten images or more; of fewer than ten images none at all."""
    from sklearn.mixture import GaussianMixture  # half a second, and one method's alone

    features = x.shape[1]
    centre, spread = x.mean(axis=0), np.maximum(x.std(axis=0), 1e-12)
    scaled = (x - centre) / spread
    for components in range(min(COMPONENTS, len(x) // IMAGES_OF_A_COMPONENT), 0, -1):
        model = GaussianMixture(
            components,
            covariance_type="diag",
            reg_covar=VARIANCE_MIN,
            max_iter=STEPS,
            init_params="k-means++",
            random_state=seed % 2**32,
        ).fit(scaled)
        if model.weights_.min() * len(x) >= IMAGES_OF_A_COMPONENT or components == 1:
            missing = COMPONENTS - components
            return Mixture(
                np.pad(model.weights_, (0, missing)),
                np.pad(model.means_ * spread + centre, ((0, missing), (0, 0))),
                np.pad(model.covariances_ * spread**2, ((0, missing), (0, 0)), constant_values=1.0),
            )
    return Mixture(np.zeros(COMPONENTS), np.zeros((COMPONENTS, features)), np.ones((COMPONENTS, features)))


def joined(mixtures: Sequence[Mixture], samples: Sequence[int]) -> Mixture:
    """The density of all hospitals' images together: each mixture counts by its images, and an unsound one not."""
    counts = [n if mixture.sound and mixture.share.any() else 0 for n, mixture in zip(samples, mixtures, strict=True)]
    shares = [mixture.share * (n / max(sum(counts), 1)) for n, mixture in zip(counts, mixtures, strict=True)]
    return Mixture(
        np.concatenate(shares),
        np.concatenate([mixture.mean for mixture in mixtures]),
        np.concatenate([mixture.variance for mixture in mixtures]),
    )


def weights(x: Floats, own: Mixture, everybody: Mixture, most: float = 10.0) -> Floats:
    """(N, F) -> (N,), adding up to 1: how much more often such an image is met everywhere than here."""
    if not own.share.any():
        return np.full(len(x), 1 / len(x))
    ratio = np.exp(np.minimum(everybody.log_density(x) - own.log_density(x), math.log(most)))
    found: Floats = ratio / ratio.sum()
    return found


def resampled(weight: Floats, u: float) -> NDArray[np.int64]:
    """(N,) -> N positions: of each image as many as points (i + u) / N fall into its piece of the weights' sum."""
    count = len(weight)
    points = (np.arange(count) + u) / count
    return np.minimum(np.searchsorted(np.cumsum(weight), points, side="right"), count - 1).astype(np.int64)


def _log_sum_exp(x: Floats) -> Floats:
    highest = x.max(axis=1)
    found: Floats = highest + np.log(np.exp(x - highest[:, None]).sum(axis=1))
    return found
