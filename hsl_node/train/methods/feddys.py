"""FedDyS: each epoch trains on the images that the model is least sure of, fewer each time (after the authors' code).

Exact: an image stays while exp of the margin between its two most likely classes is not above the mean of those kept so
far; the margin is halved for a class with fewer images here than the mean over all classes; a round begins with all
images; peers count by how even the classes of the last kept set are (the fusion `entropy_weighted`). Adapted: the
plan's optimizer; an image left over joins the batch before, where the release skips it; evenness is of the epoch that
is sent: by default the entropy of the label shares over its largest value. `evenness = "classes"` is what the release
computes, which counts labels by object: log2 of the classes present. Assumed: BatchNorm's statistics take the same
coefficients, and where every hospital has one class alone peers count by images.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from hsl_node.train.data.sources import TRAIN
from hsl_node.train.memory import Memory, memory
from hsl_node.train.method import Done, Indices, Learner, Start
from hsl_node.train.methods.fedavg import FEDAVG
from hsl_node.train.optimizers import by_plan
from hsl_node.train.scoring import forward

Floats = NDArray[np.float64]


def metric(probability: Floats, rare: NDArray[np.bool_]) -> Floats:
    """(N, C), is the image's class rare (N,) -> (N,) from 1, where two classes are as likely, to e."""
    second, first = np.sort(probability, axis=1)[:, -2:].T
    margin: Floats = (first - second) * np.where(rare, 0.5, 1.0)
    return np.exp(margin)


def stays(metric: Floats) -> NDArray[np.bool_]:
    """Who is not above the mean, but for rounding; all where one is no number."""
    above: NDArray[np.bool_] = metric > metric.mean() * (1 + 1e-12)
    return ~above


def evenness(label: Indices, classes: int, form: str = "entropy") -> float:
    """From 0, one class alone, to 1, all alike."""
    share = np.bincount(label, minlength=classes) / len(label)
    share = share[share > 0]
    bits = -(share * np.log2(share)).sum() if form == "entropy" else np.log2(len(share))
    return min(max(0.0, float(bits / np.log2(classes))), 1.0)  # 0 and not -0, which is signed and shown


def select(learner: Learner, start: Start, beside: None, epoch: int) -> Indices:
    site, kept = learner.site, memory(learner.optimizers, "kept")
    here = site.indices(TRAIN)
    among, label = np.arange(len(here)) if epoch == 1 else kept.get().numpy(), site.dataset.labels[here]
    logits = forward(site.method, learner.model, site.dataset.images, here[among], None, site.hardware)
    answer = site.task.answer(logits).numpy().astype(np.float64)
    counts = np.bincount(label, minlength=len(learner.plan.classes))
    rare = (counts < counts.mean())[label[among]]
    answer = answer if answer.ndim == 2 else np.stack([1 - answer, answer], axis=1)
    among = among[stays(metric(answer, rare))]
    kept.put(torch.from_numpy(among))
    return among


def says(learner: Learner, start: Start, done: Done) -> Mapping[str, float]:
    site = learner.site
    label = site.dataset.labels[site.indices(TRAIN)[memory(learner.optimizers, "kept").get().numpy()]]
    return {"evenness": evenness(label, len(learner.plan.classes), learner.settings["evenness"])}


FEDDYS = replace(
    FEDAVG,
    name="feddys",
    optimizers=lambda model, plan: {**by_plan(model, plan), "kept": Memory()},
    samples=select,
    says=says,
)
