"""How a model's parameters are moved: the plan's optimiser, and its learning rate over the run."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hsl_node.federation.plan import Plan


def by_plan(model: nn.Module, plan: Plan) -> dict[str, Optimizer]:
    """One optimiser, "main", for all parameters.

    adam    weight decay is a part of the gradient, of every parameter (the form in which HSL was measured)
    adamw   decay beside the gradient, of matrices and kernels alone: scales, shifts and biases are free of it, as in
            timm, nanoGPT and the ViT recipes. The HSL release, torch's default, decays them too
    sgd     with the plan's momentum; decay is a part of the gradient. What FedNova's and FlexFair's formulas presume
    """
    rate, decay = plan.learning_rate, plan.weight_decay
    match plan.optimizer:
        case "adam":
            main: Optimizer = _Adam(model.parameters(), lr=rate, weight_decay=decay, fused=True)
        case "adamw":
            free = [p for name, p in model.named_parameters() if _is_free_of_decay(name, p)]
            held = [p for name, p in model.named_parameters() if not _is_free_of_decay(name, p)]
            groups = [{"params": held, "weight_decay": decay}, {"params": free, "weight_decay": 0.0}]
            main = _AdamW([g for g in groups if g["params"]], lr=rate, fused=True)
        case "sgd":
            main = torch.optim.SGD(model.parameters(), lr=rate, momentum=plan.momentum, weight_decay=decay, fused=True)
    return {"main": main}


class _AsTheyLie(Optimizer):
    """torch's own steps, to the bit, on kernels seen as they lie in memory.

    On a CPU fused Adam first copies each gradient that is channels-last, and throws the copy away: 6 % of a step of the
    published form at 64 px. `_init_group` is torch's and not public: were it gone, the copies would be back, no more.
    """

    def _init_group(self, group: dict[str, Any], *lists: list[Tensor]) -> bool:
        found: bool = super()._init_group(group, *lists)  # type: ignore[misc]
        for tensors in lists:
            tensors[:] = map(_as_it_lies, tensors)
        return found


class _Adam(_AsTheyLie, torch.optim.Adam):
    pass


class _AdamW(_AsTheyLie, torch.optim.AdamW):
    pass


def _as_it_lies(tensor: Tensor) -> Tensor:
    channels_last = tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    return tensor.permute(0, 2, 3, 1) if channels_last else tensor


def take_up(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """Go on from a state that was saved, perhaps where kernels lay otherwise in memory: fused steps read moments and
    kernels side by side, as both lie."""
    optimizer.load_state_dict(saved)
    for parameter, remembered in optimizer.state.items():
        for name, value in remembered.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                remembered[name] = torch.empty_like(parameter).copy_(value)


def _is_free_of_decay(name: str, parameter: nn.Parameter) -> bool:
    """Also the biases of all experts in one matrix."""
    return parameter.ndim <= 1 or name.rpartition(".")[2].startswith("bias")


def learning_rate(plan: Plan, epoch: int, place: float | None = None) -> float:
    """Of an epoch of the whole run, counted from 1, in closed form: nothing to save, nothing to step.

    First `warmup_epochs` rise in equal steps; the epoch after them is the first with the whole rate. Then a cosine
    towards learning_rate_min: `restarts` falls within each period and starts anew with the next, like torch's
    CosineAnnealingWarmRestarts (torch's CosineAnnealingLR would instead climb back along the same cosine, a cycle of
    twice the period; "period 10 epochs" is read as a cycle of 10); `cosine_run` falls once, over the planned run. Each
    round has an equal share of that fall, `place` being the epoch in the run as if each had `epochs_per_round`: where a
    method trains other numbers of epochs, as FedPPKT's 200 of a teacher in round 1, it ends with the last round, and
    what begins in round 2 does not find it nearly over.
    """
    warm = plan.warmup_epochs
    if epoch <= warm:
        return plan.learning_rate * epoch / (warm + 1)
    if plan.schedule == "cosine_run":
        done = epoch - 1 - warm if place is None else max(place - 1 - warm, 0)
        part = min(done / max(plan.rounds * plan.epochs_per_round - warm, 1), 1.0)
    else:
        part = ((epoch - 1 - warm) % plan.cosine_period_epochs) / plan.cosine_period_epochs
    span = plan.learning_rate - plan.learning_rate_min
    return plan.learning_rate_min + span * (1 + math.cos(math.pi * part)) / 2
