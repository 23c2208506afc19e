"""state_dict <-> Weights. Nothing is averaged, or left out, by accident."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from hsl_node.errors import FederationMismatch
from hsl_node.weights.checkpoint_file import Array, Weights


def all_tensors(model: nn.Module) -> frozenset[str]:
    """Names of every tensor, buffers too: averaging only `parameters()` would silently make FedAvg a FedBN.

    Raises:
        NotImplementedError: a tensor of a kind that fusion does not know (a bug in a new model).
    """
    state = model.state_dict()
    for name, tensor in state.items():
        if tensor.dtype not in (torch.float32, torch.float64, torch.int64):
            raise NotImplementedError(f"no fusion rule for {name} of {tensor.dtype}")
    return frozenset(state)


def to_weights(model: nn.Module, names: Iterable[str]) -> dict[str, Array]:
    """The named tensors as numpy arrays, sorted by name, dtypes kept. They share memory with a model on the CPU."""
    state = model.state_dict()
    return {name: state[name].detach().cpu().contiguous().numpy() for name in sorted(names)}


def load_weights(model: nn.Module, weights: Weights, names: Iterable[str]) -> None:
    """Put exactly the named tensors into a model; its other tensors stay.

    Raises:
        FederationMismatch: names, dtypes or shapes are not this model's.
    """
    require_kinds(model, weights, names)
    state = model.state_dict()
    with torch.no_grad():
        for name, array in weights.items():
            state[name].copy_(torch.tensor(array))  # a copy: arrays read from files are read-only


def require_kinds(model: nn.Module, weights: Weights, names: Iterable[str]) -> None:
    """Raises: FederationMismatch: these are not exactly the named tensors of this model, in its dtypes and shapes."""
    state: dict[str, Any] = model.state_dict()
    wanted = set(names)
    wrong = wanted ^ set(weights)
    wrong |= {n for n in wanted & set(weights) if _kind(state[n].cpu().numpy()) != _kind(weights[n])}
    if wrong:
        raise FederationMismatch(
            f"these weights are of another model: {len(wrong)} tensors differ, e.g. {min(wrong)!r}",
            remedy="compare plan and software versions: `hsl-node federation diff`, `hsl-node version`",
        )


def _kind(array: Array) -> tuple[tuple[int, ...], str]:
    return array.shape, array.dtype.newbyteorder("<").str
