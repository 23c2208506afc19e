"""The multi-gate mixture-of-experts model of HeteroSync Learning.

Shapes: B image pairs in a batch, F = 1024 joint features, E experts, H = 62 hidden and O = 32 task features, C outputs
(1 logit for two classes, else one per class). Everything is logits here; probabilities are made in scoring.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hsl_node.federation.plan import Plan
from hsl_node.train.method import Network
from hsl_node.train.networks.backbone import Trunk
from hsl_node.train.tasks.classification import outputs

EMBEDDING = 512  # features of one encoder
HIDDEN = 62
TASK = 32  # features of one task: experts' sum plus skip projection
TOWER = 16
EXPERT_DROPOUT = 0.3
TOWER_DROPOUT = 0.4


class MMoE(nn.Module):
    """Two tasks, two encoders, one pool of experts. Defaults are the published form: 23.7 million parameters.

    In that form the joint embedding is flat to 1e-5, so the anchor task does not reach the primary one
    (`anchor_reach.py` measures it). Forms in which it does:

        embedding = "layernorm"        features of mean 0 and deviation 1 per image
        embedding = "softmax_scaled"   the published softmax times the number of features, less 1: mean 0
        encoder = "shared"             anchor images go through the primary task's encoder: 12.3 million parameters
        gate_temperature < 1           gates that choose more sharply among experts
    """

    def __init__(
        self,
        *,
        backbone: str = "resnet18",
        outputs: int = 1,
        experts: int = 12,
        encoder: str = "separate",
        embedding: str = "softmax",
        temperature: float = 3.0,
        gate_temperature: float = 1.0,
        norm: str = "batch",
        image_size: int = 224,
    ) -> None:
        super().__init__()
        self.shared_encoder = encoder == "shared"
        self.embedding = embedding
        self.temperature = temperature
        if self.shared_encoder:
            self.encoder = Encoder(backbone, norm, image_size)
        else:
            self.encoder_primary = Encoder(backbone, norm, image_size)
            self.encoder_anchor = Encoder(backbone, norm, image_size)
        self.experts = Experts(experts, 2 * EMBEDDING)
        self.gate_primary = Gate(2 * EMBEDDING, experts, gate_temperature)
        self.gate_anchor = Gate(2 * EMBEDDING, experts, gate_temperature)
        self.skip_primary = nn.Linear(EMBEDDING, TASK)
        self.skip_anchor = nn.Linear(EMBEDDING, TASK)
        self.tower_primary = Tower(outputs)
        self.tower_anchor = Tower(1)

    def forward(self, primary_BCHW: Tensor, anchor_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of both tasks, (B, C) and (B, 1)."""
        f_p, f_a = self.encode(primary_BCHW, anchor_BCHW)  # (B, 512), (B, 512)
        self.last_anchors = f_a.detach().mean(dim=0)  # (512,)
        return self.answers(f_p, f_a)

    def answers(self, f_p: Tensor, f_a: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of both tasks from both encoders' features, (B, 512) each."""
        joint = self.joint(f_p, f_a)  # (B, 1024)
        expert = self.experts(joint)  # (B, E, 32)
        primary = self.gate_primary(joint, expert) + self.skip_primary(f_p)  # (B, 32)
        anchor = self.gate_anchor(joint, expert) + self.skip_anchor(f_a)  # (B, 32)
        return self.tower_primary(primary), self.tower_anchor(anchor)  # (B, C), (B, 1)

    def encode(self, primary_BCHW: Tensor, anchor_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        return self.encode_primary(primary_BCHW), self.encode_anchor(anchor_BCHW)

    def encode_primary(self, primary_BCHW: Tensor) -> Tensor:
        feature: Tensor = (self.encoder if self.shared_encoder else self.encoder_primary)(primary_BCHW)
        return feature

    def encode_anchor(self, anchor_BCHW: Tensor) -> Tensor:
        """A shared encoder's running statistics are of primary images: anchor images take those of their batch."""
        encoder = self.encoder if self.shared_encoder else self.encoder_anchor
        by_batch = self.shared_encoder and len(anchor_BCHW) > 1
        with batch_statistics(encoder) if by_batch else nullcontext():
            feature: Tensor = encoder(anchor_BCHW)
        return feature

    def primary(self, primary_BCHW: Tensor) -> Tensor:
        """The primary task of a training step without anchor images, beside those of the last step that had some."""
        return self.primary_logits(self.encode_primary(primary_BCHW), self.last_anchors)

    def primary_logits(self, f_p: Tensor, f_a: Tensor) -> Tensor:
        """The primary task alone: (B, 512) and an anchor embedding (512,) or (B, 512) -> (B, C)."""
        joint = self.joint(f_p, f_a.expand_as(f_p))
        return self.tower_primary(self.gate_primary(joint, self.experts(joint)) + self.skip_primary(f_p))  # type: ignore[no-any-return]

    def joint(self, f_p: Tensor, f_a: Tensor) -> Tensor:
        both = torch.cat([f_p, f_a], dim=1)  # (B, 1024)
        if self.embedding == "layernorm":
            return F.layer_norm(both, both.shape[1:])
        flat = torch.softmax(both / self.temperature, dim=1)
        return flat * both.shape[1] - 1 if self.embedding == "softmax_scaled" else flat


class Encoder(nn.Module):
    """A trunk whose classifier is replaced by Linear -> ReLU: (B, 3, S, S) -> (B, 512)."""

    def __init__(self, backbone: str, norm: str = "batch", image_size: int = 224) -> None:
        super().__init__()
        self.trunk = Trunk(backbone, norm, image_size)
        self.embed = nn.Linear(self.trunk.features, EMBEDDING)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        return torch.relu(self.embed(self.trunk(image_BCHW)))


class Experts(nn.Module):
    """E small nets Linear(F -> 62), ReLU, Dropout, Linear(62 -> 32), as one matrix product and one batched one."""

    def __init__(self, experts: int, inputs: int) -> None:
        super().__init__()
        self.weight_in = nn.Parameter(torch.empty(experts, HIDDEN, inputs))
        self.bias_in = nn.Parameter(torch.empty(experts, HIDDEN))
        self.weight_out = nn.Parameter(torch.empty(experts, TASK, HIDDEN))
        self.bias_out = nn.Parameter(torch.empty(experts, TASK))

    def forward(self, joint: Tensor) -> Tensor:
        hidden = F.linear(joint, self.weight_in.flatten(0, 1), self.bias_in.flatten())  # (B, E*62)
        hidden = hidden.view(-1, *self.bias_in.shape)  # (B, E, 62)
        hidden = F.dropout(torch.relu(hidden), EXPERT_DROPOUT, self.training)
        return torch.einsum("beh,eoh->beo", hidden, self.weight_out) + self.bias_out  # (B, E, 32)


class Gate(nn.Module):
    """A task's mixture of the experts: softmax(Linear(F -> E) / temperature) weights their features; published: 1."""

    def __init__(self, inputs: int, experts: int, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature
        self.linear = nn.Linear(inputs, experts)

    def forward(self, joint: Tensor, expert: Tensor) -> Tensor:
        share = torch.softmax(self.linear(joint) / self.temperature, dim=1)  # (B, E)
        return torch.einsum("be,beo->bo", share, expert)  # (B, 32)


class Tower(nn.Module):
    """A task's head: (B, 32) -> logits (B, C)."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(TASK, TOWER)
        self.out = nn.Linear(TOWER, outputs)

    def forward(self, task: Tensor) -> Tensor:
        hidden = F.dropout(torch.relu(self.hidden(task)), TOWER_DROPOUT, self.training)
        return self.out(hidden)  # type: ignore[no-any-return]


@contextmanager
def batch_statistics(module: nn.Module) -> Iterator[None]:
    """BatchNorm normalises by the batch and keeps nothing of it, in training and in evaluation mode."""
    layers = [layer for layer in module.modules() if isinstance(layer, _BatchNorm)]
    before = [(layer.training, layer.track_running_stats) for layer in layers]
    for layer in layers:
        layer.training, layer.track_running_stats = True, False
    try:
        yield
    finally:
        for layer, (training, tracks) in zip(layers, before, strict=True):
            layer.training, layer.track_running_stats = training, tracks


def build(plan: Plan) -> nn.Module:
    form = {key: plan.settings[key] for key in ("encoder", "embedding", "temperature", "gate_temperature", "experts")}
    return MMoE(backbone=plan.backbone, outputs=outputs(plan), norm=plan.norm, image_size=plan.image_size, **form)


def ask(model: nn.Module, image_BCHW: Tensor, reference: Tensor | None) -> Tensor:
    assert reference is not None
    mmoe = cast(MMoE, model)
    return mmoe.primary_logits(mmoe.encode_primary(image_BCHW), reference)


def embed_anchor(model: nn.Module, image_BCHW: Tensor) -> Tensor:
    return cast(MMoE, model).encode_anchor(image_BCHW)


MMOE = Network(build, ask, embed_anchor)
