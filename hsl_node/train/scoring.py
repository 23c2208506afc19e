"""A model and images in, probabilities and metrics out.

The published model needs an anchor image beside each patient's. Here scoring uses one fixed *anchor reference*, the
mean anchor embedding over the whole anchor set in evaluation mode, so that a prediction is a function of the patient's
image alone. `anchor_pairing="random"` gives the published behaviour, to measure the difference.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hsl_node.errors import ConfigError, Diverged
from hsl_node.federation.plan import Plan
from hsl_node.train.batches import Indices, eval_slices, upload
from hsl_node.train.checkpoint import Validation
from hsl_node.train.data.sources import TEST, VALIDATION
from hsl_node.train.machine import Machine, derived_seed
from hsl_node.train.method import Method, Site
from hsl_node.train.methods import METHODS
from hsl_node.train.networks.backbone import use_precision
from hsl_node.train.state_dict import load_weights
from hsl_node.train.tasks import metrics
from hsl_node.train.tasks.classification import primary_loss, probabilities
from hsl_node.weights.checkpoint_file import read_weights

if TYPE_CHECKING:
    from hsl_node.train.data.anchor import AnchorSet
    from hsl_node.train.data.dataset import Dataset

EVAL_BATCH = 64  # images; fixed, so that a score doesn't depend on the plan's batch size

Tick = Callable[[int, int], None]  # (images done, images in total): progress and proof of life
Pairing = Literal["fixed", "random"]


@dataclass(frozen=True)
class Scores:
    """One model's answer to one set of images, in the set's order."""

    ids: tuple[str, ...]
    labels: NDArray[np.int64]  # (N,)
    probabilities: NDArray[np.float32]  # (N,) of class 1, or (N, C)
    metrics: metrics.Metrics


def score(
    weights: Path,
    dataset: Dataset,
    plan: Plan,
    machine: Machine,
    *,
    anchor: AnchorSet | None,
    split: int = TEST,
    anchor_pairing: Pairing = "fixed",
    tick: Tick = lambda done, total: None,
) -> Scores:
    """Score a weights file on one part of a dataset (0 train, 1 validation, 2 test)."""
    method, model = open_model(weights, plan, machine)
    where = np.flatnonzero(dataset.split == split)
    embedding = anchor_embedding(
        method, model, anchor, machine, count=len(where), seed=plan.seed, anchor_pairing=anchor_pairing
    )
    logits = forward(method, model, dataset.images, where, embedding, machine, tick)
    found = as_probabilities(logits)
    labels = dataset.labels[where]
    return Scores(tuple(dataset.ids[i] for i in where), labels, found, metrics.measure(labels, found))


def predict(
    weights: Path, images: NDArray[np.uint8], plan: Plan, machine: Machine, *, anchor: AnchorSet | None
) -> NDArray[np.float32]:
    """Probabilities of decoded images (N, S, S[, 3]) uint8: (N,) of class 1, or (N, C)."""
    method, model = open_model(weights, plan, machine)
    embedding = anchor_embedding(method, model, anchor, machine)
    return as_probabilities(forward(method, model, images, np.arange(len(images)), embedding, machine))


def open_model(weights: Path, plan: Plan, machine: Machine) -> tuple[Method, nn.Module]:
    """The plan's model with a checkpoint file's weights, ready to score."""
    method = METHODS[plan.method]
    model = place(method.build(plan), machine)
    load_weights(model, read_weights(weights), method.shared(model))
    return method, model.eval()


def place(model: nn.Module, machine: Machine) -> nn.Module:
    use_precision(model, machine.dtype)
    return model.to(device=machine.device, memory_format=machine.memory_format)  # type: ignore[call-overload, no-any-return]


def validate(site: Site, model: nn.Module, tick: Tick = lambda done, total: None) -> Validation:
    """AUC and loss on the validation set, with the fixed anchor reference; None where undefined."""
    where = site.indices(VALIDATION)
    if not len(where):
        return Validation(None, None)
    embedding = anchor_embedding(site.method, model, site.anchor, site.machine, tick=tick)
    logits = forward(site.method, model, site.dataset.images, where, embedding, site.machine, tick)
    labels = site.dataset.labels[where]
    loss = primary_loss(logits, torch.from_numpy(labels)).item()
    if not math.isfinite(loss):
        raise _spoilt("validation loss")
    return Validation(metrics.measure(labels, as_probabilities(logits)).auc, loss)


def anchor_embedding(
    method: Method,
    model: nn.Module,
    anchor: AnchorSet | None,
    machine: Machine,
    *,
    count: int = 0,
    seed: int = 0,
    anchor_pairing: Pairing = "fixed",
    tick: Tick = lambda done, total: None,
) -> Tensor | None:
    """The anchor reference (512,); `random`: (count, 512), of anchor images drawn at random; None: no anchor task."""
    if method.embed_anchor is None:
        return None
    if anchor is None:
        raise ConfigError(
            f"the method {method.name} scores with the anchor set, and there is none here",
            remedy="put anchor.safetensors into the state directory (`hsl-node anchor verify`)",
        )
    embed = method.embed_anchor
    everything = np.arange(len(anchor.images))
    feature = _run(model, lambda x, _: embed(model, x), anchor.images, everything, machine, tick)  # (M, 512)
    if anchor_pairing == "random":
        rng = np.random.default_rng(derived_seed(seed, "anchor pairing"))
        return feature[torch.from_numpy(rng.integers(len(feature), size=count))]
    return feature.double().mean(dim=0).float()


def forward(
    method: Method,
    model: nn.Module,
    images: NDArray[np.uint8],
    where: Indices,
    embedding: Tensor | None,
    machine: Machine,
    tick: Tick = lambda done, total: None,
) -> Tensor:
    """Primary logits (N, C) of the images at `where`, on the CPU.

    Raises:
        Diverged: a logit is not a finite number: the weights are spoilt.
    """
    reference = None if embedding is None else embedding.to(machine.device)

    def logits(image_BCHW: Tensor, at: slice) -> Tensor:
        beside = reference[at] if reference is not None and reference.ndim == 2 else reference
        return method.logits(model, image_BCHW, beside)

    found = _run(model, logits, images, where, machine, tick)
    if not bool(torch.isfinite(found).all()):
        raise _spoilt("output")
    return found


def _spoilt(what: str) -> Diverged:
    return Diverged(
        f"the model's {what} is not a finite number",
        remedy="training diverged: use a lower learning_rate in the plan, and look at the loss in `hsl-node logs`",
    )


def as_probabilities(logits: Tensor) -> NDArray[np.float32]:
    found: NDArray[np.float32] = probabilities(logits).numpy()
    return found


@torch.inference_mode()
def _run(
    model: nn.Module,
    function: Callable[[Tensor, slice], Tensor],
    images: NDArray[Any],
    where: Indices,
    machine: Machine,
    tick: Tick,
) -> Tensor:
    """Apply a function of (images, position) batch by batch in evaluation mode; rows stacked, on the CPU."""
    was_training = model.training
    model.eval()
    rows = []
    for at in eval_slices(len(where), EVAL_BATCH):
        rows.append(function(upload(images[where[at]], machine), at).cpu())
        tick(at.stop, len(where))
    model.train(was_training)
    return torch.cat(rows) if rows else torch.empty(0, 1)
