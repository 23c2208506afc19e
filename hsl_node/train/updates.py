"""What one batch does to a model: plain descent, and what else is a function of a loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hsl_node.train import devices
from hsl_node.train.method import Loss, Step, Terms, Update


def descend(loss: Loss, optimizer: str = "main") -> Update:
    """One step of an optimizer down the sum of a loss's terms."""

    def update(step: Step) -> Terms | None:
        which = step.learner.optimizers[optimizer]
        which.zero_grad(set_to_none=True)
        terms = backward(step, loss)
        if terms is not None:
            clip(step)
            which.step()
        return terms

    return update


def perturbed(loss: Loss, optimizer: str = "main") -> Update:
    """Descent by the gradient at w + alpha g / |g|, over all parameters together; the step is taken from w.

    alpha: the method's setting. Both passes begin with the same running statistics, and those of the first one stay.
    """

    def update(step: Step) -> Terms | None:
        which, buffers = step.learner.optimizers[optimizer], list(step.model.buffers())
        which.zero_grad(set_to_none=True)
        before = [buffer.clone() for buffer in buffers]
        terms = backward(step, loss)
        if terms is None:
            return None
        moved = [p for p in step.model.parameters() if p.grad is not None]
        here, after = [p.detach().clone() for p in moved], [buffer.clone() for buffer in buffers]
        _put(buffers, before)
        length = torch.stack([p.grad.norm() for p in moved if p.grad is not None]).norm()
        with torch.no_grad():
            for p in moved:
                p.add_(p.grad * (step.settings["alpha"] / (length + 1e-12)))
        which.zero_grad(set_to_none=True)
        backward(step, loss)
        _put(moved, here)
        _put(buffers, after)
        clip(step)
        which.step()
        return terms

    return update


@torch.no_grad()
def _put(those: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for tensor, value in zip(those, values, strict=True):
        tensor.copy_(value)


def backward(step: Step, loss: Loss) -> Terms | None:
    """Add the gradient of a loss's terms to the model's; gives the terms, None where the batch is skipped.

    Where the site computes in parts of `micro_batch` images, each part's terms count by its share of the batch: exact
    for means over images, and an approximation where images of a batch are compared with one another, as BatchNorm
    does (so are its running statistics); dropout draws for each part. A part that is skipped adds nothing.
    Several devices compute in parts too, where BatchNorm sees the parts of all of them.
    """
    found: dict[str, Tensor] = {}
    images, size = len(step.batch.image), step.learner.site.micro_batch
    if (ranks := devices.ranks()) > 1:
        return devices.backward(step.learner, loss, _parts(step, size or images, ranks))
    for part, share in _parts(step, size) if 0 < size < images else ((step, 1.0),):
        terms = loss(part)
        if terms is None:
            continue
        (sum(terms.values()) * share).backward()  # type: ignore[union-attr]
        for name, term in terms.items():
            found[name] = found.get(name, 0) + term.detach() * share
    return found or None


def clip(step: Step) -> None:
    """Shorten the gradient of all parameters together to the plan's `clip_norm`."""
    longest = step.learner.plan.clip_norm
    if longest:
        torch.nn.utils.clip_grad_norm_(step.model.parameters(), longest)


def _parts(step: Step, size: int, ranks: int = 1) -> list[tuple[Step, float]]:
    """At most `size` images each, as equal as can be; never one alone, with which BatchNorm can't work.

    ranks: as many for each of them; of fewer images than ranks all, for each.
    """
    images = len(step.batch.image)
    if images < ranks:
        return [(step, 1 / ranks)] * ranks
    count = ranks * max(1, min(-(-images // (size * ranks)), images // (2 * ranks)))
    ends = [images * (n + 1) // count for n in range(count)]
    slices = [slice(a, b) for a, b in zip([0, *ends], ends, strict=False)]
    return [
        (
            replace(step, batch=step.batch.part(at), share=step.share * (at.stop - at.start) / images),
            (at.stop - at.start) / images,
        )
        for at in slices
    ]
