"""A learning method is a value: what happens between two exchanges.

What all methods have in common (initial values, epochs, seeds, schedule, choice of the best epoch, going on after a
kill) is in loop.py and is not theirs to write. A method touches neither the store nor the wire.

Shapes: B images in a batch, S pixels a side, C outputs, F features of a reference.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from hsl_node.errors import ConfigError
from hsl_node.federation.plan import Plan
from hsl_node.train.batches import Batch as Batch
from hsl_node.train.batches import Indices as Indices
from hsl_node.train.batches import class_weights
from hsl_node.train.data.anchor import AnchorSet
from hsl_node.train.data.dataset import Dataset
from hsl_node.train.data.sources import TRAIN
from hsl_node.train.hardware import Hardware
from hsl_node.train.optimizers import by_plan
from hsl_node.train.state_dict import all_tensors as all_tensors
from hsl_node.train.task import Task
from hsl_node.train.tasks import TASKS

Terms = Mapping[str, Tensor]  # the parts of a loss by name, each (); their sum is minimised, and each is shown
Tensors = Mapping[str, Tensor]  # by the names of a state_dict, on the learner's device


@dataclass(frozen=True)
class Network:
    """How a model is built and asked. `ask` is all that scoring and export use."""

    build: Callable[[Plan], nn.Module]  # the architecture; values come from networks/initial.py
    ask: Callable[[nn.Module, Tensor, Tensor | None], Tensor] = lambda model, image, _reference: model(image)
    """(B, 3, S, S), a reference (F,) or (B, F) -> (B, C)"""
    reference: Callable[[nn.Module, Tensor], Tensor] | None = None
    """An anchor image's embedding, (B, 3, S, S) -> (B, F), which `ask` gets beside each image; None: it needs none"""
    at_home: Callable[[nn.Module], frozenset[str]] = lambda model: frozenset()
    """Names of tensors that `ask` does not look at, and that tell of images or other hospitals: zeros in a model that
    is taken away"""


@dataclass(frozen=True)
class Start:
    """What the last exchange left, of files that a killed process finds again: a resumed round has the same."""

    round: int  # that begins, from 1
    fused: Tensors  # the tensors that travelled, as everybody has them; training never changes them
    said: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # peer -> its signed numbers
    samples: Mapping[str, int] = field(default_factory=dict)  # peer -> its training images
    full_set: Mapping[str, Tensors] = field(default_factory=dict)  # where the card asks for it; read anew each time
    mine: Tensors = field(default_factory=dict)  # ALL tensors of the epoch that this site sent
    # These four are of the exchange that made `fused`: all empty in round 1.


@dataclass
class Learner:
    """What lives from epoch to epoch. Model and optimizers are in the epoch checkpoint, and nothing else is."""

    site: Site
    model: nn.Module  # what stays here (own heads, own norms, a policy) are tensors of it like any other
    optimizers: dict[str, Optimizer]
    together: DistributedDataParallel | None = None  # the model as several devices call it (devices.py)

    @property
    def me(self) -> str:
        return self.site.peer

    @property
    def plan(self) -> Plan:
        return self.site.plan

    @cached_property
    def task(self) -> Task:
        """The site's, with its classes weighted where the plan says so. For the anchor set: `site.task`."""
        plan, task = self.plan, self.site.task
        if plan.class_balance != "weights":
            return task
        labels = self.site.dataset.labels[self.site.indices(TRAIN)]
        weights = torch.from_numpy(class_weights(labels, len(plan.classes))).to(self.device)
        return replace(task, loss=partial(task.loss, weights=weights))

    @property
    def settings(self) -> Mapping[str, Any]:
        """The method's own, of `[plan.NAME]`."""
        return self.site.settings

    @property
    def device(self) -> torch.device:
        return self.site.hardware.device


@dataclass(frozen=True)
class Step:
    """One batch, and all that a loss may look at."""

    learner: Learner
    batch: Batch
    start: Start
    beside: Any  # what `Method.beside` gave for this round
    seen: Mapping[str, float]  # mean terms of this epoch's passes before this one
    share: float  # of this pass's images that are in this batch
    round: int
    epoch: int  # within the round, from 1

    @property
    def model(self) -> nn.Module:
        return self.learner.model

    @property
    def settings(self) -> Mapping[str, Any]:
        return self.learner.settings

    @property
    def task(self) -> Task:
        return self.learner.task


Loss = Callable[[Step], "Terms | None"]  # None: this batch is skipped
Update = Callable[[Step], "Terms | None"]  # moves the model; the terms are without gradients


@dataclass(frozen=True)
class Done:
    """A round's training up to the epoch that is sent, whose weights the learner has while `Method.says` is asked."""

    epoch: int  # the chosen one, from 1
    steps: tuple[int, ...]  # optimiser steps of each epoch up to it
    rates: tuple[float, ...]  # learning rate of each
    terms: Mapping[str, float]  # the mean loss terms of the chosen epoch
    score: float | None  # ... and what its validation gave
    loss: float | None


# ---------------------------------------------------------------- losses


def task_loss(step: Step) -> Terms:
    """The hospital's own task on its own images."""
    network, batch = step.learner.site.method.network, step.batch
    reference = (
        None if network.reference is None or batch.anchor is None else network.reference(step.model, batch.anchor)
    )
    return {"primary": step.task.loss(network.ask(step.model, batch.image, reference), batch.target)}


def plus(*losses: Loss) -> Loss:
    """All terms of these losses; skipped where one of them is."""

    def together(step: Step) -> Terms | None:
        found: dict[str, Tensor] = {}
        for loss in losses:
            terms = loss(step)
            if terms is None:
                return None
            found |= terms
        return found

    return together


# ---------------------------------------------------------------- which tensors travel


def norm_tensors(model: nn.Module) -> frozenset[str]:
    """Every tensor of every normalisation layer, found by type: a name such as "downsample.1" tells nothing."""
    kinds = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)
    return frozenset(
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if isinstance(module, kinds)
        for name in module.state_dict()
    )


def beginning(*starts: str) -> Callable[[nn.Module], frozenset[str]]:
    """For `all_but` and `at_home`: the tensors whose names begin so."""
    return lambda model: frozenset(name for name in model.state_dict() if name.startswith(starts))


def all_but(*kept: Callable[[nn.Module], frozenset[str]]) -> Callable[[nn.Module], frozenset[str]]:
    """For `travels`: every tensor but those that one of `kept` names, which stay in this hospital.

    Raises (when asked): ConfigError: there are none. FedBN of a network without norm layers would be FedAvg, unnoticed.
    """

    def travels(model: nn.Module) -> frozenset[str]:
        staying: frozenset[str] = frozenset().union(*(names(model) for names in kept))
        if not staying:
            raise ConfigError(
                "the plan's backbone has none of the tensors that its method keeps in the hospital",
                remedy="take another backbone, or another method",
            )
        return all_tensors(model) - staying

    return travels


# ---------------------------------------------------------------- how a round begins


@torch.no_grad()
def put(model: nn.Module, tensors: Tensors) -> None:
    """Copy these tensors into the model's of the same names; the others stay."""
    state = model.state_dict()
    for name, tensor in tensors.items():
        state[name].copy_(tensor)


def take_fused(learner: Learner, start: Start) -> None:
    """What travelled is as everybody has it; what stays is that of the epoch that was sent."""
    put(learner.model, {name: start.mine[name] for name in start.mine if name not in start.fused})
    put(learner.model, start.fused)


def fused_model(learner: Learner, start: Start) -> nn.Module:
    """The model that this round begins with, frozen. For `beside`, where the learner has not trained yet."""
    model = copy.deepcopy(learner.model)
    put(model, start.fused)
    return model.eval().requires_grad_(False)


def nothing(learner: Learner, start: Start) -> None:
    """Nothing is kept beside the model."""


def nothing_said(learner: Learner, start: Start, done: Done) -> Mapping[str, float]:
    return {}


@dataclass(frozen=True)
class Method:
    """Between two exchanges. All peers run the same one, with the same settings.

    In each round: `adopt`, `beside`, then every epoch all `passes`, then `says`. Its card (federation/methods.py) has
    what must be known without torch: needs, numbers said, settings, the authors' fusion rule.
    """

    name: str
    network: Network
    passes: tuple[Update, ...]  # over the site's images, in each epoch, one after the other (updates.py)
    optimizers: Callable[[nn.Module, Plan], dict[str, Optimizer]] = by_plan  # "main" follows the plan's rate
    travels: Callable[[nn.Module], frozenset[str]] = all_tensors  # names of the tensors that may leave the hospital
    adopt: Callable[[Learner, Start], None] = take_fused  # what this site makes of the fused model, first of all
    beside: Callable[[Learner, Start], Any] = nothing  # then, once a round and again after a kill: frozen copies
    samples: Callable[[Learner, Start, Any, int], Indices] | None = None
    """(.., beside, epoch) -> positions in the training set that this epoch has; None: all"""
    forgets: bool = False  # its optimizers begin each round anew, whatever the plan keeps
    epochs: Callable[[Plan, int], int] = lambda plan, round: plan.epochs_per_round
    require: Callable[[Site], object] = lambda site: None  # before all else. Raises: ConfigError: a file is not here
    says: Callable[[Learner, Start, Done], Mapping[str, float]] = nothing_said  # the numbers of its card
    one_device: str = ""  # why several devices can't compute its batches together, in parts


@dataclass(frozen=True)
class Site:
    """What one hospital trains with."""

    peer: str
    run: str  # digest of the federation: an epoch checkpoint of another run is never resumed
    plan: Plan
    method: Method
    dataset: Dataset
    anchor: AnchorSet | None
    hardware: Hardware
    backbone_weights: Path | None = None  # the local file that the plan names by its digest
    generator: Path | None = None  # likewise, of fedktl
    micro_batch: int = 0  # images that this machine computes with at once; 0: the plan's batch

    @property
    def task(self) -> Task:
        return TASKS[self.plan.card.task]

    @property
    def settings(self) -> Mapping[str, Any]:
        return self.plan.settings

    def indices(self, split: int) -> Indices:
        return np.flatnonzero(self.dataset.split == split)
