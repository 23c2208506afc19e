"""A fused model's BatchNorm statistics, measured anew on the hospital's own training images.

The mean of several hospitals' running statistics is no hospital's: a fused model that is judged with them is judged too
low. Measured as in training: normalised by the batch, with the same pairing of images and anchor images, in one pass.
All else as in evaluation: no dropout, no augmentation, nothing learned.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hsl_node.train.batches import epoch_pairs, upload
from hsl_node.train.data.sources import TRAIN
from hsl_node.train.hardware import derived_seed
from hsl_node.train.method import Site
from hsl_node.train.progress import Progress, unheard

BATCH = 64  # images, whatever the plan's batch: a layer sees those before it normalised by this many
ANCHORS = 512  # images at most: their statistics do not get better by more


class Moments:
    """Mean and variance per channel of all that a layer is given, joined batch by batch in float64 (Chan et al. 1983).

    The mean of the batches' variances, as running statistics have it, would miss how far the batches lie apart.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean: Any = 0.0
        self.squares: Any = 0.0  # sum of squared distances from the mean

    def __call__(self, layer: nn.Module, given: tuple[Tensor, ...]) -> None:
        """A forward pre-hook: (B, F, ...) -> nothing. Anchor images of a shared encoder have other statistics."""
        if not layer.track_running_stats:
            return
        x = given[0].detach().float()
        over = [0, *range(2, x.ndim)]
        variance, mean = (v.double().cpu() for v in torch.var_mean(x, over, correction=0))
        count = x.numel() // x.shape[1]
        apart, total = mean - self.mean, self.count + count
        self.squares = self.squares + variance * count + apart.square() * (self.count * count / total)
        self.mean = self.mean + apart * (count / total)
        self.count = total


@torch.no_grad()
def recalibrated(model: nn.Module, site: Site, tick: Progress = unheard) -> nn.Module:
    """A copy in evaluation mode whose running statistics are those of the site's training images; counters stay.

    The images come in one order, of the plan's seed, whatever is done with the model before or after. The variance is
    the unbiased one, as torch's own.
    """
    own = site.indices(TRAIN)
    if not any(map(has_statistics, model.modules())) or len(own) < 2:
        return model
    before, model = model.state_dict(), copy.deepcopy(model).eval()
    seen = {name: Moments() for name, module in model.named_modules() if has_statistics(module)}
    hooks = [model.get_submodule(name).train().register_forward_pre_hook(moments) for name, moments in seen.items()]
    anchor = site.anchor if site.method.network.reference else None
    rng = np.random.default_rng(derived_seed(site.plan.seed, "recalibration"))
    beside = rng.permutation(len(anchor.images))[:ANCHORS] if anchor else own[:0]
    pairs = epoch_pairs(rng, len(own), len(beside), BATCH)
    done, total = 0, sum(len(p) for p, _ in pairs)
    for p, a in pairs:
        images = [upload(site.dataset.images[own[p]], site.hardware)]
        if anchor:
            images.append(upload(anchor.images[beside[a]], site.hardware))
        model(*images)
        done += len(p)
        tick(done, total)
    for hook in hooks:
        hook.remove()
    state = model.state_dict()
    for name, moments in seen.items():
        state[f"{name}.num_batches_tracked"].copy_(before[f"{name}.num_batches_tracked"])
        if moments.count > 1:  # else nothing went through: it keeps what it has
            state[f"{name}.running_mean"].copy_(moments.mean)
            state[f"{name}.running_var"].copy_(moments.squares / (moments.count - 1))
    return model.eval()


def has_statistics(module: nn.Module) -> bool:
    """A layer that keeps statistics, unless it is of an encoder that nobody trains."""
    trained = all(p.requires_grad for p in module.parameters(recurse=False))
    return isinstance(module, _BatchNorm) and module.running_mean is not None and trained
