"""EfficientNet-Lite0 (Tan and Le 2019; Google's variant without squeeze-excitation): 3.4 million numbers.

Ours, and not timm's: timm would bring a downloader along. TensorFlow's padding and BatchNorm epsilon, without which the
published weights give other features: `tf_efficientnet_lite0` of timm is this function, `efficientnet_lite0` is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

STEM = 32
# (expansion, kernel, stride of the first block, channels, blocks)
GROUPS = (
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
)
EPSILON = 1e-3


class EfficientNetLite0(nn.Module):
    """(B, 3, S, S) -> (B, 1280). Without the dropout and drop-connect of the published training.

    Tensors lie in the order of the published file, by which its weights are mapped.
    """

    FEATURES = 1280

    def __init__(self) -> None:
        super().__init__()
        self.stem = _unit(3, STEM, 3, stride=2)
        self.blocks = nn.Sequential()
        channels = STEM
        for expansion, kernel, stride, outputs, count in GROUPS:
            for number in range(count):
                self.blocks.append(_Block(channels, outputs, expansion, kernel, 1 if number else stride))
                channels = outputs
        self.head = _unit(channels, self.FEATURES, 1)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        x = self.head(self.blocks(self.stem(image_BCHW)))  # (B, 1280, S/32, S/32)
        pooled: Tensor = x.mean(dim=(2, 3))
        return pooled

    def after_stages(self) -> Sequence[nn.Module]:
        """The stem's ReLU, and what follows the last block at a fourth, 8th, 16th and 32nd of the side."""
        halving = [next_ for _, next_ in pairwise(self.blocks) if next_.stride == 2]
        return [self.stem[2], *halving[1:], self.head]


class _Block(nn.Module):
    """Expand, convolve each channel on its own, project; a shortcut where shapes allow. Its output has no ReLU."""

    def __init__(self, inputs: int, outputs: int, expansion: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.shortcut = stride == 1 and inputs == outputs
        wide = inputs * expansion
        self.layers = nn.Sequential(*([_unit(inputs, wide, 1)] if expansion > 1 else []))
        self.layers.append(_unit(wide, wide, kernel, stride=stride, groups=wide))
        self.layers.append(_unit(wide, outputs, 1)[:2])

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x)
        return x + y if self.shortcut else y  # type: ignore[no-any-return]


class _SameConv2d(nn.Conv2d):
    """TensorFlow's padding: where a stride leaves an odd number of pixels to add, the one more is right and below."""

    def forward(self, x: Tensor) -> Tensor:
        if self.stride[0] > 1:
            sides = [_padding(n, self.kernel_size[0], self.stride[0]) for n in (x.shape[3], x.shape[2])]
            x = F.pad(x, [*sides[0], *sides[1]])
        return super().forward(x)


def _padding(pixels: int, kernel: int, stride: int) -> tuple[int, int]:
    total = max((-(-pixels // stride) - 1) * stride + kernel - pixels, 0)
    return total // 2, total - total // 2


def _unit(inputs: int, outputs: int, kernel: int, *, stride: int = 1, groups: int = 1) -> nn.Sequential:
    padding = kernel // 2 if stride == 1 else 0
    convolution = _SameConv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs, eps=EPSILON), nn.ReLU6(inplace=True))
