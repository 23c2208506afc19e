"""SplitAVG (Zhang et al., IEEE JBHI 2022): one network in two parts, whose cut is crossed in every batch.

Each hospital has the part before the cut, the first convolution; one part behind it is everybody's. In a batch all send
activations and labels up; the loss is of all together, and everybody's part goes down the *mean* gradient at the cut.

Exact: that step, the cut, equal batches; batch statistics behind the cut are of everybody's images. Adapted: the plan's
optimizer, which keeps its state. Simulated only, as what a federation of hospitals does not do: activations of the
first layer are patients' images in effect, and 2,000 images of 224 px and 100 epochs are 642 GB for each hospital and
direction. Weights are averaged nowhere.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hsl_node.errors import ConfigError
from hsl_node.federation.names import Peer
from hsl_node.federation.plan import UNALTERED, Plan
from hsl_node.train.batches import Indices, epoch_pairs, upload
from hsl_node.train.data.sources import TRAIN
from hsl_node.train.hardware import derived_seed
from hsl_node.train.method import Site
from hsl_node.train.networks.classifier import Classifier
from hsl_node.train.optimizers import by_plan, learning_rate
from hsl_node.train.site import initial_model
from hsl_node.train.start import place
from hsl_node.train.state_dict import all_tensors, to_weights
from hsl_node.weights.checkpoint_file import write_weights

NOT_HERE = {"augment": UNALTERED, "class_balance": "none", "clip_norm": 0.0}  # keys of the plan, as they must be
TaskLoss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Part:
    """A part of the network, and what moves it."""

    model: nn.Module
    optimizer: Optimizer


def split_step(
    clients: Sequence[Part], server: Part, inputs: Sequence[Tensor], targets: Sequence[Tensor], loss: TaskLoss
) -> Tensor:
    """One batch of each hospital, equally large: every part makes one step. Gives the loss of all together."""
    for part in (*clients, server):
        part.optimizer.zero_grad(set_to_none=True)
    sent = [client.model(x) for client, x in zip(clients, inputs, strict=True)]  # (B, ...) each
    cut = torch.cat([h.detach() for h in sent]).requires_grad_()  # (K B, ...)
    found = loss(server.model(cut), torch.cat([*targets]))
    found.backward()  # type: ignore[no-untyped-call]
    assert cut.grad is not None
    mean = torch.stack(cut.grad.chunk(len(clients))).mean(0)  # (B, ...): place by place over the hospitals
    for h in sent:
        h.backward(mean)
    for part in (*clients, server):
        part.optimizer.step()
    return found.detach()


def simulate(
    sites: Mapping[Peer, Site], folder: Path, hear: Callable[[int, float], None] = lambda epoch, loss: None
) -> dict[Peer, Path]:
    """All epochs of the plan; for each hospital a file of all tensors of its network, its own part and the common one.

    A pass takes as many batches as the smallest hospital has whole ones; `hear` gets each epoch's mean loss.

    Raises:
        ConfigError: the plan has what is not simulated here, or a hospital has no whole batch.
    """
    peers = sorted(sites)
    plan, hardware = sites[peers[0]].plan, sites[peers[0]].hardware
    _require_plain(sites, plan)
    whole = place(initial_model(plan, sites[peers[0]].method, sites[peers[0]].backbone_weights), hardware)
    firsts = [copy.deepcopy(first_of(whole)) for _ in peers]
    behind = cast(Classifier, copy.deepcopy(whole))
    behind.trunk.net.conv1 = nn.Identity()
    clients = [Part(first, by_plan(first, plan)["main"]) for first in firsts]
    server = Part(behind, by_plan(behind, plan)["main"])
    for epoch in range(1, plan.rounds * plan.epochs_per_round + 1):
        for part in (*clients, server):
            part.model.train()
            for group in part.optimizer.param_groups:
                group["lr"] = learning_rate(plan, epoch)
        orders = [_order(sites[peer], epoch) for peer in peers]
        losses = []
        for batch in zip(*orders, strict=False):
            pairs = [_batch(sites[peer], where) for peer, where in zip(peers, batch, strict=True)]
            images, labels = [image for image, _ in pairs], [label for _, label in pairs]
            losses.append(split_step(clients, server, images, labels, sites[peers[0]].task.loss))
        hear(epoch, torch.stack(losses).mean().item())
    written = {}
    for peer, first in zip(peers, firsts, strict=True):
        joined = copy.deepcopy(behind)
        joined.trunk.net.conv1 = first
        written[peer] = folder / peer / "splitavg.safetensors"
        written[peer].parent.mkdir(parents=True, exist_ok=True)
        write_weights(written[peer], to_weights(joined, all_tensors(joined)))
    return written


def _require_plain(sites: Mapping[Peer, Site], plan: Plan) -> None:
    """Or it would be compared with methods that train on other images, by another loss."""
    other = [key for key, plain in NOT_HERE.items() if getattr(plan, key) != plain]
    if other:
        raise ConfigError(
            f"splitavg is simulated without {', '.join(other)}",
            remedy="leave it out of the plan, and of the plans that it is compared with",
        )
    few = [peer for peer in sorted(sites) if len(sites[peer].indices(TRAIN)) < plan.batch_size]
    if few:
        raise ConfigError(
            f"splitavg takes whole batches of each hospital, and {', '.join(few)} has none of {plan.batch_size}",
            remedy="set a smaller batch_size",
        )


def first_of(model: nn.Module) -> nn.Module:
    """The part before the cut. Raises: ConfigError: the backbone does not begin with it."""
    net = cast(Classifier, model).trunk.net
    if not isinstance(first := getattr(net, "conv1", None), nn.Conv2d):
        raise ConfigError("splitavg cuts behind a ResNet's first convolution", remedy="set backbone to a resnet")
    return first


def _order(site: Site, epoch: int) -> list[Indices]:
    """Whole batches only: at the cut everybody has as many."""
    rng = np.random.default_rng(derived_seed(site.plan.seed, site.peer, "splitavg", epoch))
    size = site.plan.batch_size
    return [p for p, _ in epoch_pairs(rng, len(site.indices(TRAIN)), 0, size) if len(p) == size]


def _batch(site: Site, where: Indices) -> tuple[Tensor, Tensor]:
    at = site.indices(TRAIN)[where]
    return upload(site.dataset.images[at], site.hardware), torch.from_numpy(site.dataset.labels[at]).to(
        site.hardware.device
    )
