"""FedTP (Li et al. 2023): everything of a transformer is averaged but its attention projections, which a hypernetwork
makes for each hospital from an embedding of that hospital.

Exact: the hypernetwork's step down the distance between projections that it made and those that each hospital trained
from them, with momentum, weighted by images; the fused model uses freshly made ones. A hospital's trained projections
are sent, as published, since everybody's hypernetwork learns from them; they are averaged with nothing. Adapted: every
peer derives the hypernetwork itself, with a signed number to show that it is the same (where a disk was lost, one has
another, and makes its own projections by that: what is fused hangs on none); all take part in every round;
a hospital pulls no further than what was made for it is long, which binds no honest one; optimizer and schedule are the
plan's; two hidden layers of `hidden` numbers, not three of 150 (713 MB at each peer).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import cast

import torch

from hsl_node.train.method import Done, Learner, Network, Start, all_but, beginning, take_fused
from hsl_node.train.methods.fedavg import FEDAVG
from hsl_node.train.networks.fedtp import PersonalTransformer
from hsl_node.train.networks.hypernetwork import Array, descended, fingerprint, generate, no_longer, pull

log = logging.getLogger(__name__)


@torch.no_grad()
def made_anew(learner: Learner, start: Start) -> None:
    """The hypernetwork learns from everybody's projections of the last round; then it makes this hospital's."""
    take_fused(learner, start)
    model = cast(PersonalTransformer, learner.model)
    if start.full_set:
        _learn(model, learner, start)
    elif start.round > 1:
        log.warning("no checkpoints of round %d here: projections as before its fusion", start.round - 1)
    model.take(generate(model.hyper.read()[0], model.hyper.embedding_of(learner.me)))


def _learn(model: PersonalTransformer, learner: Learner, start: Start) -> None:
    hyper = model.hyper
    mine, total = fingerprint(*hyper.read()), sum(start.samples.values())
    others = sorted(peer for peer in start.said if start.said[peer]["hypernetwork"] != mine)
    if others:  # one lost disk, or one false number, signed for good, must not end everybody's run
        log.warning(
            "not the hypernetwork of %s in round %d: theirs or mine was lost", ", ".join(others), start.round - 1
        )
    for peer in sorted(start.samples):
        hyper.add(peer)
    net, moments = hyper.read()

    def pulls() -> Iterator[tuple[int, Mapping[str, Array]]]:  # each as large as the hypernetwork: one after the other
        for peer in sorted(start.samples):
            row, embedding = hyper.add(peer), hyper.embedding_of(peer)
            made = generate(net, embedding)
            apart = no_longer(made - model.flat(start.full_set[peer]), made)
            yield row, pull(net, embedding, apart, start.samples[peer] / total)

    settings = {name: learner.settings[name] for name in ("rate", "momentum", "decay")}
    hyper.write(*descended(net, moments, pulls(), **settings))


def its_fingerprint(learner: Learner, start: Start, done: Done) -> Mapping[str, float]:
    return {"hypernetwork": fingerprint(*cast(PersonalTransformer, learner.model).hyper.read())}


HYPERNETWORK = beginning("hyper.")
FEDTP = replace(
    FEDAVG,
    name="fedtp",
    network=Network(PersonalTransformer, at_home=HYPERNETWORK),
    travels=all_but(HYPERNETWORK),
    adopt=made_anew,
    says=its_fingerprint,
)
