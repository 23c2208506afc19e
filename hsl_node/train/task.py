"""What is asked of an image, as a value: a loss that teaches, an answer that people read, a score that chooses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Task:
    """N images, C numbers that the network gives for each."""

    name: str
    loss: Callable[..., Tensor]  # (N, C), targets (N,), where wanted `weights` of classes -> (): mean over the images
    answer: Callable[[Tensor], Tensor]  # (N, C) -> what people read
    score: Callable[[Tensor, Tensor], float | None]  # (N, C), targets (N,) -> more is better; None: undefined
