"""The image trunks behind every model: torchvision's ResNets and a small one for tests and the demo.

Shapes: B images in a batch, S pixels a side, F features (resnet18 and resnet34 512, resnet50 2048, tiny 64).
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
import torchvision
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from hsl_node.errors import ConfigError
from hsl_node.weights.whole import sha256_of

TINY_WIDTHS = (16, 32, 64)


class Trunk(nn.Module):
    """Images in, pooled features out, always float32.

    This is where nearly all the arithmetic is, so `precision` (bfloat16 autocast) applies here only: everything behind
    it is a few million operations and stays in float32, which keeps probabilities free of bfloat16's ties.
    """

    def __init__(self, backbone: str) -> None:
        super().__init__()
        self.net, self.features = _make(backbone)
        self.precision = torch.float32

    def forward(self, image_BCHW: Tensor) -> Tensor:
        # No context manager at all in float32, so that exporters see a plain graph.
        reduced = self.precision != torch.float32
        with torch.autocast(image_BCHW.device.type, self.precision) if reduced else contextlib.nullcontext():
            feature = self.net(image_BCHW)  # (B, 3, S, S) -> (B, F)
        return feature.float()  # type: ignore[no-any-return]


class TinyResNet(nn.Module):
    """Two residual blocks, 0.1 million parameters: the published shape in small. Works from 16 px."""

    def __init__(self) -> None:
        super().__init__()
        first, second, last = TINY_WIDTHS
        self.conv1 = nn.Conv2d(3, first, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        self.layer1 = _halving_block(first, second)
        self.layer2 = _halving_block(second, last)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(image_BCHW)))  # (B, 16, S/2, S/2)
        x = self.layer2(self.layer1(x))  # (B, 64, S/8, S/8)
        pooled: Tensor = x.mean(dim=(2, 3))  # (B, 64)
        return pooled


def use_precision(model: nn.Module, precision: torch.dtype) -> None:
    """Set the precision of every trunk inside a model."""
    for module in model.modules():
        if isinstance(module, Trunk):
            module.precision = precision


def read_backbone_weights(path: Path, sha256: str) -> dict[str, Tensor]:
    """A local weight file in torchvision's names (.pth or .safetensors), without its classifier. Never unpickles code.

    Raises:
        ConfigError: no such file, another sha256 than the plan's, or not a weight file.
    """
    try:
        found = sha256_of(path)
    except OSError as exc:
        raise ConfigError(
            f"backbone weights {path}: {exc.strerror}", remedy="set train.backbone_weights in node.toml to the file"
        ) from exc
    if found != sha256:
        raise ConfigError(
            f"backbone weights {path} have sha256 {found[:12]}, the plan names {sha256[:12]}",
            remedy="fetch the file that the plan's author used; all peers must start from the same bytes",
        )
    try:
        if path.suffix == ".safetensors":
            tensors: dict[str, Any] = load_file(path)
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
        return {k: v for k, v in tensors.items() if not k.startswith("fc.")}
    except Exception as exc:  # the two libraries raise half a dozen unrelated kinds
        raise ConfigError(
            f"backbone weights {path} cannot be read: {exc}", remedy="give a state_dict saved as .pth or .safetensors"
        ) from exc


def load_backbone_weights(trunk: Trunk, tensors: dict[str, Tensor]) -> None:
    """Put a weight file's tensors into a trunk.

    Raises:
        ConfigError: names or shapes are not those of this backbone.
    """
    state = trunk.net.state_dict()
    # Files of torchvision's early years lack the BatchNorm counters: they start at zero then.
    wrong = {k for k in state if not k.endswith("num_batches_tracked")} ^ {
        k for k in tensors if not k.endswith("num_batches_tracked")
    }
    wrong |= {k for k in tensors if k in state and state[k].shape != tensors[k].shape}
    if wrong:
        raise ConfigError(
            f"the backbone weights are of another network: {len(wrong)} tensors differ, e.g. {min(wrong)!r}",
            remedy="use the weight file of the plan's backbone",
        )
    trunk.net.load_state_dict(tensors, strict=False)


def _make(backbone: str) -> tuple[nn.Module, int]:
    if backbone == "tiny":
        return TinyResNet(), TINY_WIDTHS[-1]
    net = getattr(torchvision.models, backbone)(weights=None)
    features = int(net.fc.in_features)
    net.fc = nn.Identity()
    return net, features


def _halving_block(inputs: int, outputs: int) -> BasicBlock:
    """A residual block that halves the image's side."""
    shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=2, bias=False), nn.BatchNorm2d(outputs))
    return BasicBlock(inputs, outputs, stride=2, downsample=shortcut)
