"""FlexFair: the coefficient by hand, by differences and by its properties; round 1 and equal losses are FedAvg."""

from __future__ import annotations

from pathlib import Path

import learning
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hsl_node.train.hardware import prepare
from hsl_node.train.loop import train_round
from hsl_node.train.methods.flexfair import Others, coefficient
from hsl_node.train.site import initial_weights
from hsl_node.train.start import StartFiles

PEERS = ("ash", "birch", "mercy")


@pytest.fixture(autouse=True)
def deterministic() -> None:
    prepare(device="cpu", threads=1, precision="float32", image_size=learning.SIZE)


def of(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def all_of(losses: Tensor, shares: Tensor, weight: float) -> list[float]:
    return [coefficient(k, losses, shares, weight).item() for k in range(len(losses))]


LOSSES, SHARES = of(0.4, 0.8, 1.2), of(0.5, 0.25, 0.25)


def test_the_worked_numbers() -> None:
    """m 0.7; with m as a constant they would be 0.6, 1.13333, 1.66667, with m over groups 0.466667, 1, 1.53333."""
    assert all_of(LOSSES, SHARES, 2.0) == pytest.approx([0.4, 1.03333, 1.56667], rel=1e-5)


def test_a_coefficient_that_would_climb_is_none() -> None:
    assert all_of(LOSSES, SHARES, 3.3)[0] == pytest.approx(0.01)
    assert all_of(LOSSES, SHARES, 3.34)[0] == 0.0  # negative from 10 / 3 on


def test_it_is_the_derivative_of_the_total() -> None:
    def total(losses: Tensor) -> Tensor:
        return losses.sum() + 1.5 * (losses - (SHARES * losses).sum()).square().mean()

    losses = LOSSES.clone().requires_grad_()
    total(losses).backward()
    assert losses.grad is not None and all_of(LOSSES, SHARES, 1.5) == pytest.approx(losses.grad.tolist())
    step = of(0.0, 1e-6, 0.0)
    slope = (total(LOSSES + step) - total(LOSSES - step)).item() / 2e-6
    assert coefficient(1, LOSSES, SHARES, 1.5).item() == pytest.approx(slope, rel=1e-6)


positive = st.lists(st.tuples(st.floats(0, 3), st.integers(1, 500)), min_size=2, max_size=6)


@given(positive)
def test_together_they_are_as_many_as_peers_and_a_larger_loss_counts_for_more(rows: list[tuple[float, int]]) -> None:
    losses, images = of(*(loss for loss, _ in rows)), of(*(n for _, n in rows))
    shares = images / images.sum()
    small = all_of(losses, shares, 0.01)  # so that none is clipped at 0
    assert sum(small) == pytest.approx(len(rows))
    raised = losses.clone()
    raised[0] += 0.5
    assert coefficient(0, raised, shares, 0.01) > coefficient(0, losses, shares, 0.01)
    assert all_of(losses, shares, 0.0) == [1.0] * len(rows)


@given(st.floats(0, 10), st.lists(st.integers(1, 500), min_size=2, max_size=6))
def test_equal_losses_are_1_to_the_bit(loss: float, images: list[int]) -> None:
    shares = of(*images) / sum(images)
    assert all_of(torch.full((len(images),), loss, dtype=torch.float64), shares, 2.0) == [1.0] * len(images)


def test_the_own_loss_is_the_epochs_mean_by_images_and_begins_anew_with_each() -> None:
    others = Others(0, LOSSES, SHARES)
    assert others.mean(1, of(1.0)[0], 2).item() == 1.0
    assert others.mean(1, of(4.0)[0], 4).item() == 3.0
    assert others.mean(2, of(5.0)[0], 2).item() == 5.0


def trained(folder: Path, method: str, said: dict[str, float], round: int = 2, **settings: float) -> bytes:
    table = {method: settings} if settings else {}
    plan = learning.small_plan(method=method, optimizer="sgd", learning_rate=0.05, seed=4, **table)
    site = learning.site(plan)
    digest, _ = initial_weights(folder, plan, site.method, folder / "fused")
    numbers = {peer: {"loss": loss} for peer, loss in said.items()} if method == "flexfair" else {}
    files = StartFiles(round, folder / "fused", digest, said=numbers, samples=dict.fromkeys(PEERS, 40))
    train_round(
        site, folder=folder / method, files=files, out=folder / "out", own=folder / "own", report=lambda _: None
    )
    return (folder / "out").read_bytes()


def test_the_first_round_and_a_weight_of_0_are_fedavg_to_the_byte(tmp_path: Path) -> None:
    plain = trained(tmp_path / "a", "fedavg", {}, round=1)
    assert trained(tmp_path / "b", "flexfair", {}, round=1) == plain
    unlike = dict(zip(PEERS, (0.2, 0.4, 0.9), strict=True))
    plain = trained(tmp_path / "c", "fedavg", {})
    assert trained(tmp_path / "d", "flexfair", unlike, **{"lambda": 0.0}) == plain
    assert trained(tmp_path / "e", "flexfair", unlike, **{"lambda": 2.0}) != plain


def test_a_hospital_says_the_mean_loss_of_the_epoch_that_it_sends(tmp_path: Path) -> None:
    plan = learning.small_plan(method="flexfair", optimizer="sgd", epochs_per_round=3)
    site, events = learning.site(plan), []
    digest, _ = initial_weights(tmp_path, plan, site.method, tmp_path / "fused")
    files = StartFiles(1, tmp_path / "fused", digest)
    state = train_round(
        site, folder=tmp_path / "t", files=files, out=tmp_path / "out", own=tmp_path / "own", report=events.append
    )
    assert state.best is not None
    terms = {e["epoch"]: e["terms"] for e in events if e["event"] == "epoch"}
    assert state.best.said == {"loss": terms[state.best.epoch]["primary"]}
