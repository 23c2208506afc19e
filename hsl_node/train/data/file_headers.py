"""What a set's files hold before they are decoded: frames, shapes. For `data check`."""

from __future__ import annotations

from collections.abc import Sequence

from hsl_node.federation.plan import Plan
from hsl_node.train.data.digests import in_parallel
from hsl_node.train.data.images import Outline, outline
from hsl_node.train.data.sources import Item
from hsl_node.train.progress import Progress

UNEVEN = 1.5  # widest shape by narrowest from which squeezing is worth a word: a circle becomes 3 : 2 in one of them


def remarks(items: Sequence[Item], plan: Plan, progress: Progress) -> list[str]:
    """What the plan's `frame` and `fit` decide about these images, where it matters."""
    files = [item for item in items if item.row is None]
    outlines: list[Outline] = []
    for n, found in enumerate(in_parallel(lambda item, _: outline(item.path), files)):
        if isinstance(found, Outline):
            outlines.append(found)
        progress(n + 1, len(files))
    told = []
    if several := [o.frames for o in outlines if o.frames > 1]:
        told.append(
            f"{len(several)} files hold several frames or pages (up to {max(several)}): the {plan.frame} one of each is"
            " taken (`frame` in the plan)"
        )
    shapes = [o.width / o.height for o in outlines if o.height and o.width]
    if plan.fit == "squeeze" and shapes and max(shapes) / min(shapes) >= UNEVEN:
        told.append(
            f"the images are {min(shapes):.2f} to {max(shapes):.2f} times as wide as tall and squeezed into a square,"
            ' each differently (`fit` in the plan; "pad" keeps their shape)'
        )
    return told
