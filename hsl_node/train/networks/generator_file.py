"""FedKTL's generator of a local file that the plan names by its sha256: an ONNX graph, latents in, images out.

ONNX holds the network beside its weights, and is data alone: onnx's reference evaluator computes it, in numpy. That is
slow, and enough for an image of each class in a round.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from hsl_node.errors import ConfigError
from hsl_node.train.batches import normalise
from hsl_node.train.networks.pretrained import require_file

BEYOND = 0.01  # of 0 to 1: a network's rounding


@dataclass(frozen=True)
class FileGenerator:
    """Standard normal latents (n, D) -> images (n, 3, S, S), normalised as all images are."""

    run: Callable[[NDArray[np.float32]], NDArray[Any]]  # (n, D) -> (n, 1 or 3, H, W) of 0 (black) to 1
    latent: int
    side: int

    def __call__(self, latents: Tensor) -> Tensor:
        pixels = torch.from_numpy(self.run(latents.float().numpy()).astype(np.float32)).clamp(0, 1)
        if pixels.shape[2:] != (self.side, self.side):
            pixels = F.interpolate(pixels, (self.side, self.side), mode="bilinear", antialias=True)
        return normalise(pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1) * 255)


def open_generator(path: Path | None, sha256: str, latent: int, side: int) -> FileGenerator:
    """Opened, and tried with two latents.

    Raises:
        ConfigError: there is no such file, it is another one than the plan's, or no such generator.
    """
    if path is None:
        raise ConfigError(
            f"the plan's generator is the file with sha256 {sha256[:12]}..., node.toml names no file",
            remedy="set train.generator in node.toml to it: an ONNX file, the same at every hospital",
        )
    require_file("generator", path, sha256)
    try:
        import onnx
        from onnx.reference import ReferenceEvaluator
    except ImportError as exc:
        raise ConfigError(f"generator {path} needs the package onnx", remedy="pip install 'hsl-node[onnx]'") from exc
    try:
        graph = onnx.load(path, load_external_data=False)  # what lies beside the file is in nobody's sha256
        evaluator = ReferenceEvaluator(graph)
        (entry,) = evaluator.input_names
    except Exception as exc:  # of protobuf, of onnx, of a graph with two inputs
        raise ConfigError(
            f"generator {path} cannot be read: {' '.join(str(exc).split())[:200]}",
            remedy="give an ONNX file of one input that holds its weights, as torch.onnx.export(..., "
            "external_data=False) writes it",
        ) from exc
    found = FileGenerator(lambda latents: np.asarray(next(iter(evaluator.run(None, {entry: latents})))), latent, side)
    _require_images(path, found)
    return found


def _require_images(path: Path, generator: FileGenerator) -> None:
    given = np.random.default_rng(0).standard_normal((2, generator.latent)).astype(np.float32)
    try:
        images = generator.run(given)
    except Exception as exc:
        what = f"takes no latents of {generator.latent} numbers: {' '.join(str(exc).split())[:200]}"
        raise ConfigError(f"generator {path} {what}", remedy="set the plan's fedktl.latent to what it takes") from exc
    how = ""
    if images.ndim != 4 or len(images) != 2 or images.shape[1] not in (1, 3):
        how = f"an array of {' x '.join(map(str, images.shape))}"
    elif not np.isfinite(images).all() or images.min() < -BEYOND or images.max() > 1 + BEYOND:
        how = f"values from {images.min():.3g} to {images.max():.3g}"
    if how:
        raise ConfigError(
            f"generator {path} makes {how} of two latents of {generator.latent} numbers",
            remedy="export it so that it gives (2, 1 or 3, height, width) of 0 (black) to 1 (white) for them",
        )
