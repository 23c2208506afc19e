"""A model that is ready for images: decoded squares in, a probability of each class out.

The node's own and one that was taken away are the same value, so they cannot predict differently.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hsl_node.errors import ConfigError, HslError
from hsl_node.host.cores import available_cores
from hsl_node.train.bundle import REFERENCE, WEIGHTS_FILE, Card, read_card
from hsl_node.train.data.anchor import AnchorSet
from hsl_node.train.data.cache import as_colour
from hsl_node.train.hardware import Hardware, prepare
from hsl_node.train.method import Method
from hsl_node.train.methods import method_of
from hsl_node.train.scoring import anchor_embedding, as_probabilities, forward
from hsl_node.train.start import place
from hsl_node.train.state_dict import all_tensors, load_weights
from hsl_node.weights.checkpoint_file import read_weights

Array = NDArray[Any]


@dataclass(frozen=True)
class Predictor:
    """A card, and the network that it describes."""

    card: Card
    method: Method
    model: nn.Module
    reference: Tensor | None  # the anchor reference (512,)
    hardware: Hardware

    def __call__(self, squares: Sequence[Array]) -> Array:
        """Squares (S, S) or (S, S, 3) uint8 -> (N, C) float32, in the order of the card's classes."""
        images = np.stack([as_colour(square) for square in squares])
        logits = forward(self.method, self.model, images, np.arange(len(images)), self.reference, self.hardware)
        found = as_probabilities(logits)
        return np.stack([1 - found, found], axis=1) if found.ndim == 1 else found


def of_model(model: nn.Module, card: Card, hardware: Hardware, anchor: AnchorSet | None) -> Predictor:
    """The node's own: its anchor set gives the reference."""
    method = method_of(card.plan.method)
    return Predictor(card, method, model, anchor_embedding(method, model, anchor, hardware), hardware)


def of_bundle(folder: Path) -> Predictor:
    """One that was taken away, from its folder alone.

    Raises:
        UsageError, ConfigError: no such folder, or not what was exported (`read_card`).
    """
    card = read_card(folder)
    threads = min(card.hardware.threads, available_cores())
    hardware = prepare(
        threads=threads,
        precision=card.hardware.precision,
        image_size=card.plan.image_size,
        backbone=card.plan.backbone,
    )
    method = method_of(card.plan.method)
    model = method.network.build(card.plan)
    try:
        tensors = read_weights(folder / WEIGHTS_FILE)
        reference = tensors.pop(REFERENCE, None)
        load_weights(model, tensors, all_tensors(model))
        if (reference is None) != (method.network.reference is None):
            raise ConfigError(f"the method {method.name} and {REFERENCE} do not go together")
    except HslError as exc:
        raise ConfigError(
            f"{folder / WEIGHTS_FILE} and the card beside it are of two models: {exc.message}",
            remedy="export the model again, into an empty folder",
        ) from exc
    embedding = None if reference is None else torch.tensor(reference)
    return Predictor(card, method, place(model, hardware).eval(), embedding, hardware)
