"""A model and images in, probabilities and metrics out.

The published model needs an anchor image beside each patient's. Here scoring uses one fixed *anchor reference*, the
mean anchor embedding over the whole anchor set in evaluation mode, so that a prediction is a function of the patient's
image alone. `pairing="random"` gives the published behaviour, to measure the difference. Where epochs and fused models
are only compared, a fixed part of the anchor set stands for all of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hsl_node.errors import ConfigError, Diverged
from hsl_node.federation.plan import Plan
from hsl_node.train.batches import Indices, upload
from hsl_node.train.checkpoint import Validation
from hsl_node.train.data.anchor import AnchorSet
from hsl_node.train.data.sources import VALIDATION
from hsl_node.train.hardware import Hardware, derived_seed
from hsl_node.train.method import Method, Site
from hsl_node.train.methods import method_of
from hsl_node.train.progress import Progress, unheard
from hsl_node.train.recalibrate import recalibrated
from hsl_node.train.start import StartFiles, adopted, place
from hsl_node.train.state_dict import all_tensors, load_weights
from hsl_node.train.tasks.classification import log_odds, probabilities
from hsl_node.weights.checkpoint_file import read_weights

COMPARED_ANCHORS = 128  # the mean over these stands for that over all, after every epoch; evaluate and export take all
EVAL_BATCH = 64  # images; fixed, so that a score doesn't depend on the plan's batch size

Pairing = Literal["fixed", "random"]


def validate(site: Site, model: nn.Module, tick: Progress = unheard) -> Validation:
    """Score and loss on the validation set, with the fixed anchor reference; None where undefined."""
    labels = torch.from_numpy(site.dataset.labels[site.indices(VALIDATION)])
    if not len(labels):
        return Validation(None, None)
    found = answers(site, model, VALIDATION, anchors=COMPARED_ANCHORS, tick=tick)
    loss = site.task.loss(found, labels).item()
    if not math.isfinite(loss):
        raise _spoilt("validation loss")
    return Validation(site.task.score(found, labels), loss)


def open_model(weights: Path, plan: Plan, hardware: Hardware) -> tuple[Method, nn.Module]:
    """The plan's model from a file of all its tensors (own, alone), ready to score. A fused file is one only where
    nothing stays in the hospital: else see `open_fused`."""
    method = method_of(plan.method)
    model = place(method.network.build(plan), hardware)
    load_weights(model, read_weights(weights), all_tensors(model))
    return method, model.eval()


def open_fused(site: Site, files: StartFiles, *, recalibrate: bool, tick: Progress = unheard) -> nn.Module:
    """A fused model as this hospital uses it, ready to score: as the next round would begin with it, and where asked
    with BatchNorm statistics of its own training images. Raises: as `adopted`."""
    model = adopted(site, files)[0].model.eval()
    return recalibrated(model, site, tick) if recalibrate else model


def answers(
    site: Site,
    model: nn.Module,
    split: int,
    *,
    pairing: Pairing = "fixed",
    anchors: int | None = None,
    tick: Progress = unheard,
) -> Tensor:
    """What a model says of one part of the site's images (0 train, 1 validation, 2 test), in the set's order: logits
    (N, C), on the CPU, which `as_probabilities` and `as_log_odds` make readable.

    `anchors`: the reference is the mean over so many anchor images, always the same ones at every peer; None: over all.
    """
    where, pairs, among = site.indices(split), None, None
    if anchors is not None and site.anchor is not None:
        order = np.random.default_rng(derived_seed(site.plan.seed, "anchor reference"))
        among = np.sort(order.permutation(len(site.anchor.images))[:anchors])
    if pairing == "random" and site.anchor is not None:
        rng = np.random.default_rng(derived_seed(site.plan.seed, "anchor pairing"))
        pairs = rng.integers(len(site.anchor.images), size=len(where))
    embedding = anchor_embedding(site.method, model, site.anchor, site.hardware, pairs, tick, among)
    return forward(site.method, model, site.dataset.images, where, embedding, site.hardware, tick)


def anchor_embedding(
    method: Method,
    model: nn.Module,
    anchor: AnchorSet | None,
    hardware: Hardware,
    pairs: Indices | None = None,
    tick: Progress = unheard,
    among: Indices | None = None,
) -> Tensor | None:
    """The anchor reference (F,), the mean over the anchor set or over the images at `among`; with `pairs` the embedding
    of each of these anchor images (N, F); None: it needs none."""
    embed = method.network.reference
    if embed is None:
        return None
    if anchor is None:
        raise ConfigError(
            f"the method {method.name} scores with the anchor set, and there is none here",
            remedy="put anchor.safetensors into the state directory (`hsl-node anchor verify`)",
        )
    where = np.arange(len(anchor.images)) if among is None else among
    mixed = np.random.default_rng(0).permutation(len(where))  # a shared encoder normalises by batch: not class by class
    feature = _run(model, lambda x, _: embed(model, x), anchor.images, where[mixed], hardware, tick)  # (M, F)
    return (
        feature.double().mean(dim=0).float() if pairs is None else feature[torch.from_numpy(np.argsort(mixed)[pairs])]
    )


def forward(
    method: Method,
    model: nn.Module,
    images: NDArray[np.uint8],
    where: Indices,
    embedding: Tensor | None,
    hardware: Hardware,
    tick: Progress = unheard,
) -> Tensor:
    """Primary logits (N, C) of the images at `where`, beside one anchor embedding or one for each; on the CPU.

    Raises:
        Diverged: a logit is not a finite number: the weights are spoilt.
    """
    reference = None if embedding is None else embedding.to(hardware.device)

    def logits(image_BCHW: Tensor, at: slice) -> Tensor:
        beside = reference[at] if reference is not None and reference.ndim == 2 else reference
        return method.network.ask(model, image_BCHW, beside)

    found = _run(model, logits, images, where, hardware, tick)
    if not bool(torch.isfinite(found).all()):
        raise _spoilt("output")
    return found


def as_probabilities(logits: Tensor) -> NDArray[np.float32]:
    found: NDArray[np.float32] = probabilities(logits).numpy()
    return found


def as_log_odds(logits: Tensor) -> NDArray[np.floating[Any]]:
    found: NDArray[np.floating[Any]] = log_odds(logits).numpy()
    return found


def _spoilt(what: str) -> Diverged:
    return Diverged(
        f"the model's {what} is not a finite number",
        remedy="training diverged: use a lower learning_rate in the plan, and look at the loss in `hsl-node logs`",
    )


@torch.inference_mode()
def _run(
    model: nn.Module,
    function: Callable[[Tensor, slice], Tensor],
    images: NDArray[Any],
    where: Indices,
    hardware: Hardware,
    tick: Progress,
) -> Tensor:
    """Apply a function of (images, position) batch by batch in evaluation mode; rows stacked, on the CPU."""
    was_training = model.training
    model.eval()
    rows = []
    for start in range(0, len(where), EVAL_BATCH):
        at = slice(start, start + EVAL_BATCH)
        rows.append(function(upload(images[where[at]], hardware), at))
        tick(start + len(rows[-1]), len(where))
    model.train(was_training)
    return torch.cat(rows).cpu() if rows else torch.empty(0, 1)  # a copy for each batch would wait for the device
