"""A batch of a method by hand: any model, any settings, and what the exchange left."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import learning
import numpy as np
import torch
from torch import Tensor, nn

from hsl_node.train.batches import upload
from hsl_node.train.data.sources import TRAIN
from hsl_node.train.method import Batch, Learner, Site, Start, Step


class Point(nn.Module):
    """A model that is one parameter `v`, for losses that are worked out by hand."""

    def __init__(self, *values: float, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.v = nn.Parameter(torch.tensor(values, dtype=dtype))


def batch_of(count: int = 2, site: Site | None = None) -> Batch:
    """The first images of a site's training set; without a site empty ones, for models that look at none."""
    if site is None:
        return Batch(torch.zeros(count, 3, 1, 1), torch.arange(count) % 2, np.arange(count))
    at = site.indices(TRAIN)[:count]
    found = upload(site.dataset.images[at], site.hardware), torch.from_numpy(site.dataset.labels[at]), np.arange(count)
    if site.anchor is None:
        return Batch(*found)
    beside = upload(site.anchor.images[:count], site.hardware), torch.from_numpy(site.anchor.labels[:count])
    return Batch(*found, *beside)


def step_of(
    model: nn.Module,
    *,
    site: Site | None = None,
    optimizers: dict[str, torch.optim.Optimizer] | None = None,
    fused: Mapping[str, Tensor] | None = None,
    beside: Any = None,
    batch: Batch | None = None,
    **start: Any,
) -> Step:
    """`fused`: None: the model as it is now."""
    site = site or learning.site(learning.small_plan(method="fedavg"))
    learner = Learner(site, model, optimizers or {})
    now = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    start = {"round": 1, **start}
    return Step(
        learner=learner,
        batch=batch or batch_of(),
        start=Start(fused=now if fused is None else fused, **start),
        beside=beside,
        seen={},
        share=1.0,
        round=start["round"],
        epoch=1,
    )
