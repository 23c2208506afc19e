"""Images with the amplitudes of a common spectrum: low frequencies become everybody's, phases stay the image's own.

Shapes: B images, C = 3 channels, S pixels a side, b frequencies of the box on each side of zero, W = 2b + 1.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hsl_node.train.data.preprocessing import IMAGENET_MEAN, IMAGENET_STD

MOMENTUM = 0.1  # of the running mean over batches


class AmplitudeNorm(nn.Module):
    """(B, 3, S, S) -> the same, as ImageNet's mean and deviation have them. Only frequencies within the box change.

    While it is `learning` and in training mode it first takes the batch into its running mean, which the first batch
    begins. Before that it changes nothing. Amplitudes are those of pixels in 0..1, of which zero frequency is never
    negative. With b = 0 the whole thing is a shift of each channel's mean.
    """

    amplitude: Tensor  # (3, W, W), zero frequency in the middle
    batches: Tensor  # () int64: how many it has learned from
    mean: Tensor
    std: Tensor

    def __init__(self, image_size: int, box: float) -> None:
        super().__init__()
        self.reach = int(box * image_size)
        width = 2 * self.reach + 1
        self.learning = False
        self.register_buffer("amplitude", torch.zeros(3, width, width))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        pixels = image_BCHW * self.std + self.mean
        if self.training and self.learning:
            self._learn(pixels)
        changed = (with_amplitude(pixels, self.amplitude) - self.mean) / self.std
        return torch.where(self.batches > 0, changed, image_BCHW)

    @torch.no_grad()
    def _learn(self, pixels: Tensor) -> None:
        here = amplitude(pixels, self.reach).mean(dim=0)
        self.amplitude.copy_(torch.where(self.batches > 0, torch.lerp(self.amplitude, here, MOMENTUM), here))
        self.batches += 1


def amplitude(pixels: Tensor, half: int) -> Tensor:
    """(B, C, S, S) -> (B, C, W, W): how strong each low frequency is, zero frequency in the middle."""
    if half == 0:
        return pixels.sum(dim=(2, 3), keepdim=True).abs()
    return _box(torch.fft.fft2(pixels), half).abs()


def with_amplitude(pixels: Tensor, target: Tensor) -> Tensor:
    """(B, C, S, S) with the amplitudes of (C, W, W) in the box, and its own phases."""
    side, half = pixels.shape[-1], target.shape[-1] // 2
    if half == 0:  # the same, and no Fourier transform, which exporters lack
        return pixels + target / side**2 - pixels.mean(dim=(2, 3), keepdim=True)
    spectrum = torch.fft.fftshift(torch.fft.fft2(pixels), dim=(2, 3))
    at = slice(side // 2 - half, side // 2 + half + 1)
    spectrum[..., at, at] = torch.polar(target.expand_as(spectrum[..., at, at].real), spectrum[..., at, at].angle())
    changed: Tensor = torch.fft.ifft2(torch.fft.ifftshift(spectrum, dim=(2, 3))).real
    return changed


def _box(spectrum: Tensor, half: int) -> Tensor:
    centre = spectrum.shape[-1] // 2
    at = slice(centre - half, centre + half + 1)
    low: Tensor = torch.fft.fftshift(spectrum, dim=(2, 3))[..., at, at]
    return low
