"""state_dict <-> Weights. Every tensor of a model has a rule; nothing is averaged, or left out, by accident."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from hsl_node.errors import FederationMismatch
from hsl_node.weights.checkpoint_file import Array, Weights

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm)


class Rule(StrEnum):
    MEAN = "mean"  # parameters and BatchNorm statistics
    MAXIMUM = "maximum"  # integer buffers: BatchNorm's batch counters


def rules(model: nn.Module) -> dict[str, Rule]:
    """How each tensor is fused, by name.

    Raises:
        NotImplementedError: a tensor of a kind that fusion does not know (a bug in a new model).
    """
    found = {}
    for name, tensor in model.state_dict().items():
        if tensor.dtype in (torch.float32, torch.float64):
            found[name] = Rule.MEAN
        elif tensor.dtype == torch.int64:
            found[name] = Rule.MAXIMUM
        else:
            raise NotImplementedError(f"no fusion rule for {name} of {tensor.dtype}")
    return found


def all_tensors(model: nn.Module) -> frozenset[str]:
    """Every tensor, buffers too: averaging only `parameters()` would silently make FedAvg a FedBN."""
    return frozenset(rules(model))


def norm_tensors(model: nn.Module) -> frozenset[str]:
    """Weights, biases and statistics of normalisation layers, found by type: names like `downsample.1` hide them."""
    return frozenset(
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if isinstance(module, _NORMS)
        for name in module.state_dict()
    )


def to_weights(model: nn.Module, names: Iterable[str]) -> dict[str, Array]:
    """The named tensors as numpy arrays, sorted by name, dtypes kept. They share memory with a model on the CPU."""
    state = model.state_dict()
    return {name: state[name].detach().cpu().contiguous().numpy() for name in sorted(names)}


def load_weights(model: nn.Module, weights: Weights, names: Iterable[str]) -> None:
    """Put exactly the named tensors into a model; its other tensors stay.

    Raises:
        FederationMismatch: names, dtypes or shapes are not this model's.
    """
    state: dict[str, Any] = model.state_dict()
    wanted = set(names)
    wrong = wanted ^ set(weights)
    wrong |= {n for n in wanted & set(weights) if _kind(state[n].cpu().numpy()) != _kind(weights[n])}
    if wrong:
        raise FederationMismatch(
            f"these weights are of another model: {len(wrong)} tensors differ, e.g. {min(wrong)!r}",
            remedy="compare plan and software versions: `hsl-node federation diff`, `hsl-node version`",
        )
    with torch.no_grad():
        for name in wanted:
            state[name].copy_(torch.tensor(weights[name]))  # a copy: arrays read from files are read-only


def _kind(array: Array) -> tuple[tuple[int, ...], str]:
    return array.shape, array.dtype.newbyteorder("<").str
