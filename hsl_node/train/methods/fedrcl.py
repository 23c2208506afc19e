"""FedRCL: relaxed supervised contrastive learning at every stage of the network (Seo et al., CVPR 2024).

Exact: both terms of the loss, at the stem and every stage before the last ReLU, over the hospital's own batch; no fused
model is looked at. The fusion is the plain mean. Adapted: optimizer, schedule and batch size are the plan's (published:
SGD 0.1 x 0.998^round, weight decay 1e-3, gradient norm clipped to 10, batches of 50), and the backbone has the plan's
norm (published: GroupNorm). With two classes "the two most similar of other classes" are of the one other class.
"""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from hsl_node.federation.plan import Plan
from hsl_node.train.method import Step, Terms
from hsl_node.train.methods.fedavg import FEDAVG
from hsl_node.train.networks.backbone import after_stages_of
from hsl_node.train.networks.classifier import Classifier
from hsl_node.train.updates import descend

NEGATIVES = 2  # the most similar images of other classes
UNLIKE = -1.0  # stands for a pair that the relaxation leaves alone


def contrast(likeness: Tensor, label: Tensor, temperature: float) -> Tensor:
    """(B, B) cosines, (B,) -> (B,): the least similar image of the own class, itself included, against the most similar
    two of other classes."""
    same = label[:, None] == label[None]
    own = likeness.masked_fill(~same, torch.inf).amin(dim=1, keepdim=True)
    others = likeness.masked_fill(same, -torch.inf).topk(min(NEGATIVES, len(label)), dim=1).values
    return -F.log_softmax(torch.cat([own, others], dim=1) / temperature, dim=1)[:, 0]  # -inf: there is none


def relaxation(likeness: Tensor, label: Tensor, temperature: float, similar: float) -> Tensor:
    """(B, B) cosines, (B,) -> (B,): pushes a class apart that has collapsed: whose least similar pair is alike too."""
    others = (label[:, None] == label[None]).fill_diagonal_(False)
    least = likeness.masked_fill(~others, torch.inf).amin(dim=1)
    collapsed = (least >= similar) & (least < torch.inf)  # inf: no other image of this class
    return F.softplus((torch.where(collapsed, least, UNLIKE) - 1) / temperature)


def relaxed_contrastive(step: Step) -> Terms:
    """The task's loss and both terms, averaged over batch and stages."""
    logits, stages = cast(Classifier, step.model).with_stages(step.batch.image)
    settings, label = step.settings, step.batch.target
    pull, push = [], []
    for stage in stages:
        feature = F.normalize(stage.mean(dim=(2, 3)))  # (B, C)
        likeness = feature @ feature.T
        pull.append(contrast(likeness, label, settings["temperature"]).mean())
        push.append(relaxation(likeness, label, settings["temperature"], settings["similar"]).mean())
    return {
        "primary": step.task.loss(logits, label),
        "contrast": settings["contrast"] * torch.stack(pull).mean(),
        "relaxation": settings["relaxation"] * torch.stack(push).mean(),
    }


def build(plan: Plan) -> Classifier:
    """Raises: ConfigError: a trunk whose stages are not known, before hospitals wait for each other."""
    model = cast(Classifier, FEDAVG.network.build(plan))
    after_stages_of(model.trunk.net, plan.backbone)
    return model


NETWORK = replace(FEDAVG.network, build=build)
FEDRCL = replace(FEDAVG, name="fedrcl", network=NETWORK, passes=(descend(relaxed_contrastive),))
