"""FedNova: how often a gradient entered an update, by hand and by torch's own SGD; what is said, and when it begins."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import learning
import pytest
import torch
from rounds import first_round
from torch import nn
from weights import Contribution, fuse

from hsl_node.federation.names import Peer
from hsl_node.train.hardware import prepare
from hsl_node.train.loop import train_round
from hsl_node.train.method import Done, Start, Step
from hsl_node.train.methods.fednova import entered, says
from hsl_node.train.methods.fedprox import held_near
from hsl_node.train.site import initial_weights
from hsl_node.train.start import StartFiles
from hsl_node.train.updates import descend


@pytest.fixture(autouse=True)
def deterministic() -> None:
    prepare(device="cpu", threads=1, precision="float32", image_size=learning.SIZE)


def told(steps: tuple[int, ...], rates: tuple[float, ...], momentum: float = 0.0, mu: float = 0.0) -> dict[str, float]:
    plan = learning.small_plan(method="fednova", optimizer="sgd", momentum=momentum, fednova={"mu": mu})
    learner: Any = SimpleNamespace(plan=plan, settings=plan.settings)
    return dict(says(learner, Start(1, {}), Done(len(steps), steps, rates, {}, None, None)))


def test_the_worked_numbers():
    assert [told((n,), (0.1,))["steps"] for n in (2, 4)] == pytest.approx([2, 4])
    assert [told((n,), (0.1,), momentum=0.5)["steps"] for n in (2, 4)] == pytest.approx([2.5, 6.125])
    proximal = [told((n,), (0.1,), mu=0.5)["steps"] for n in (2, 4)]  # eta mu = 0.05
    assert proximal == pytest.approx([1.95, 3.70987], rel=1e-5)


@pytest.mark.parametrize("tau", [1, 2, 7, 50])
@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9])
def test_momentum_and_the_proximal_term_by_their_closed_forms(tau, rho):
    assert entered([0.1] * tau, rho) / 0.1 == pytest.approx((tau - rho * (1 - rho**tau) / (1 - rho)) / (1 - rho))
    assert entered([0.1] * tau, 0.0, 0.5) / 0.1 == pytest.approx((1 - 0.95**tau) / 0.05)


def test_epochs_up_to_the_one_that_is_sent_count_each_with_its_rate():
    """3 steps at 0.1, 2 at 0.05: the latter count half. The rate before the first is no 0 to divide by."""
    assert told((3, 2), (0.1, 0.05))["steps"] == pytest.approx(4)
    assert told((3,), (0.0,))["steps"] == 1  # clamped to what the manifest takes


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("mu", [0.0, 0.5])
def test_torchs_sgd_goes_as_far_as_is_said(momentum, mu):
    """A linear loss, g.w: its gradient is g at every point. The rate changes after five steps."""
    model = nn.Linear(3, 1, bias=False)
    start = Start(1, {"weight": model.weight.detach().clone()})
    gradient = torch.tensor([[1.0, -2.0, 0.5]])
    plan = learning.small_plan(method="fednova", optimizer="sgd", momentum=momentum, fednova={"mu": mu})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum)
    learner: Any = SimpleNamespace(
        model=model,
        settings=plan.settings,
        plan=plan,
        optimizers={"main": optimizer},
        site=SimpleNamespace(micro_batch=0),
    )
    batch: Any = SimpleNamespace(image=[None])
    update = (held_near if mu else descend)(lambda step: {"primary": (step.model.weight * gradient).sum()})
    for rate in [0.1] * 5 + [0.04] * 3:
        optimizer.param_groups[0]["lr"] = rate
        update(Step(learner, batch, start, None, {}, 1.0, 1, 1))
    said = told((5, 3), (0.1, 0.04), momentum, mu)
    moved = model.weight.detach() - start.fused["weight"]
    torch.testing.assert_close(moved, -0.1 * said["steps"] * gradient)


def test_unlike_peers_on_linear_losses_fuse_to_one_step_along_the_mean_gradient():
    """Torch's momentum SGD, 3 and 8 steps: FedAvg would lean to the second by more than its images."""
    peers, reach = {}, 0.0
    base, gradients = torch.zeros(2), (torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))
    for name, gradient, steps, images in zip(("ash", "birch"), gradients, (3, 8), (30, 10), strict=True):
        w = base.clone().requires_grad_()
        optimizer = torch.optim.SGD([w], lr=0.1, momentum=0.9)
        for _ in range(steps):
            optimizer.zero_grad()
            (w * gradient).sum().backward()
            optimizer.step()
        said = told((steps,), (0.1,), momentum=0.9)
        peers[Peer(name)] = Contribution({"w": w.detach().numpy()}, images, said)
        reach += images / 40 * said["steps"]
    fused = fuse("nova", peers, {"w": base.numpy()})["w"]
    assert fused == pytest.approx([-0.1 * reach * 0.75, -0.1 * reach * 0.25], rel=1e-5)


def test_momentum_begins_anew_in_each_round_although_the_plan_keeps_it(tmp_path: Path):
    """Else steps of the last round would enter this update, and what is said would be wrong: an undisturbed second
    round is that of a hospital that lost its epoch checkpoint."""
    plan = learning.small_plan(
        method="fednova", optimizer="sgd", momentum=0.9, optimizer_state="keep", epochs_per_round=1
    )
    site = learning.site(plan)
    base = tmp_path / "fused"
    digest, _ = initial_weights(tmp_path, plan, site.method, base)
    ends = []
    for rounds in ((1, 2), (2,)):
        for round in rounds:
            out = tmp_path / f"out{round}"
            folder = tmp_path / f"trainer{len(rounds)}"
            train_round(
                site,
                folder=folder,
                files=StartFiles(round, base, digest),
                out=out,
                own=tmp_path / "own",
                report=lambda _: None,
            )
        ends.append(out.read_bytes())
    assert ends[0] == ends[1]


def test_a_learner_of_a_whole_round_says_its_steps(tmp_path: Path):
    plan = learning.small_plan(
        method="fednova", optimizer="sgd", momentum=0.5, epochs_per_round=2, schedule="restarts", cosine_period_epochs=1
    )
    site = learning.site(plan, learning.dataset(train=24))
    state = first_round(site, tmp_path).state
    assert state.best is not None
    taken = 3 * state.best.epoch  # three batches of eight in each epoch
    assert state.best.said["steps"] == pytest.approx(entered([1.0] * taken, 0.5))
