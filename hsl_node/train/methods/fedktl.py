"""FedKTL (Zhang et al., CVPR 2024): class prototypes travel, and from a generator's images come back what they mean.

Exact: ArcFace on cosines with a fixed frame; unit class means of unit projections, all that is sent; the map of
prototypes into the generator's latents by discrepancy and class centre; a step towards the latents of one image per
class, 50 times its squared distance. Adapted: each hospital computes the map for itself, of the prototypes that all
sent (nothing that it gives is sent, so last digits may differ); latents are told by a layer that is kept from round to
round (theirs is built anew); generated images go through the trunk in one batch with the hospital's own; optimizer and
schedule are the plan's; prototypes are of images as the plan has them altered and drawn in training; latents are
standard normal, whatever the generator, which is a local file that the plan names (theirs: StyleGAN or Stable
Diffusion). Assumed: without a file principal components of the anchor set stand in: the loop is there, the knowledge
that theirs brings is not. With two classes the frame is one line.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from hsl_node.train.hardware import derived_seed
from hsl_node.train.method import Learner, Network, Site, Start, Step, Terms, beginning
from hsl_node.train.methods.fedavg import FEDAVG
from hsl_node.train.networks.fedktl import Generator, TransferNetwork, aligned, widened
from hsl_node.train.networks.generator_file import FileGenerator, open_generator
from hsl_node.train.updates import descend


@dataclass(frozen=True)
class Sent:
    """What the generator gives for the classes that anybody has."""

    images: Tensor  # (C, 3, S, S)
    latents: Tensor  # (C, D)


def named_generator(site: Site) -> FileGenerator | None:
    """The plan's, if it names one. Raises: ConfigError: as `open_generator`."""
    named, latent = str(site.settings["generator"]), int(site.settings["latent"])
    return open_generator(site.generator, named, latent, site.plan.image_size) if named else None


def generated(learner: Learner, start: Start) -> Sent | None:
    """One image of each class, from the prototypes of the last round; the first round has none."""
    plan, prototypes = learner.plan, [start.full_set[peer]["prototypes"] for peer in sorted(start.full_set)]
    if not prototypes:
        return None
    generator: FileGenerator | Generator | None = named_generator(learner.site)
    if generator is None:
        assert learner.site.anchor is not None  # the card asks for one
        generator = Generator.of_anchor(learner.site.anchor.images, int(learner.settings["latent"]))
    latents = aligned(prototypes, generator.latent, derived_seed(plan.seed, "fedktl", start.round) >> 1)
    latents = latents[torch.isfinite(latents).all(1)]
    if not len(latents):
        return None
    return Sent(generator(latents).to(learner.device), latents.to(learner.device))


def arcface(step: Step, cosines: Tensor) -> Tensor:
    """The task's loss, with its weights of classes: (B, C) -> ()."""
    model, target = cast(TransferNetwork, step.model), step.batch.target
    return step.task.loss(model.asked(widened(cosines, target)), target)


def transfer(step: Step) -> Terms:
    model, sent = cast(TransferNetwork, step.model), cast("Sent | None", step.beside)
    image = step.batch.image
    if sent is None:
        return {"primary": arcface(step, model.cosines(model.trunk(image)))}
    feature = model.trunk(torch.cat([image, sent.images]))
    own, of_sent = feature.split([len(image), len(sent.images)])
    told = model.tell(of_sent)[:, : sent.latents.shape[1]]
    return {
        "primary": arcface(step, model.cosines(own)),
        "transfer": step.settings["weight"] * F.mse_loss(told, sent.latents),
    }


def gather(step: Step) -> Terms:
    """A second pass, in evaluation mode: the prototypes are those of the epoch's last weights."""
    model = cast(TransferNetwork, step.model).eval()
    model.gather(step.batch.image, step.batch.target, step.round * 10_000 + step.epoch)
    model.train()
    return {}


FEDKTL = replace(
    FEDAVG,
    name="fedktl",
    network=Network(TransferNetwork, at_home=beginning("prototypes", "gathered")),
    passes=(descend(transfer), gather),
    travels=lambda model: frozenset({"prototypes"}),
    beside=generated,
    require=named_generator,
)
