"""When a peer has nothing more to gain: the paper's rule on its validation AUC. Pure."""

from __future__ import annotations

from collections.abc import Sequence


def plateaued(aucs: Sequence[float | None], *, rounds: int, improvement: float) -> bool:
    """Has the validation AUC improved by less than `improvement` (relative) in each of the last `rounds` rounds?

    HSL paper, "Model development": at least 3 consecutive rounds with less than 0.5 % improvement. Improvement counts
    against the best AUC before. An undefined AUC (one class only) can't show a plateau.
    """
    if len(aucs) <= rounds:
        return False
    for at in range(len(aucs) - rounds, len(aucs)):
        now, before = aucs[at], [a for a in aucs[:at] if a is not None]
        if now is None or not before or now >= max(before) * (1 + improvement):
            return False
    return True
