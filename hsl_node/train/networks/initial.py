"""The same first weights everywhere, drawn by numpy."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch
from torch import Tensor, nn

from hsl_node.train.networks.mmoe import Experts

LIBRARY_DEVIATION = 0.02  # of what vision transformers hold beside their linear layers: positions, in_proj_weight


@torch.no_grad()
def initialise(model: nn.Module, seed: int) -> None:
    """Set every parameter from (seed, its name): He-normal convolutions, Xavier-uniform experts, torch's linears.

    Drawn by numpy's Philox in float64 and rounded, not by torch: torch's normal generator takes another path on each
    kind of processor, and peers on different machines must start from the same bytes.
    """
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix, recurse=False):
            values = _initial(module, name, parameter, stream(seed, name))
            parameter.copy_(torch.from_numpy(values.astype(np.float32)))


def _initial(module: nn.Module, name: str, parameter: Tensor, rng: np.random.Generator) -> np.ndarray:
    shape = tuple(parameter.shape)
    weight = name.rpartition(".")[2].startswith("weight")
    match module:
        case nn.Conv2d() if weight:  # He et al. 2015, fan-out, as torchvision's ResNet
            fan_out = shape[0] * shape[2] * shape[3] / module.groups
            return rng.standard_normal(shape) * math.sqrt(2 / fan_out)
        case nn.BatchNorm2d() | nn.GroupNorm() | nn.LayerNorm():
            return np.full(shape, 1.0 if weight else 0.0)
        case nn.Conv2d():  # its bias: torch's default
            return rng.uniform(-1, 1, shape) / math.sqrt(
                module.in_channels / module.groups * math.prod(module.kernel_size)
            )
        case nn.Linear():  # torch's default for weight and bias
            return rng.uniform(-1, 1, shape) / math.sqrt(module.in_features)
        case Experts() if weight:  # Xavier-uniform, per expert: (E, out, in)
            return rng.uniform(-1, 1, shape) * math.sqrt(6 / (shape[1] + shape[2]))
        case Experts():
            fan_in = (module.weight_in if name.endswith("in") else module.weight_out).shape[2]
            return rng.uniform(-1, 1, shape) / math.sqrt(fan_in)
    # A parameter of a library's own layer. A constant (a class token, a layer scale) is the same on every machine.
    given: np.ndarray = parameter.double().numpy()
    if (given == given.flat[0]).all():
        return given
    return rng.standard_normal(shape) * LIBRARY_DEVIATION


def stream(seed: int, name: str) -> np.random.Generator:
    """Where a tensor's first values come from, the same on every machine."""
    key = hashlib.sha256(f"{seed}/{name}".encode()).digest()[:16]
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
