"""Which images make a batch, and how uint8 pixels become normalised floats on the device.

Shapes: B images, S pixels a side; images lie as (N, S, S) grey or (N, S, S, 3) colour, uint8, usually memory-mapped.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hsl_node.train.augment import Changes, change
from hsl_node.train.data.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from hsl_node.train.hardware import Hardware, moved

Indices = NDArray[np.int64]

RESIDENT_SHARE = 0.4  # of a GPU's free memory, for one set's bytes: training and another set have room beside it
RESIDENT_BLOCK = 1024  # images copied there at once


@dataclass(frozen=True)
class Batch:
    """B images and, where the network has a reference, B anchor images beside them."""

    image: Tensor  # (B, 3, S, S)
    target: Tensor  # (B,) int64, the class
    where: Indices  # (B,) positions in the training set
    anchor: Tensor | None = None  # (B, 3, S, S)
    anchor_label: Tensor | None = None  # (B,) int64, 0 or 1

    def part(self, at: slice) -> Batch:
        beside = (None if x is None else x[at] for x in (self.anchor, self.anchor_label))
        return Batch(self.image[at], self.target[at], self.where[at], *beside)


def epoch_pairs(
    rng: np.random.Generator,
    primary: int,
    anchor: int,
    batch_size: int,
    *,
    own: bool = False,
    anchor_every: int = 1,
    balanced: NDArray[np.int64] | None = None,
) -> list[tuple[Indices, Indices]]:
    """Positions in both sets, batch by batch, for one epoch: one pass over the longer set, the shorter one cycled.

    Each set is shuffled on its own, anew for each pass. `anchor = 0`: no anchor task. A single image left over joins
    the batch before it, since BatchNorm can't work with one.

    own: one pass over the primary set instead, with as many anchor images drawn as it needs.
    anchor_every: only each so-many-th batch, the first one too, has anchor images.
    balanced: the primary images' labels (N,): a class is drawn, then one of its images, with replacement.

    >>> pairs = epoch_pairs(np.random.default_rng(0), 5, 3, 2)
    >>> [len(p) for p, a in pairs], sorted(np.concatenate([p for p, a in pairs]).tolist())
    ([2, 3], [0, 1, 2, 3, 4])
    """
    length = max(primary, 2) if own else max(primary, anchor, 2)
    p = _cycled(rng, primary, length) if balanced is None else _balanced(rng, balanced, length)
    a = _cycled(rng, anchor, length) if anchor else np.empty(0, np.int64)
    starts = [s for s in range(0, length, batch_size) if length - s >= 2]
    ends = [*starts[1:], length]
    return [
        (p[s:e], a[s:e] if number % anchor_every == 0 else a[:0])
        for number, (s, e) in enumerate(zip(starts, ends, strict=True))
    ]


def class_weights(labels: NDArray[np.int64], classes: int) -> NDArray[np.float32]:
    """(C,): factors of each class's loss by which all classes count alike; their mean over the images is 1.

    A class without images weighs nothing: the others share.

    >>> class_weights(np.array([0, 0, 0, 1]), 2).tolist()
    [0.6666666865348816, 2.0]
    """
    counts = np.bincount(labels, minlength=classes)
    present = counts > 0
    weights = np.zeros(classes)
    weights[present] = len(labels) / (present.sum() * counts[present])
    return weights.astype(np.float32)


def upload(images: NDArray[np.uint8], hardware: Hardware, changes: Changes | None = None) -> Tensor:
    """(B, S, S[, 3]) uint8 -> (B, 3, S, S) float32, changed where training asks for it, normalised, on the device.

    The bytes travel, a quarter to a twelfth of the floats. Grey becomes three channels in the one pass that normalises,
    and the result is born channels-last, so neither costs a copy.
    """
    return _ready(moved(images, hardware.device), hardware, changes)


class Pixels:
    """A set's images, as bytes: on a GPU they lie there for the whole round, where they fit, and only their positions
    travel with each batch; else they stay in the memory map."""

    def __init__(self, images: NDArray[np.uint8], hardware: Hardware) -> None:
        self.images, self.hardware = images, hardware
        self.resident = resident(images, hardware.device) if fits(images.nbytes, hardware.device) else None

    def __call__(self, where: Indices, changes: Changes | None = None) -> Tensor:
        """Positions (B,) -> (B, 3, S, S), as `upload` gives it."""
        if self.resident is None:
            return upload(self.images[where], self.hardware, changes)
        return _ready(self.resident[moved(where, self.resident.device)], self.hardware, changes)


def fits(size: int, device: torch.device) -> bool:
    """Only a GPU has memory of its own; what a model's step needs is many times its parameters, and unknown here."""
    return device.type == "cuda" and size < RESIDENT_SHARE * torch.cuda.mem_get_info(device)[0]


def resident(images: NDArray[np.uint8], device: torch.device) -> Tensor:
    """Copied in blocks: the set may be larger than the machine's memory."""
    found = torch.empty(images.shape, dtype=torch.uint8, device=device)
    for start in range(0, len(images), RESIDENT_BLOCK):
        found[start : start + RESIDENT_BLOCK] = torch.from_numpy(np.array(images[start : start + RESIDENT_BLOCK]))
    return found


def _ready(pixels: Tensor, hardware: Hardware, changes: Changes | None) -> Tensor:
    if changes is not None:
        pixels = change(pixels, changes)
    return normalise(pixels, _scale_on(pixels.device)).contiguous(memory_format=hardware.memory_format)


def normalise(pixels: Tensor, scale: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """(B, S, S[, 3]) in 0..255 -> (B, 3, S, S) float32 with ImageNet's mean and deviation per channel."""
    shift, factor = scale or _scale(pixels.device)
    if pixels.ndim == 3:
        pixels = pixels.unsqueeze(-1)  # (B, S, S, 1)
    return torch.addcmul(shift, pixels.float(), factor).permute(0, 3, 1, 2)


def _scale(device: torch.device) -> tuple[Tensor, Tensor]:
    std, mean = torch.tensor(IMAGENET_STD), torch.tensor(IMAGENET_MEAN)
    return (-mean / std).to(device), (1 / (255 * std)).to(device)


@cache
def _scale_on(device: torch.device) -> tuple[Tensor, Tensor]:
    """Made once for a device: making them anew waits for it in every batch."""
    with torch.inference_mode(False):  # made in scoring, they serve training too
        return _scale(device)


def _cycled(rng: np.random.Generator, count: int, length: int) -> Indices:
    passes = -(-length // count)
    return np.concatenate([rng.permutation(count) for _ in range(passes)])[:length]


def _balanced(rng: np.random.Generator, labels: NDArray[np.int64], length: int) -> Indices:
    members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    of = rng.integers(len(members), size=length)
    which = rng.integers(np.array([len(m) for m in members])[of])
    return np.array([members[c][i] for c, i in zip(of, which, strict=True)], np.int64)
