"""Random changes of training images: shift, zoom, turn and flips in one resampling, then brightness and contrast.

Of the hospital's own images only: the anchor set is the same everywhere, and stays so. Everything is drawn by numpy
from the epoch's seed, one row of numbers for each image in the order of use. So it's the same after a resume and on
every machine, however the images are batched, and a setting that is switched on moves no other one's draws. Raw pixels
are changed, before they are normalised: what comes into the picture is black, as the bars of `fit = "pad"` are.

Shapes: B images, S pixels a side.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from hsl_node.federation.plan import UNALTERED, Augment
from hsl_node.train.hardware import moved

PER_IMAGE = 8  # numbers: two flips, two shifts, zoom, turn, brightness, contrast


@dataclass(frozen=True)
class Changes:
    """What becomes of each image of a batch."""

    source: NDArray[np.float32]  # (B, 2, 3): where in the image, -1..1, a point of the result comes from
    gain: NDArray[np.float32]  # (B,) factors of brightness
    contrast: NDArray[np.float32]  # (B,) factors of the distance from the image's mean
    moves: bool  # one of the first four settings is on
    tones: bool  # one of the last two is on


def draw(augment: Augment, rng: np.random.Generator, count: int) -> Changes | None:
    """The changes of the next `count` images. None, and nothing drawn, where the plan wants none."""
    if augment == UNALTERED:
        return None
    u = rng.random((count, PER_IMAGE))
    even = 2 * u - 1  # -1..1
    left_right = np.where(augment.flip & (u[:, 0] < 0.5), -1.0, 1.0)
    upright = np.where(augment.flip_upright & (u[:, 1] < 0.5), -1.0, 1.0)
    x, y = 2 * augment.shift * even[:, 2:4].T  # the side is 2 long
    zoom = 1 + augment.zoom * even[:, 4]
    angle = np.deg2rad(augment.turn * even[:, 5])
    cos, sin = np.cos(angle) / zoom, np.sin(angle) / zoom
    # Flipped, turned, zoomed, shifted: p' = zoom R F p + shift. So a point comes from p = F R' (p' - shift) / zoom.
    across = left_right[:, None] * np.stack([cos, sin, -(cos * x + sin * y)], axis=1)
    down = upright[:, None] * np.stack([-sin, cos, sin * x - cos * y], axis=1)
    return Changes(
        np.stack([across, down], axis=1).astype(np.float32),
        (1 + augment.brightness * even[:, 6]).astype(np.float32),
        (1 + augment.contrast * even[:, 7]).astype(np.float32),
        moves=augment.flip or augment.flip_upright or bool(augment.shift or augment.zoom or augment.turn),
        tones=bool(augment.brightness or augment.contrast),
    )


def change(pixels: Tensor, changes: Changes) -> Tensor:
    """(B, S, S[, 3]) in 0..255 -> the same shape, float32 in 0..255. Grey costs a third of colour."""
    colour = pixels.ndim == 4
    x = pixels.float()
    x = x.permute(0, 3, 1, 2) if colour else x.unsqueeze(1)  # (B, 1 or 3, S, S)
    if changes.moves:
        grid = F.affine_grid(moved(changes.source, x.device), list(x.shape), align_corners=False)
        x = F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    if changes.tones:
        gain, contrast = (moved(v, x.device).view(-1, 1, 1, 1) for v in (changes.gain, changes.contrast))
        mean = x.mean(dim=(1, 2, 3), keepdim=True)
        x = (gain * torch.lerp(mean, x, contrast)).clamp(0, 255)
    return x.permute(0, 2, 3, 1) if colour else x.squeeze(1)
