"""The image trunk behind every model: what a plan's `backbone` names, its norm layers, and its stages.

    resnet18 resnet34 resnet50    torchvision's
    tiny                          a small ResNet for tests and the demo
    efficientnet_lite0            efficientnet.py; ImageNet weights come in a package (pretrained.py)
    vit_tiny                      vit.py
    torchvision:NAME, timm:NAME   any classifier of theirs

Shapes: B images in a batch, S pixels a side, F features (resnet18 and resnet34 512, resnet50 2048, tiny 64,
efficientnet_lite0 1280, vit_tiny 128).
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet

from hsl_node.errors import ConfigError
from hsl_node.train.data.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from hsl_node.train.networks.efficientnet import EfficientNetLite0
from hsl_node.train.networks.vit import VisionTransformer

TINY_WIDTHS = (16, 32, 64)
GROUPS = 32  # of a GroupNorm at most (Wu and He 2018)
CHANNELS_OF_A_GROUP = 8  # at least: a group of one channel and one pixel is always 0


class Trunk(nn.Module):
    """Images in, pooled features out, always float32.

    This is where nearly all the arithmetic is, so `precision` (bfloat16 autocast) applies here only: everything behind
    it is a few million operations and stays in float32, which keeps probabilities free of bfloat16's ties.

    Raises:
        ConfigError: no such backbone, or not for this image size or norm.
    """

    scale: Tensor | None
    shift: Tensor | None

    def __init__(self, backbone: str, norm: str = "batch", image_size: int = 224) -> None:
        super().__init__()
        self.backbone = backbone
        self.net, self.features = _make(backbone, image_size)
        if norm == "group":
            _use_group_norm(self.net, backbone)
        self.precision = torch.float32
        self._normalise_as_trained()

    def forward(self, image_BCHW: Tensor) -> Tensor:
        if self.scale is not None and self.shift is not None:
            image_BCHW = image_BCHW * self.scale + self.shift
        # No context manager at all in float32, so that exporters see a plain graph.
        reduced = self.precision != torch.float32
        with torch.autocast(image_BCHW.device.type, self.precision) if reduced else contextlib.nullcontext():
            feature = self.net(image_BCHW)  # (B, 3, S, S) -> (B, F)
        return feature.float()  # type: ignore[no-any-return]

    def with_stages(self, image_BCHW: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Features (B, F), and the maps (B, C, H, W) after the stem and each stage, before their last ReLU. ResNets and
        efficientnet_lite0 have 5, tiny 3, vit_tiny 1 + its depth.

        Gradients pass through both. Raises: ConfigError: a network of a library, whose stages nobody told us.
        """
        found: dict[nn.Module, Tensor] = {}

        def keep(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
            found[module] = inputs[0]  # a ReLU that a block uses twice: its last input stays
            return (inputs[0].clone(),)  # ReLUs work in place

        after = after_stages_of(self.net, self.backbone)
        hooks = [module.register_forward_pre_hook(keep) for module in after]
        try:
            feature = self(image_BCHW)
        finally:
            for hook in hooks:
                hook.remove()
        return feature, [_as_map(found[module]).float() for module in after]

    def _normalise_as_trained(self) -> None:
        """Images come with ImageNet's mean and deviation; a network of timm may want others (CLIP does)."""
        wanted = getattr(self.net, "pretrained_cfg", {})
        mean, std = wanted.get("mean", IMAGENET_MEAN), wanted.get("std", IMAGENET_STD)
        scale = torch.tensor([i / w for i, w in zip(IMAGENET_STD, std, strict=True)]).view(3, 1, 1)
        shift = torch.tensor([(i - w) / s for i, w, s in zip(IMAGENET_MEAN, mean, std, strict=True)]).view(3, 1, 1)
        other = (tuple(mean), tuple(std)) != (IMAGENET_MEAN, IMAGENET_STD)
        self.register_buffer("scale", scale if other else None, persistent=False)
        self.register_buffer("shift", shift if other else None, persistent=False)


class TinyResNet(nn.Module):
    """Two residual blocks, 0.1 million parameters: the published shape in small. Works from 16 px."""

    def __init__(self) -> None:
        super().__init__()
        first, second, last = TINY_WIDTHS
        self.conv1 = nn.Conv2d(3, first, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        self.relu = nn.ReLU()
        self.layer1 = _halving_block(first, second)
        self.layer2 = _halving_block(second, last)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(image_BCHW)))  # (B, 16, S/2, S/2)
        x = self.layer2(self.layer1(x))  # (B, 64, S/8, S/8)
        pooled: Tensor = x.mean(dim=(2, 3))  # (B, 64)
        return pooled


def use_precision(model: nn.Module, precision: torch.dtype) -> None:
    """Set the precision of every trunk inside a model."""
    for module in model.modules():
        if isinstance(module, Trunk):
            module.precision = precision


def _make(backbone: str, image_size: int) -> tuple[nn.Module, int]:
    """The network without its classifier, and the number of its features."""
    library, _, name = backbone.rpartition(":")
    if library:
        return _of_library(library, name, image_size)
    match name:
        case "tiny":
            return TinyResNet(), TINY_WIDTHS[-1]
        case "efficientnet_lite0":
            return EfficientNetLite0(), EfficientNetLite0.FEATURES
        case "vit_tiny":
            return VisionTransformer(image_size), VisionTransformer.WIDTH
    net = getattr(torchvision.models, name)(weights=None)
    features = int(net.fc.in_features)
    net.fc = nn.Identity()
    return net, features


def _of_library(library: str, name: str, image_size: int) -> tuple[nn.Module, int]:
    """Any classifier of torchvision or timm, tried with an image of the plan's size; nothing is ever downloaded."""
    net = _of_torchvision(name) if library == "torchvision" else _of_timm(name)
    try:
        with torch.inference_mode():
            found = net.eval()(torch.zeros(1, 3, image_size, image_size))
        if found.ndim != 2 or getattr(net, "aux_logits", False):
            raise ValueError("it gives more than one row of features for an image")
    except Exception as exc:  # whatever a foreign network raises, or gives, where the size is not its own
        said = " ".join(str(exc).split())[:200]
        raise ConfigError(
            f"backbone {library}:{name} does not turn an image of {image_size} px into features: {said}",
            remedy="set the plan's image_size to what this network was made for, or take another backbone",
        ) from exc
    return net.train(), found.shape[1]


def _of_torchvision(name: str) -> nn.Module:
    if name not in torchvision.models.list_models(module=torchvision.models):
        raise ConfigError(
            f"torchvision {torchvision.__version__} has no classifier {name!r}",
            remedy="names are those of torchvision.models.list_models(), as densenet121; all peers need the version",
        )
    net: nn.Module = torchvision.models.get_model(name, weights=None)
    linear = [at for at, module in net.named_modules() if isinstance(module, nn.Linear)]
    if linear:
        net.set_submodule(linear[-1], nn.Identity())
    return net


def _of_timm(name: str) -> nn.Module:
    try:
        import timm
    except ImportError as exc:
        raise ConfigError(
            f"backbone timm:{name} needs the package timm", remedy="pip install 'hsl-node[timm]', at every peer"
        ) from exc
    if not timm.is_model(name):  # never a name like hf-hub:..., which timm would fetch
        raise ConfigError(
            f"timm {timm.__version__} has no model {name!r}",
            remedy="names are those of timm.list_models(); all peers need the same version",
        )
    net: nn.Module = timm.create_model(name, pretrained=False, num_classes=0)
    return net


def _use_group_norm(net: nn.Module, backbone: str) -> None:
    """Put a GroupNorm in the place of every BatchNorm: same names, no statistics of other images."""
    for module in list(net.modules()):
        for name, child in module.named_children():
            if type(child) is nn.BatchNorm2d:
                setattr(module, name, nn.GroupNorm(groups_of(child.num_features), child.num_features, eps=child.eps))
            elif isinstance(child, nn.modules.batchnorm._BatchNorm):  # timm's, which are activations as well
                raise ConfigError(f'norm = "group" is not to be had for {backbone}', remedy='set norm = "batch"')


def groups_of(channels: int) -> int:
    """How many groups a GroupNorm of so many channels has.

    >>> [groups_of(c) for c in (16, 24, 64, 512)]
    [2, 3, 8, 32]
    """
    return max(
        g for g in range(1, GROUPS + 1) if channels % g == 0 and (g == 1 or channels // g >= CHANNELS_OF_A_GROUP)
    )


def after_stages_of(net: nn.Module, backbone: str) -> Sequence[nn.Module]:
    """The modules whose input is what the stem and each stage gave. Raises: ConfigError: nobody told us of this one."""
    match net:
        case ResNet():
            return [net.relu, *(stage[-1].relu for stage in (net.layer1, net.layer2, net.layer3, net.layer4))]
        case TinyResNet():
            return [net.relu, net.layer1.relu, net.layer2.relu]
        case EfficientNetLite0() | VisionTransformer():
            return net.after_stages()
    raise ConfigError(
        f"this method looks at the stages of its network, and those of {backbone} are not known",
        remedy="take resnet18, resnet34, resnet50, tiny, efficientnet_lite0 or vit_tiny",
    )


def _as_map(x: Tensor) -> Tensor:
    """Tokens (B, 1 + H * W, C), the class token first, -> (B, C, H, W); a map stays."""
    if x.ndim == 4:
        return x
    batch, tokens, channels = x.shape
    side = round((tokens - 1) ** 0.5)
    return x[:, 1:].transpose(1, 2).reshape(batch, channels, side, side)


def _halving_block(inputs: int, outputs: int) -> BasicBlock:
    """A residual block that halves the image's side."""
    shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=2, bias=False), nn.BatchNorm2d(outputs))
    return BasicBlock(inputs, outputs, stride=2, downsample=shortcut)
