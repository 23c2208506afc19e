"""When a peer has nothing more to gain: the paper's rule, on what its hospital would use. Pure."""

from __future__ import annotations

from collections.abc import Sequence


def plateaued(scores: Sequence[float | None], *, rounds: int, improvement: float) -> bool:
    """Is the best of the last `rounds` rounds not better by `improvement` (relative) than the best before them?

    `scores`: of each round the best of the hospital's candidates, by its validation. HSL paper, "Model development": 3
    consecutive rounds with less than 0.5 % improvement. Read round by round that ends a run which gains 0.45 % in each:
    so the three are taken together. A round without a score (one class only) can't show a plateau.
    """
    last, before = scores[-rounds:], [score for score in scores[:-rounds] if score is not None]
    known = [score for score in last if score is not None]
    if not before or len(known) < rounds:
        return False
    return max(known) - max(before) < improvement * abs(max(before))
