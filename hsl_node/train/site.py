"""Open what one hospital trains with, from its state directory: configuration, images, anchor set, machine."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch import nn

import hsl_node
from hsl_node.errors import ConfigError
from hsl_node.federation.config import load_federation
from hsl_node.federation.names import Digest
from hsl_node.federation.node_toml import load_node
from hsl_node.federation.plan import Plan
from hsl_node.host import durable
from hsl_node.host.durable import Step
from hsl_node.host.layout import Layout
from hsl_node.train.data import anchor
from hsl_node.train.data.dataset import open_dataset
from hsl_node.train.hardware import Hardware, prepare
from hsl_node.train.method import Method, Site
from hsl_node.train.methods import method_of
from hsl_node.train.networks.initial import initialise
from hsl_node.train.networks.pretrained import start_from_weights
from hsl_node.train.progress import Progress, unheard
from hsl_node.train.state_dict import to_weights
from hsl_node.weights.checkpoint_file import write_weights
from hsl_node.weights.whole import holds


def open_site(state: Path, progress: Progress = unheard, rank: int = 0) -> Site:
    """Read node.toml and federation.toml, decode or map the images, load the anchor set, set up the machine.

    rank: which of the devices this process computes with.

    Raises:
        ConfigError: a file, the data or the anchor set is not as the federation says.
    """
    node, federation = load_node(state), load_federation(state)
    plan, layout = federation.plan, Layout(state)
    method, hardware = method_of(plan.method), open_hardware(state, plan, rank)
    if hardware.devices > 1 and method.one_device:
        raise ConfigError(
            f"{plan.method} trains on one device: {method.one_device}", remedy="set train.gpus = 1 in node.toml"
        )
    dataset = open_dataset(
        node.data, plan, cache=layout.cache, ledger=layout.splits, run=federation.digest, progress=progress
    )
    return Site(
        node.name,
        federation.digest,
        plan,
        method,
        dataset,
        open_anchor(state),
        hardware,
        backbone_weights=node.train.backbone_weights,
        generator=node.train.generator,
        micro_batch=node.train.micro_batch,
    )


def open_anchor(state: Path) -> anchor.AnchorSet | None:
    node, card = load_node(state), load_federation(state).anchor
    return anchor.load(node.anchor or Layout(state).anchor, card.fingerprint) if card else None


def open_hardware(state: Path, plan: Plan, rank: int = 0) -> Hardware:
    train = load_node(state).train
    return prepare(
        device=train.device,
        threads=train.threads,
        precision=plan.precision,
        image_size=plan.image_size,
        backbone=plan.backbone,
        devices=train.gpus,
        rank=rank,
    )


def checkpoint_bytes(plan: Plan) -> int:
    """How large a checkpoint of this plan is, but for its header. A second at most: the model is built, no more."""
    method = method_of(plan.method)
    model = method.network.build(plan)
    state = model.state_dict()
    return sum(state[name].numel() * state[name].element_size() for name in method.travels(model))


def require_model(plan: Plan) -> None:
    """Raises: ConfigError: the plan's network is none, or not for its images. A hospital that has the library which
    brings it finds that out, if this machine has it not."""
    if not plan.backbone.startswith("timm:") or find_spec("timm") is not None:
        method = method_of(plan.method)
        method.travels(method.network.build(plan))


def initial_weights(
    state: Path, plan: Plan, method: Method, out: Path, known: Digest | None = None
) -> tuple[Digest, int]:
    """Write round 0's travelling weights, the same bytes at every peer, unless they are there. Gives digest and
    parameters.

    `known`: their digest. Without it a file that lies there, as of a process that was killed, is written anew: the disk
    may have altered it since, and nobody else has the bytes to compare it with.
    """
    if known is not None and holds(out, known):
        durable.accept(out)
        return known, sum(p.numel() for p in method.network.build(plan).parameters())
    model = initial_model(plan, method, load_node(state).train.backbone_weights if plan.backbone_weights else None)
    out.parent.mkdir(parents=True, exist_ok=True)
    digest = write_weights(out, to_weights(model, method.travels(model)), Step.START_INITIAL)
    return digest, sum(p.numel() for p in model.parameters())


def initial_model(plan: Plan, method: Method, backbone_weights: Path | None) -> nn.Module:
    """The model that everybody begins with, what stays in a hospital included.

    Always on the CPU and from plan.seed alone; a backbone weight file named in the plan goes into every trunk.
    """
    model = method.network.build(plan)
    initialise(model, plan.seed)
    if plan.backbone_weights is not None:
        start_from_weights(model, plan.backbone_weights, backbone_weights)
    return model


def versions() -> dict[str, str]:
    """Software that decides the bytes of a result."""
    return {
        "hsl_node": hsl_node.__version__,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": np.__version__,
    }
