"""What every learning method keeps: a killed round ends with the same bytes, and nothing private leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import learning
import pytest
import torch
from every_method import PEERS, plan_for, runnable, sites_for
from rounds import train
from steps import Point, step_of

from hsl_node.errors import ConfigError
from hsl_node.federation.methods import CARDS
from hsl_node.study.simulate import Exchanged, begun, next_round
from hsl_node.train.method import Loss, Site, norm_tensors, plus
from hsl_node.train.methods import method_of
from hsl_node.train.state_dict import all_tensors
from hsl_node.train.updates import descend
from hsl_node.weights.checkpoint_file import read_weights

METHODS = runnable()


class Killed(BaseException):
    """Stands for SIGKILL: nothing of ours catches it."""


@pytest.fixture(scope="module", params=METHODS)
def one_round(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Exchanged, Site]:
    """A federation of three after its first round, and its first hospital."""
    sites = sites_for(plan_for(request.param))
    folder = tmp_path_factory.mktemp(request.param)
    return next_round(sites, folder, begun(sites, folder), lambda peer, event: None), sites[PEERS[0]]


def dying(kind: str, epoch: int) -> Any:
    def report(event: dict[str, Any]) -> None:
        if event["event"] == kind and event.get("epoch") == epoch:
            raise Killed

    return report


@pytest.mark.sample(4)
def test_threat_22_a_second_round_killed_twice_ends_with_the_same_bytes(
    one_round: tuple[Exchanged, Site], tmp_path: Path
) -> None:
    """With all that the first one left: everybody's numbers, the full set where it is asked for, what is its own."""
    exchanged, site = one_round
    undisturbed = train(site, tmp_path / "a", exchanged.start(site))
    for kind, epoch in (("epoch", 1), ("progress", 2)):
        with pytest.raises(Killed):
            train(site, tmp_path / "b", exchanged.start(site), dying(kind, epoch))
    resumed = train(site, tmp_path / "b", exchanged.start(site))
    assert resumed.state == undisturbed.state
    assert resumed.out.read_bytes() == undisturbed.out.read_bytes()
    assert resumed.own.read_bytes() == undisturbed.own.read_bytes()
    assert learning.same_bytes(tmp_path / "a/trainer", tmp_path / "b/trainer")


def test_nothing_private_leaves_and_all_that_is_kept_is_kept(one_round: tuple[Exchanged, Site]) -> None:
    exchanged, site = one_round
    model = site.method.network.build(site.plan)
    travels, everything = site.method.travels(model), all_tensors(model)
    assert set(read_weights(exchanged.sent[PEERS[0]])) == travels <= everything
    assert set(read_weights(exchanged.own[PEERS[0]])) == everything
    assert (travels < everything) is site.plan.card.private


@pytest.mark.parametrize("name", METHODS)
def test_what_travels_beside_weights_and_their_statistics_stands_on_its_card(name: str) -> None:
    """Or a rule that measures whole checkpoints measures that: HarmoFL's amplitudes gave one of three hospitals all."""
    plan = plan_for(name)
    method = method_of(name)
    model = method.network.build(plan)
    weights = {parameter for parameter, _ in model.named_parameters()} | norm_tensors(model)
    assert method.travels(model) <= weights or plan.card.beside


@pytest.mark.parametrize(
    ("method", "backbone"), [("fedbn", "torchvision:vgg11"), ("fedppkt", "vit_tiny"), ("fedtp", "torchvision:swin_t")]
)
def test_a_backbone_without_what_the_method_is_about_is_refused_at_once(method: str, backbone: str) -> None:
    """FedBN would have been FedAvg; FedPPKT would have stopped in round 2, after the teacher's 200 epochs."""
    plan = plan_for(method, backbone=backbone)
    with pytest.raises(ConfigError):
        method_of(method).travels(method_of(method).network.build(plan))


def test_it_says_exactly_the_numbers_of_its_card_within_their_bounds(one_round: tuple[Exchanged, Site]) -> None:
    exchanged, site = one_round
    says = {said.name: said for said in site.plan.card.says}
    for best in exchanged.best.values():
        assert best.said.keys() == says.keys()
        assert all(says[name].low <= value <= says[name].high for name, value in best.said.items())


def test_it_learns_from_what_it_is_given(one_round: tuple[Exchanged, Site]) -> None:
    """A phase may leave what travels as it was (FedPPKT's first trains a private teacher): not what is kept."""
    exchanged, _ = one_round
    assert len({path.read_bytes() for path in exchanged.own.values()}) == len(PEERS)


def test_a_batch_that_one_loss_skips_moves_nothing() -> None:
    model = Point(3.0, 4.0)
    step = step_of(model, optimizers={"main": torch.optim.SGD(model.parameters(), 1.0)})
    away: Loss = lambda s: {"away": -s.model.v.sum()}  # type: ignore[operator, union-attr]  # noqa: E731
    assert descend(plus(away, lambda _: None))(step) is None
    assert model.v.tolist() == [3.0, 4.0]
    assert descend(away)(step) is not None
    assert model.v.tolist() == [4.0, 5.0]


@pytest.mark.parametrize("name", METHODS)
def test_its_two_halves_are_of_one_name(name: str) -> None:
    assert method_of(name).name == name
    doc = __import__(CARDS[name].code.partition(":")[0], fromlist=["x"]).__doc__
    assert doc and CARDS[name].faith in doc.lower(), "its docstring says what is exact, adapted, assumed"
