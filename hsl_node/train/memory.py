"""What a method remembers from epoch to epoch beside its model: in the epoch checkpoint, as Adam's moments are."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer


class Memory(Optimizer):
    """One tensor of any shape: an optimizer that moves nothing, for `Method.optimizers` to give under its own name.

    A round that begins may find the last round's (the plan's `optimizer_state`), a method's first epoch none.
    """

    def __init__(self) -> None:
        self._place = torch.zeros(1, dtype=torch.int64)  # integer: a state beside floats would be rounded to theirs
        super().__init__([self._place], {})

    def put(self, tensor: Tensor) -> None:
        self.state[self._place] = {"tensor": tensor}

    def get(self) -> Tensor:
        """Raises: KeyError: nothing was put."""
        return self.state[self._place]["tensor"]  # type: ignore[no-any-return]


def memory(optimizers: Mapping[str, Optimizer], name: str) -> Memory:
    found = optimizers[name]
    assert isinstance(found, Memory)
    return found
