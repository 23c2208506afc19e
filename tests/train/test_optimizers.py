"""The plan's optimiser, and its learning rate over the run."""

from __future__ import annotations

import copy
import math
from itertools import pairwise

import learning
import pytest
import torch
from torch import nn

from hsl_node.train.networks.mmoe import MMoE
from hsl_node.train.optimizers import by_plan, learning_rate, take_up

FORMATS = (torch.contiguous_format, torch.channels_last)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(3, 2), nn.LayerNorm(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.linear(x))  # type: ignore[no-any-return]


def of_one_number(value: float) -> nn.Module:
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(value)
    return model


def stepped(optimizer: str, gradients: list[float], **changes: object) -> float:
    """A weight of 2 after these gradients, at the rate 0.1."""
    model = of_one_number(2.0)
    plan = learning.small_plan(optimizer=optimizer, learning_rate=0.1, learning_rate_min=0.0, **changes)
    main = by_plan(model, plan)["main"]
    for gradient in gradients:
        model.weight.grad = torch.full((1, 1), gradient)
        main.step()
    return model.weight.item()


# ---------------------------------------------------------------- which optimiser


def test_sgd_with_momentum_by_hand() -> None:
    # buffer 1, then 0.5 * 1 + 1 = 1.5: 2 - 0.1 * (1 + 1.5)
    assert stepped("sgd", [1.0, 1.0], momentum=0.5, weight_decay=0.0) == pytest.approx(1.75)
    # decay is part of the gradient: 2 - 0.1 * (1 + 0.5 * 2)
    assert stepped("sgd", [1.0], weight_decay=0.5) == pytest.approx(1.8)


def test_adam_takes_decay_into_the_gradient_and_adamw_beside_it() -> None:
    # the first step of Adam is the rate, whatever the gradient's size: 2 - 0.1
    assert stepped("adam", [1.0], weight_decay=0.5) == pytest.approx(1.9, abs=1e-6)
    assert stepped("adam", [0.0], weight_decay=0.5) == pytest.approx(1.9, abs=1e-6)  # the decay alone is a gradient
    # 2 * (1 - 0.1 * 0.5) - 0.1, and without a gradient only the first
    assert stepped("adamw", [1.0], weight_decay=0.5) == pytest.approx(1.8, abs=1e-6)
    assert stepped("adamw", [0.0], weight_decay=0.5) == pytest.approx(1.9, abs=1e-6)


def test_adamw_decays_matrices_alone() -> None:
    model = Small()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    main = by_plan(model, learning.small_plan(optimizer="adamw", learning_rate=0.1, weight_decay=0.5))["main"]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    main.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"linear.weight"}
    torch.testing.assert_close(model.linear.weight.detach(), before["linear.weight"] * 0.95)


def test_the_biases_of_all_experts_are_biases() -> None:
    model = MMoE(backbone="tiny", experts=3)
    main = by_plan(model, learning.small_plan(optimizer="adamw"))["main"]
    free = {id(p) for p in main.param_groups[1]["params"]}
    assert main.param_groups[1]["weight_decay"] == 0.0
    assert id(model.experts.bias_in) in free and id(model.experts.weight_in) not in free
    assert sum(len(g["params"]) for g in main.param_groups) == len(list(model.parameters()))


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_a_step_is_torchs_to_the_bit_and_copies_nothing(optimizer: str) -> None:
    """Fused Adam would copy each channels-last gradient."""
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Conv2d(16, 16, 3), nn.Conv2d(16, 8, 1), nn.Flatten(), nn.Linear(32, 1))
    ours = ours.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    theirs = copy.deepcopy(ours)
    main = by_plan(ours, learning.small_plan(optimizer=optimizer))["main"]
    of = {id(p): q for p, q in zip(ours.parameters(), theirs.parameters(), strict=True)}
    groups = [{**group, "params": [of[id(p)] for p in group["params"]]} for group in main.param_groups]
    torchs = (torch.optim.Adam if optimizer == "adam" else torch.optim.AdamW)(groups)
    for _ in range(3):
        x = torch.randn(5, 16, 4, 4).contiguous(memory_format=torch.channels_last)
        for model in (ours, theirs):
            model.zero_grad()
            model(x).square().sum().backward()
        torchs.step()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
            main.step()
        assert "aten::_fused_adam" in "".join(names := [event.name for event in seen.events()])
        assert "aten::clone" not in names
    for mine, torchs_own in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, torchs_own)
    kept = main.state_dict()["state"][0]["exp_avg"]
    assert kept.shape == (16, 16, 3, 3) and kept.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_what_an_optimiser_remembers_goes_on_from_its_state(optimizer: str) -> None:
    plan = learning.small_plan(optimizer=optimizer, momentum=0.9 if optimizer == "sgd" else 0.0)
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))

    def train(model: nn.Module, main: torch.optim.Optimizer, steps: int) -> None:
        for _ in range(steps):
            main.zero_grad()
            model(x).square().sum().backward()
            main.step()

    torch.manual_seed(0)
    whole = Small()
    broken = Small()
    broken.load_state_dict(whole.state_dict())
    main = by_plan(whole, plan)["main"]
    train(whole, main, 4)
    first = by_plan(broken, plan)["main"]
    train(broken, first, 2)
    again = Small()
    again.load_state_dict(broken.state_dict())
    second = by_plan(again, plan)["main"]
    second.load_state_dict(first.state_dict())
    train(again, second, 2)
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
@pytest.mark.parametrize("formats", [FORMATS, FORMATS[::-1]])
def test_moments_are_taken_up_as_the_kernels_lie_on_this_machine(
    optimizer: str, formats: tuple[torch.memory_format, torch.memory_format]
) -> None:
    """A hospital gets a machine with bfloat16 or a GPU in mid-run: there kernels are channels-last."""
    plan = learning.small_plan(optimizer=optimizer, learning_rate=0.1, momentum=0.9 if optimizer == "sgd" else 0.0)
    torch.manual_seed(0)
    first, images = nn.Conv2d(3, 5, 3), torch.randn(4, 2, 3, 8, 8)
    second = copy.deepcopy(first)

    def train(model: nn.Module, main: torch.optim.Optimizer, batches: torch.Tensor) -> None:
        for x in batches:
            main.zero_grad()
            model(x).square().mean().backward()
            main.step()

    first, main = first.to(memory_format=formats[0]), by_plan(first, plan)["main"]  # type: ignore[call-overload]
    train(first, main, images[:2])
    second = second.to(memory_format=formats[1])  # type: ignore[call-overload]
    second.load_state_dict(first.state_dict())
    other = by_plan(second, plan)["main"]
    take_up(other, copy.deepcopy(main.state_dict()))
    train(first, main, images[2:])
    train(second, other, images[2:])
    torch.testing.assert_close(second.weight, first.weight, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- its rate


def test_restarts_without_warm_up_are_the_published_schedule_to_the_bit() -> None:
    plan = learning.small_plan(schedule="restarts", cosine_period_epochs=7, learning_rate=1e-3, learning_rate_min=1e-4)
    for epoch in range(1, 40):
        part = ((epoch - 1) % 7) / 7
        assert learning_rate(plan, epoch) == 1e-4 + (1e-3 - 1e-4) * (1 + math.cos(math.pi * part)) / 2


def test_cosine_run_falls_once_over_the_planned_run_like_torchs() -> None:
    plan = learning.small_plan(
        schedule="cosine_run", rounds=3, epochs_per_round=4, learning_rate=1e-3, learning_rate_min=1e-4
    )
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-3)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12, eta_min=1e-4)
    for epoch in range(1, 14):
        assert learning_rate(plan, epoch) == pytest.approx(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    assert learning_rate(plan, 7) == pytest.approx((1e-3 + 1e-4) / 2)
    assert learning_rate(plan, 20) == 1e-4  # beyond the plan: it does not climb again


@pytest.mark.parametrize("schedule", ["restarts", "cosine_run"])
def test_warm_up_rises_in_equal_steps_and_the_cosine_begins_after_it(schedule: str) -> None:
    plan = learning.small_plan(
        schedule=schedule, warmup_epochs=3, rounds=2, epochs_per_round=4, cosine_period_epochs=5, learning_rate=0.4
    )
    rates = [learning_rate(plan, epoch) for epoch in range(1, 9)]
    assert rates[:4] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert rates[3] == 0.4 and all(a > b for a, b in pairwise(rates[3:]))
