"""HarmoFL: the perturbed step by hand, statistics that move once, and an amplitude that all share from round 2 on."""

from __future__ import annotations

from pathlib import Path

import learning
import pytest
import torch
from steps import Point, batch_of, step_of
from torch import Tensor

from hsl_node.federation.names import Peer
from hsl_node.study.simulate import simulate
from hsl_node.train.hardware import prepare
from hsl_node.train.method import Site, Step, Terms, task_loss
from hsl_node.train.methods.harmofl import HARMOFL
from hsl_node.train.site import initial_model
from hsl_node.train.start import new_learner
from hsl_node.train.updates import descend, perturbed
from hsl_node.weights.checkpoint_file import read_weights


@pytest.fixture(autouse=True)
def deterministic() -> None:
    prepare(device="cpu", threads=1, precision="float32", image_size=learning.SIZE)


def harmo(**settings: float) -> Site:
    return learning.site(learning.small_plan(method="harmofl", optimizer="sgd", harmofl=settings))


def step_with(site: Site) -> Step:
    model = initial_model(site.plan, site.method, None).train()
    optimizers = {"main": torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)}
    return step_of(model, site=site, optimizers=optimizers, batch=batch_of(8, site))


# ---------------------------------------------------------------- the perturbed step


def bowl(step: Step) -> Terms:
    v = step.model.v  # type: ignore[union-attr]
    asked.append(v.detach().clone())  # type: ignore[operator, union-attr]
    return {"bowl": (v[0] ** 2 + 4 * v[1] ** 2) / 2}  # type: ignore[index, operator]


asked: list[Tensor] = []


def test_a_step_by_hand():
    """METHODS, HarmoFL, point 8: gradient (3, 4) of length 5, so delta (0.03, 0.04); the step is taken from (3, 1)."""
    asked.clear()
    point = Point(3.0, 1.0)
    update = perturbed(bowl)
    update(step_of(point, site=harmo(), optimizers={"main": torch.optim.SGD(point.parameters(), lr=0.1)}))
    torch.testing.assert_close(asked[1] - asked[0], torch.tensor([0.03, 0.04], dtype=torch.float64))
    torch.testing.assert_close(point.v.detach(), torch.tensor([2.697, 0.584], dtype=torch.float64))
    # Taken from w + delta it would be (2.727, 0.624), without a perturbation (2.7, 0.6).


def test_the_perturbation_has_one_length_over_all_parameters_together():
    step = step_with(harmo(alpha=0.05))
    there: list[Tensor] = []

    def spying(step: Step) -> Terms | None:
        there.append(torch.cat([p.detach().flatten() for p in step.model.parameters()]))
        return task_loss(step)

    perturbed(spying)(step)
    assert (there[1] - there[0]).norm().item() == pytest.approx(0.05, rel=1e-3)


def test_without_a_perturbation_it_is_plain_descent_bit_by_bit():
    plain, none = step_with(harmo()), step_with(harmo(alpha=0.0))
    for _ in range(3):
        descend(task_loss)(plain)
        perturbed(task_loss)(none)
    for name, tensor in plain.model.state_dict().items():
        assert torch.equal(tensor, none.model.state_dict()[name]), name


def test_running_statistics_move_once_a_step_and_to_those_of_the_first_pass():
    plain, twice = step_with(harmo()), step_with(harmo(alpha=1.0))
    for step in (plain, twice):
        step.model.normalise.learning = True  # type: ignore[union-attr]
    descend(task_loss)(plain)
    perturbed(task_loss)(twice)
    after = twice.model.state_dict()
    for name, buffer in plain.model.named_buffers():
        assert torch.equal(buffer, dict(twice.model.named_buffers())[name]), name
    assert after["trunk.net.bn1.num_batches_tracked"] == 1 and after["normalise.batches"] == 1


def test_a_skipped_batch_changes_nothing():
    step = step_with(harmo())
    before = {name: tensor.clone() for name, tensor in step.model.state_dict().items()}
    assert perturbed(lambda _: None)(step) is None
    assert all(torch.equal(tensor, before[name]) for name, tensor in step.model.state_dict().items())


# ---------------------------------------------------------------- the common amplitude


@pytest.mark.parametrize("box", [0.0, 0.1])
def test_amplitudes_are_the_mean_of_all_after_round_one_and_then_never_change(box: float, tmp_path: Path):
    plan = learning.small_plan(method="harmofl", rounds=3, epochs_per_round=1, optimizer="sgd", harmofl={"box": box})
    sites = {}
    for n, peer in enumerate(map(Peer, ("ash", "birch"))):
        data = learning.dataset(16, 8, 4, seed=n)
        data.images[:] = data.images // (1 + n)  # two scanners: one is half as bright
        sites[peer] = learning.site(plan, data, peer)
    rounds = simulate(sites, tmp_path)
    name = "normalise.amplitude"
    first = [torch.tensor(read_weights(path)[name]) for path in rounds[1].sent.values()]
    assert not torch.allclose(*first, rtol=0.2)
    fused = [torch.tensor(read_weights(done.fused)[name]) for done in rounds]
    torch.testing.assert_close(fused[1], (first[0].double() + first[1].double()).div(2).float())
    assert not fused[0].any() and torch.equal(fused[1], fused[2]) and torch.equal(fused[2], fused[3])
    for path in [*rounds[2].sent.values(), *rounds[3].sent.values()]:
        assert torch.equal(torch.tensor(read_weights(path)[name]), fused[1])


def test_it_is_part_of_what_is_asked_and_exported():
    learner = new_learner(harmo())
    assert {"normalise.amplitude", "normalise.batches"} <= HARMOFL.travels(learner.model)
    model, image = learner.model.eval(), batch_of(4, learner.site).image
    with torch.no_grad():
        before = HARMOFL.network.ask(model, image, None)
        model.normalise.batches.fill_(1)  # type: ignore[operator, union-attr]
        assert not torch.equal(HARMOFL.network.ask(model, image, None), before)
        again = HARMOFL.network.ask(model, image + 0.3, None)  # a brighter scanner
        torch.testing.assert_close(again, HARMOFL.network.ask(model, image, None), atol=1e-4, rtol=1e-4)
