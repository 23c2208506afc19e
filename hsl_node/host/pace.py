"""How long to wait before the next try: ever longer, up to a longest. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from random import Random


@dataclass(frozen=True)
class Pace:
    """`Pace(1, 60)`: 1 s after the first failure in a row, then 2, 4, ... 32, 60, 60 for ever."""

    first_s: float
    longest_s: float
    growth: float = 2.0

    def after(self, failures: int) -> float:
        """Seconds to wait; 0 where nothing has failed."""
        times = min(failures - 1, 60)  # beyond that a float may be too small
        return min(self.first_s * self.growth**times, self.longest_s) if failures > 0 else 0.0

    def waits(self) -> Iterator[float]:
        """After the first failure, the second, ... without end."""
        return map(self.after, count(1))

    def drawn(self, failures: int, rng: Random) -> float:
        """Evenly from 0 to `after`: of many that fail together no two march in step."""
        return rng.uniform(0, self.after(failures))
