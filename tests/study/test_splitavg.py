"""SplitAVG: a step worked out by hand, ordinary training where there is one hospital, and what a run leaves."""

from __future__ import annotations

from pathlib import Path

import learning
import pytest
import torch
import torch.nn.functional as F
from every_method import PEERS, SIZES, sites_for
from torch import Tensor, nn

from hsl_node.errors import ConfigError
from hsl_node.study.splitavg import Part, simulate, split_step
from hsl_node.train.scoring import open_model, validate
from hsl_node.weights.checkpoint_file import read_weights

INPUTS = ([1.0, 2.0], [-1.0, 3.0])
TARGETS = ([1.0, 0.0], [1.0, 1.0])
RATE = 0.1


class Times(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(factor, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.w * x


def part(model: nn.Module) -> Part:
    return Part(model, torch.optim.SGD(model.parameters(), RATE))


def column(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None]


def test_a_step_by_hand() -> None:
    """Not: each with its own gradient (0.9625, 1.8), nor the sum of activations, as released (0.7, 1.8)."""
    clients, server = [part(Times(1.0)), part(Times(2.0))], part(Times(0.5))
    found = split_step(clients, server, [column(x) for x in INPUTS], [column(y) for y in TARGETS], F.mse_loss)
    assert found.item() == pytest.approx(2.3125)
    assert server.model.w.item() == pytest.approx(-0.375)  # type: ignore[operator, union-attr]
    assert [c.model.w.item() for c in clients] == pytest.approx([0.95625, 1.85625])  # type: ignore[operator, union-attr]


def test_of_one_hospital_it_is_ordinary_training_bit_for_bit() -> None:
    client, server, whole = part(Times(1.3)), part(Times(0.7)), nn.Sequential(Times(1.3), Times(0.7))
    optimizer = torch.optim.SGD(whole.parameters(), RATE)
    for _ in range(3):
        split_step([client], server, [column(INPUTS[0])], [column(TARGETS[0])], F.mse_loss)
        optimizer.zero_grad()
        F.mse_loss(whole(column(INPUTS[0])), column(TARGETS[0])).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert [p.model.w.item() for p in (client, server)] == [m.w.item() for m in whole]  # type: ignore[operator, union-attr]


def test_where_batches_are_the_same_the_mean_changes_nothing() -> None:
    twins = [part(Times(1.0)), part(Times(1.0))]
    split_step(twins, part(Times(0.5)), [column(INPUTS[0])] * 2, [column(TARGETS[0])] * 2, F.mse_loss)
    alone = part(Times(1.0))
    split_step([alone], part(Times(0.5)), [column(INPUTS[0])], [column(TARGETS[0])], lambda a, b: F.mse_loss(a, b) / 2)
    assert [t.model.w.item() for t in twins] == [alone.model.w.item()] * 2  # type: ignore[operator, union-attr]


def test_a_run_learns_and_leaves_a_whole_model_for_each_hospital(tmp_path: Path) -> None:
    plan = learning.small_plan(method="splitavg", rounds=4, learning_rate=3e-3)
    sites, heard = sites_for(plan), []
    written = simulate(sites, tmp_path, lambda epoch, loss: heard.append(loss))
    assert len(heard) == 8 and heard[-1] < 0.8 * heard[0]
    own = [read_weights(written[peer]) for peer in PEERS]
    private = [name for name in own[0] if (own[0][name] != own[1][name]).any()]
    assert private == ["trunk.net.conv1.weight"]  # all behind the cut is everybody's
    for peer in PEERS:
        found = validate(sites[peer], open_model(written[peer], plan, sites[peer].hardware)[1])
        assert found.loss is not None and SIZES[peer]


@pytest.mark.parametrize(
    ("changes", "what"),
    [({"augment": {"flip": True}, "class_balance": "weights"}, "without augment, class_balance"),
     ({"batch_size": SIZES["birch"] + 1}, "birch has none of 17")],
)  # fmt: skip
def test_what_is_not_simulated_is_refused_and_not_left_out(
    tmp_path: Path, changes: dict[str, object], what: str
) -> None:
    with pytest.raises(ConfigError, match=what):
        simulate(sites_for(learning.small_plan(method="splitavg", **changes)), tmp_path)
