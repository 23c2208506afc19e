"""FedProx: the term against numbers worked out by hand, and what it must not do to FedAvg."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import learning
import pytest
import torch
from rounds import first_round
from steps import Point, step_of
from torch import Tensor

from hsl_node.train.method import Step, Terms
from hsl_node.train.methods.fedprox import held_near, proximal

BASE = (1.0, -1.0)
# Quadratic losses sum of c/2 (v - t)^2, by coordinate: (c, t)
PEERS = {"a": ((1.0, 2.0), (3.0, 0.0)), "b": ((2.0, 1.0), (-1.0, 1.0))}
SHARES = {"a": 0.25, "b": 0.75}
ETA = 0.1


def quadratic(peer: str) -> Callable[[Step], Terms]:
    c, t = (torch.tensor(x, dtype=torch.float64) for x in PEERS[peer])
    return lambda step: {"primary": (c / 2 * (step.model.v - t).square()).sum()}  # type: ignore[operator, union-attr]


def trained(peer: str, mu: float, steps: int = 3, momentum: float = 0.0) -> Tensor:
    model = Point(*BASE)
    site = learning.site(learning.small_plan(method="fedprox", fedprox={"mu": mu}, optimizer="sgd"))
    step = step_of(model, site=site, optimizers={"main": torch.optim.SGD(model.parameters(), ETA, momentum)})
    update = held_near(quadratic(peer))
    for _ in range(steps):
        update(step)
    return model.v.detach()


def fused(mu: float) -> list[float]:
    return sum(share * trained(peer, mu) for peer, share in SHARES.items()).tolist()  # type: ignore[union-attr]


def test_three_steps_by_hand() -> None:
    """Not: a term without the half (0.465, -0.5245), an unsquared one (0.424972, -0.495638)."""
    assert trained("a", 0.5).tolist() == pytest.approx([1.5145, -0.5375])
    assert trained("b", 0.5).tolist() == pytest.approx([0.075, -0.4855])
    assert fused(0.5) == pytest.approx([0.434875, -0.4985])
    assert fused(0.0) == pytest.approx([0.4035, -0.4715])


def test_in_the_loss_it_is_the_same_without_momentum() -> None:
    """As Adam has it, here with plain SGD."""
    model = Point(*BASE)
    site = learning.site(learning.small_plan(method="fedprox", fedprox={"mu": 0.5}))
    step = step_of(model, site=site, optimizers={"main": torch.optim.SGD(model.parameters(), ETA)})
    for _ in range(3):
        terms = held_near(quadratic("a"))(step)
    assert model.v.tolist() == pytest.approx([1.5145, -0.5375])
    assert terms is not None and terms.keys() == {"primary", "proximal"}


def test_with_momentum_the_term_does_not_leak_into_the_buffer() -> None:
    """Leaking, as where mu (v - w) is added to the gradient in place: 1.9825, -0.1055."""
    assert trained("a", 0.5, momentum=0.9).tolist() == pytest.approx([1.9915, -0.0965])


def test_the_first_step_is_fedavgs_whatever_mu_is() -> None:
    assert torch.equal(trained("a", 100.0, steps=1), trained("a", 0.0, steps=1))


def test_a_large_mu_holds_the_model_where_it_began() -> None:
    mu = 1 / ETA
    there = trained("a", mu, steps=50)
    c, t = (torch.tensor(x, dtype=torch.float64) for x in PEERS["a"])
    w = torch.tensor(BASE, dtype=torch.float64)
    assert there.tolist() == pytest.approx(((c * t + mu * w) / (c + mu)).tolist())
    assert (there - w).abs().max() < 0.2


def test_the_terms_gradient_is_mu_times_the_way_gone() -> None:
    site = learning.site(learning.small_plan(method="fedprox", fedprox={"mu": 0.3}))
    model = Point(2.0, 5.0)
    w = torch.tensor(BASE, dtype=torch.float64)
    step = step_of(model, site=site, fused={"v": w})
    proximal(step)["proximal"].backward()  # type: ignore[no-untyped-call]
    assert model.v.grad is not None and model.v.grad.tolist() == pytest.approx([0.3 * 1.0, 0.3 * 6.0])
    for at in range(2):
        values = []
        for h in (1e-6, -1e-6):
            moved = Point(2.0, 5.0)
            with torch.no_grad():
                moved.v[at] += h
            values.append(proximal(step_of(moved, site=site, fused={"v": w}))["proximal"].item())
        assert (values[0] - values[1]) / 2e-6 == pytest.approx(float(model.v.grad[at]), rel=1e-6)


def test_statistics_of_batchnorm_are_not_in_it() -> None:
    site = learning.site(learning.small_plan(method="fedprox", fedprox={"mu": 1.0}))
    model = torch.nn.BatchNorm2d(3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.running_mean += 5  # type: ignore[operator]
    assert proximal(step_of(model, site=site, fused=before))["proximal"].item() == 0


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_mu_of_nought_is_fedavg_bit_for_bit(tmp_path: Path, optimizer: str) -> None:
    plan = learning.small_plan(method="fedavg", optimizer=optimizer)
    same = learning.small_plan(method="fedprox", fedprox={"mu": 0.0}, optimizer=optimizer)
    one, other = (first_round(learning.site(p), tmp_path / p.method) for p in (plan, same))
    assert one.out.read_bytes() == other.out.read_bytes()
    held = learning.small_plan(method="fedprox", fedprox={"mu": 10.0}, optimizer=optimizer)
    assert first_round(learning.site(held), tmp_path / "held").out.read_bytes() != one.out.read_bytes()
