"""FedKTL's parts: a frame that all classifiers share, prototypes, a generator, and the map from one to the other.

Shapes: C classes, P prototypes of all peers, D numbers of a latent, F features of the trunk.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from hsl_node.federation.plan import Plan
from hsl_node.train.batches import normalise
from hsl_node.train.networks.backbone import Trunk
from hsl_node.train.networks.initial import stream
from hsl_node.train.tasks.classification import outputs

SCALE, MARGIN = 64.0, 0.5  # ArcFace's, as published
STEEPEST = 1 - 1e-7  # acos has an infinite slope at 1
BANDWIDTHS = (10.0, 15.0, 20.0, 50.0)
ALIGNING_STEPS, ALIGNING_RATE, ALIGNING_WIDTH = 100, 0.01, 64
ANCHORS = 256  # images of the anchor set that the stand-in generator is made of


class TransferNetwork(nn.Module):
    """A trunk whose features are projected to C numbers and compared with a fixed frame: (B, 3, S, S) -> logits."""

    frame: Tensor  # (C, C)
    prototypes: Tensor  # (C, C) unit rows; 0: no image of the class
    gathered: Tensor  # (C, C) sums of an epoch
    gathered_in: Tensor  # which epoch of the run

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        classes, latent = len(plan.classes), int(plan.settings["latent"])
        self.two = outputs(plan) == 1
        self.trunk = Trunk(plan.backbone, plan.norm, plan.image_size)
        self.project = nn.Linear(self.trunk.features, classes)
        self.tell = nn.Linear(self.trunk.features, latent)  # features of a generated image -> its latent
        turned = np.linalg.qr(stream(plan.seed, "frame").standard_normal((classes, classes)))[0]
        self.register_buffer("frame", frame(torch.from_numpy(turned).float()), persistent=False)
        self.register_buffer("prototypes", torch.zeros(classes, classes))
        self.register_buffer("gathered", torch.zeros(classes, classes))
        self.register_buffer("gathered_in", torch.zeros((), dtype=torch.int64))

    def forward(self, image_BCHW: Tensor) -> Tensor:
        return self.asked(SCALE * self.cosines(self.trunk(image_BCHW)))

    def asked(self, logits: Tensor) -> Tensor:
        """(B, C) -> as the task has them: (B, 1) of two classes."""
        return logits[:, 1:] - logits[:, :1] if self.two else logits

    def cosines(self, feature: Tensor) -> Tensor:
        """(B, F) -> (B, C): the cosine to each class's direction."""
        return F.normalize(self.project(feature)) @ self.frame

    @torch.no_grad()
    def gather(self, image_BCHW: Tensor, target: Tensor, epoch: int) -> None:
        """Add a batch to its classes' prototypes: the unit mean of unit projections. A new epoch begins anew."""
        self.gathered.copy_(torch.where(self.gathered_in == epoch, self.gathered, 0))  # an `if` waits for the device
        self.gathered_in.fill_(epoch)
        self.gathered.index_add_(0, target, F.normalize(self.project(self.trunk(image_BCHW))))
        self.prototypes.copy_(F.normalize(self.gathered))


def frame(turned: Tensor) -> Tensor:
    """The simplex equiangular tight frame: (C, C) orthogonal -> C unit columns, every two with cosine -1 / (C - 1)."""
    count = len(turned)
    return math.sqrt(count / (count - 1)) * turned @ (torch.eye(count) - 1 / count)


def widened(cosines: Tensor, target: Tensor) -> Tensor:
    """ArcFace's logits: scaled cosines, the right class's angle made larger by the margin; (B, C), (B,) -> (B, C)."""
    angle = torch.acos(cosines.clamp(-STEEPEST, STEEPEST))
    return SCALE * torch.cos(angle + MARGIN * F.one_hot(target, cosines.shape[1]))


def mmd(x: Tensor, y: Tensor) -> Tensor:
    """How far two samples are apart, (n, D) and (m, D): maximum mean discrepancy under a sum of Gaussian kernels."""

    def alike(a: Tensor, b: Tensor) -> Tensor:
        apart = (a[:, None] - b[None]).square().sum(2)
        return torch.stack([torch.exp(-apart / (2 * width)) for width in BANDWIDTHS]).sum(0).mean()

    return alike(x, x) + alike(y, y) - 2 * alike(x, y)


@dataclass(frozen=True)
class Generator:
    """The stand-in: principal components of the anchor set. A latent is standard normal: (n, D) -> n images."""

    mean: NDArray[np.float64]  # (S * S,) grey values
    basis: NDArray[np.float64]  # (D, S * S), each as long as the deviation along it
    side: int

    @property
    def latent(self) -> int:
        return len(self.basis)

    @classmethod
    def of_anchor(cls, images: NDArray[np.uint8], latent: int) -> Generator:
        grey = images[:ANCHORS].reshape(min(len(images), ANCHORS), images.shape[1], images.shape[2], -1).mean(3)
        flat = grey.reshape(len(grey), -1)
        mean = flat.mean(0)
        values, vectors = np.linalg.eigh((flat - mean) @ (flat - mean).T)  # as many as images, not as pixels
        best = np.argsort(values)[::-1][:latent]
        basis = vectors[:, best].T @ (flat - mean) / math.sqrt(len(flat))
        signs = np.sign(basis[np.arange(len(basis)), np.abs(basis).argmax(1)])
        return cls(mean, basis * signs[:, None], images.shape[1])

    def __call__(self, latents: Tensor) -> Tensor:
        """(n, D) -> (n, 3, S, S), normalised as all images are."""
        grey = self.mean + latents.double().numpy() @ self.basis
        pixels = np.clip(grey, 0, 255).reshape(-1, self.side, self.side)
        return normalise(torch.from_numpy(pixels).float())


def aligned(prototypes: Sequence[Tensor], latent: int, seed: int) -> Tensor:
    """Latents (C, D) of the classes: a small net learns to map all peers' prototypes, each (C, C), to where latents
    lie, those of a class together; a class's latent is the centre of its mapped prototypes. NaN: nobody has the class.
    """
    given = F.normalize(torch.stack([p.double().cpu() for p in prototypes]), dim=2)  # (K, C, C); a peer may send any
    there = given.abs().sum(2) > 0  # (K, C)
    known, label = given[there], there.nonzero()[:, 1]
    if len(known) == 1:  # of which there are no batch statistics
        known, label = known.repeat(2, 1), label.repeat(2)
    rng = torch.Generator().manual_seed(seed)
    widen, narrow = nn.Linear(given.shape[2], ALIGNING_WIDTH), nn.Linear(ALIGNING_WIDTH, latent)
    for layer in (widen, narrow):
        bound = 1 / math.sqrt(layer.in_features)
        for parameter in layer.parameters():
            nn.init.uniform_(parameter, -bound, bound, generator=rng)
    net = nn.Sequential(widen, nn.BatchNorm1d(ALIGNING_WIDTH), nn.ReLU(), narrow).double()
    optimizer = torch.optim.Adam(net.parameters(), lr=ALIGNING_RATE)
    for _ in range(ALIGNING_STEPS):
        mapped = net(known)
        drawn = torch.randn(len(known), latent, generator=rng, dtype=torch.float64)
        loss = mmd(mapped, drawn) + F.mse_loss(mapped, _centres(mapped, label, given.shape[1])[label])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    with torch.no_grad():
        return _centres(net(known), label, given.shape[1]).float()


def _centres(mapped: Tensor, label: Tensor, classes: int) -> Tensor:
    return torch.stack([mapped[label == c].mean(0) for c in range(classes)])
