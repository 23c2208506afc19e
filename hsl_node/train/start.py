"""What a round begins with: the files that the last exchange left, and the learner that is made of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from hsl_node.errors import Altered
from hsl_node.train.batches import Pixels
from hsl_node.train.hardware import Hardware
from hsl_node.train.method import Batch, Learner, Site, Start, Step, Tensors
from hsl_node.train.networks.backbone import use_precision
from hsl_node.train.site import initial_model
from hsl_node.train.state_dict import all_tensors, require_kinds
from hsl_node.weights.checkpoint_file import read_weights
from hsl_node.weights.whole import holds

V = TypeVar("V")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StartFiles:
    """Where the parts of `Start` lie, as the daemon says it in a job."""

    round: int  # that begins, from 1
    base: Path  # the fused model of the round before
    base_sha256: str
    said: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    samples: Mapping[str, int] = field(default_factory=dict)
    full_set: Mapping[str, Path] = field(default_factory=dict)
    mine: Path | None = None  # own_rNNNNNN of the round before
    mine_sha256: str | None = None


@dataclass(frozen=True)
class Training:
    """A round that is open: who learns, from what, and what the method keeps beside it."""

    learner: Learner
    start: Start
    beside: Any = None

    @cached_property
    def images(self) -> Pixels:
        return Pixels(self.learner.site.dataset.images, self.learner.site.hardware)

    @cached_property
    def anchors(self) -> Pixels | None:
        anchor = self.learner.site.anchor
        return Pixels(anchor.images, self.learner.site.hardware) if anchor else None

    def step(self, batch: Batch, seen: Mapping[str, float], share: float, epoch: int) -> Step:
        return Step(self.learner, batch, self.start, self.beside, seen, share, self.start.round, epoch)


def begin(site: Site, files: StartFiles) -> Training:
    """A round before its first step. Raises: as `adopted`."""
    learner, start = adopted(site, files)
    return Training(learner, start, site.method.beside(learner, start))


def adopted(site: Site, files: StartFiles) -> tuple[Learner, Start]:
    """A new learner with what this site makes of the fused model, before any step.

    Raises:
        Altered: the fused model is gone, or not the file it should be.
        FederationMismatch: its tensors are not those of this plan's model.
    """
    learner = new_learner(site)
    start = read_start(learner, files)
    site.method.adopt(learner, start)
    return learner, start


def new_learner(site: Site) -> Learner:
    """Model and optimizers on the device; what stays in a hospital has its first values, what travels is to be read."""
    model = site.method.network.build(site.plan)
    if site.method.travels(model) != all_tensors(model):
        model = initial_model(site.plan, site.method, site.backbone_weights)
    model = place(model, site.hardware)
    return Learner(site, model, site.method.optimizers(model, site.plan))


def read_start(learner: Learner, files: StartFiles) -> Start:
    require_model(files.base, files.base_sha256)
    model, device = learner.model, learner.device
    names = learner.site.method.travels(model)
    return Start(
        round=files.round,
        fused=_tensors(files.base, model, names, device),
        said=files.said,
        samples=files.samples,
        full_set=_Read(sorted(files.full_set), lambda peer: _tensors(files.full_set[peer], model, names, device)),
        mine=_mine(learner, files),
    )


def require_model(path: Path, sha256: str) -> None:
    """Raises: Altered: this is not the fused model with that sha256 (any more)."""
    if not holds(path, sha256):
        raise Altered(f"{path}, the fused model with sha256 {sha256[:12]}, is gone or altered on this disk")


def place(model: nn.Module, hardware: Hardware) -> nn.Module:
    use_precision(model, hardware.dtype)
    return model.to(device=hardware.device, memory_format=hardware.memory_format)  # type: ignore[call-overload, no-any-return]


def _mine(learner: Learner, files: StartFiles) -> Tensors:
    """As large as the model, and most methods never look: read when one does."""
    model, path, sha256 = learner.model, files.mine, files.mine_sha256
    if path is None or sha256 is None:
        return {}
    if not holds(path, sha256):
        log.warning("%s is gone or altered: the tensors that never leave this hospital begin anew", path.name)
        return {}
    names = all_tensors(model)
    whole = cache(lambda: _tensors(path, model, names, learner.device))
    return _Read(sorted(names), lambda name: whole()[name])


def _tensors(path: Path, model: nn.Module, names: frozenset[str], device: torch.device) -> Tensors:
    weights = read_weights(path)
    require_kinds(model, weights, names)
    return {name: torch.tensor(array, device=device) for name, array in weights.items()}


class _Read(Mapping[str, V]):
    """A mapping whose values are made when they are asked for."""

    def __init__(self, names: Iterable[str], read: Callable[[str], V]) -> None:
        self._names, self._read = dict.fromkeys(names), read

    def __getitem__(self, name: str) -> V:
        if name not in self._names:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
