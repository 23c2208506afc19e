"""FedDpS (as assumed): each hospital trains on a sample of its images that is spread as everybody's are.

Assumed, all but the abstract's idea (IEEE BigData 2024), since neither text nor code was to be had: an image's features
are 64 principal components of the anchor set's thumbnails or, without one, of the initial model's trunk; a Gaussian
mixture of them travels in buffers of every checkpoint; from round 2 on an image is drawn as often as its kind is met
everywhere, compared with here, ten times at most: systematic resampling of training images, the same for the run.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F

from hsl_node.federation.plan import Plan
from hsl_node.train.batches import upload
from hsl_node.train.data.sources import TRAIN
from hsl_node.train.hardware import derived_seed
from hsl_node.train.method import Indices, Learner, Network, Start, beginning, put
from hsl_node.train.methods.fedavg import FEDAVG
from hsl_node.train.mixtures import COMPONENTS, Floats, Mixture, fitted, in_parts, joined, principal, resampled, weights
from hsl_node.train.networks.classifier import Classifier
from hsl_node.train.site import initial_model
from hsl_node.train.start import place

log = logging.getLogger(__name__)

FEATURES = 64
NAMES = ("share", "mean", "variance")  # of the buffers: the fields of a Mixture


class Described(Classifier):
    """A classifier with the mixture of its hospital's images beside it."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        for name, shape in zip(NAMES, [(COMPONENTS,), *2 * [(COMPONENTS, FEATURES)]], strict=True):
            self.register_buffer(name, torch.zeros(shape))


def sample(learner: Learner, start: Start) -> Indices:
    """The own mixture goes into the model; positions in the training set: all, from the second round on the sample."""
    site, seed = learner.site, derived_seed(learner.plan.seed, learner.me, "mixture")
    x = features(learner)
    if start.round == 1 or learner.me not in start.full_set:
        put(learner.model, {n: torch.from_numpy(getattr(fitted(x, seed), n)) for n in NAMES})
        return np.arange(len(x))
    put(learner.model, {n: start.full_set[learner.me][n] for n in NAMES})
    peers = sorted(start.full_set)
    mixtures = {peer: _mixture(start.full_set[peer]) for peer in peers}
    if unsound := [peer for peer in peers if not mixtures[peer].sound]:  # signed for good: it must not end the run
        log.warning(
            "what %s told of its images in round %d is no density: left out", ", ".join(unsound), start.round - 1
        )
    everybody = joined([mixtures[peer] for peer in peers], [start.samples[peer] for peer in peers])
    u = np.random.default_rng(seed).random()
    return resampled(weights(x, mixtures[site.peer], everybody), u)


def features(learner: Learner) -> Floats:
    """(N, 64) of the training images."""
    site = learner.site
    images = site.dataset.images[site.indices(TRAIN)]
    if site.anchor is not None:
        return principal(site.anchor.images, images, FEATURES)
    model = place(initial_model(site.plan, site.method, site.backbone_weights), site.hardware)
    trunk = cast(Classifier, model.eval()).trunk
    return in_parts(images, lambda part: F.adaptive_avg_pool1d(trunk(upload(part, site.hardware)), FEATURES))


def _mixture(tensors: Any) -> Mixture:
    return Mixture(*(tensors[name].double().cpu().numpy() for name in NAMES))


FEDDPS = replace(
    FEDAVG,
    name="feddps",
    network=Network(build=Described, at_home=beginning(*NAMES)),
    beside=sample,
    samples=lambda learner, start, beside, epoch: beside,
)
