"""One batch's effect on a model: in parts that a small GPU holds, and with a gradient of bounded length."""

from __future__ import annotations

import pytest
import torch
from ranks import network, step_of
from torch import Tensor, nn

from hsl_node.train.method import task_loss
from hsl_node.train.updates import backward, descend


def gradient(norm: str, images: int, micro_batch: int) -> tuple[Tensor, float, list[int]]:
    model, sizes = network(norm), []
    model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    terms = backward(step_of(model, images, micro_batch), task_loss)
    assert terms is not None
    return (
        torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]),
        terms["primary"].item(),
        sizes,
    )


@pytest.mark.parametrize(
    ("images", "micro_batch", "parts"),
    [
        (8, 4, [4, 4]),
        (8, 3, [2, 3, 3]),
        (7, 2, [2, 2, 3]),
        (5, 2, [2, 3]),
        (3, 2, [3]),
        (8, 8, [8]),
        (8, 64, [8]),
        (8, 0, [8]),
    ],
)
def test_a_batch_in_parts_gives_the_plans_gradient_with_group_norm(
    images: int, micro_batch: int, parts: list[int]
) -> None:
    """And no part is of one image, with which BatchNorm cannot work: one that is left over joins another."""
    whole, loss, _ = gradient("group", images, 0)
    found, in_parts, sizes = gradient("group", images, micro_batch)
    assert sizes == parts
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-7)
    assert in_parts == pytest.approx(loss, rel=1e-6)


def test_batch_norm_sees_the_parts_and_its_gradient_is_another() -> None:
    whole, _, _ = gradient("batch", 8, 0)
    found, _, _ = gradient("batch", 8, 4)
    assert (found - whole).abs().max() > 1e-3


def test_one_step_is_taken_for_all_parts_together() -> None:
    model = network("group")
    step = step_of(model, 8, 4, optimizer="sgd", learning_rate=0.1, weight_decay=0.0)
    before = [p.detach().clone() for p in model.parameters()]
    steps: list[int] = []
    step.learner.optimizers["main"].register_step_post_hook(lambda *_: steps.append(1))
    terms = descend(task_loss)(step)
    assert terms is not None and not terms["primary"].requires_grad and len(steps) == 1
    whole, _, _ = gradient("group", 8, 0)
    moved = torch.cat([(b - p).flatten() for b, p in zip(before, model.parameters(), strict=True)])
    torch.testing.assert_close(moved.detach(), 0.1 * whole, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(("norm", "expected"), [(0.0, 2.0), (1e-3, 1e-3), (1e3, 2.0)])
def test_a_gradient_is_shortened_as_one_vector_and_only_if_it_is_longer(norm: float, expected: float) -> None:
    """Two weights with gradients of sqrt(2) each, a vector of length 2, and a rate of 1."""
    model = nn.ParameterList([nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))])
    step = step_of(model, 2, clip_norm=norm, optimizer="sgd", learning_rate=1.0, weight_decay=0.0)
    descend(lambda _: {"both": 2**0.5 * (model[0] + model[1]).sum()})(step)
    length = torch.cat([p.detach() for p in model]).norm().item()
    assert length == pytest.approx(expected, rel=1e-3)
