"""What every learning method keeps: a killed round ends with the same bytes, and nothing private leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import learning
import numpy as np
import pytest
import torch
from every_method import PEERS, card_of, plan_for, runnable, sites_for
from rounds import train
from steps import Point, step_of
from torch import nn

from hsl_node.errors import ConfigError
from hsl_node.federation.methods import CARDS
from hsl_node.study.simulate import Exchanged, begun, next_round
from hsl_node.train import export
from hsl_node.train.data.sources import TEST
from hsl_node.train.method import Loss, Site, norm_tensors, plus, take_fused
from hsl_node.train.methods import method_of
from hsl_node.train.predictor import of_model
from hsl_node.train.scoring import answers, open_fused, open_model
from hsl_node.train.site import initial_model
from hsl_node.train.start import place
from hsl_node.train.state_dict import all_tensors, to_weights
from hsl_node.train.updates import descend
from hsl_node.weights.checkpoint_file import read_weights

METHODS = runnable()


def weights_of(model: nn.Module) -> dict[str, Any]:
    return {name: array.copy() for name, array in to_weights(model, all_tensors(model)).items()}


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
    own, sent = read_weights(exchanged.own[PEERS[0]]), exchanged.sent[PEERS[0]].read_bytes()
    assert set(own) == everything
    assert (travels < everything) is site.plan.card.private
    copied = {n for n in everything - travels if np.unique(own[n]).size > 8 and own[n].tobytes() in sent}
    assert not copied or site.plan.card.beside, "nor under another name, but for what the card says"


@pytest.mark.parametrize("one_round", [name for name in METHODS if CARDS[name].private], indirect=True)
def test_what_stays_is_as_it_was_trained_where_a_model_is_scored_and_where_it_is_taken_away(
    one_round: tuple[Exchanged, Site], tmp_path: Path
) -> None:
    """A fused file holds none of it: with the initial ones in their place it would be another model."""
    exchanged, site = one_round
    own = read_weights(exchanged.own[PEERS[0]])
    stays = own.keys() - read_weights(exchanged.sent[PEERS[0]]).keys()
    first = weights_of(initial_model(site.plan, site.method, site.backbone_weights))
    trained = {name for name in stays if not np.array_equal(own[name], first[name])}
    # Nobody trains frozen's encoder, and FedTP's hypernetwork learns when the next round begins.
    assert trained or site.plan.method in ("frozen", "fedtp")

    as_own = open_model(exchanged.own[PEERS[0]], site.plan, site.hardware)[1]
    fused = open_fused(site, exchanged.start(site), recalibrate=False)
    assert all(np.array_equal(array, own[name]) for name, array in weights_of(as_own).items())
    here = weights_of(fused)
    derived = {name for name in trained if not np.array_equal(here[name], own[name])}  # of everybody's, or a phase
    assert not any(np.array_equal(here[name], first[name]) for name in trained)
    assert not derived or site.method.adopt is not take_fused

    asked = of_model(fused, card_of(site.plan), site.hardware, site.anchor)
    export.export_model(tmp_path / "out", predictor=asked, facts={}, onnx=False)
    out, home = read_weights(tmp_path / "out" / "model.safetensors"), site.method.network.at_home(fused)
    assert out.keys() == here.keys()
    assert all(np.array_equal(out[name], here[name]) for name in out.keys() - home)
    assert not any(out[name].any() for name in home), "nor does what nobody is asked with"


@pytest.mark.parametrize("name", METHODS)
def test_what_travels_beside_weights_and_their_statistics_stands_on_its_card(name: str) -> None:
    """Or a rule that measures whole checkpoints measures that: HarmoFL's amplitudes gave one of three hospitals all."""
    plan = plan_for(name)
    method = method_of(name)
    model = method.network.build(plan)
    weights = {parameter for parameter, _ in model.named_parameters()} | norm_tensors(model)
    assert method.travels(model) <= weights or plan.card.beside


@pytest.mark.parametrize("name", METHODS)
def test_what_tells_of_images_or_of_other_hospitals_and_is_not_asked_is_in_no_exported_model(name: str) -> None:
    """FedDpS's mixture has blurred mean pictures of groups of images, FedTP's hypernetwork a row for each hospital."""
    site = sites_for(plan_for(name))[PEERS[0]]
    model = place(initial_model(site.plan, site.method, site.backbone_weights), site.hardware).eval()
    home, buffers = site.method.network.at_home(model), {n for n, _ in model.named_buffers()} & all_tensors(model)
    asked = {"normalise.amplitude", "normalise.batches", "made_in", "pooled", "distils"}
    assert buffers - norm_tensors(model) - asked <= home
    before = answers(site, model, TEST)
    for tensor in (model.state_dict()[n] for n in home):
        tensor.copy_(torch.rand(tensor.shape) if tensor.is_floating_point() else torch.ones_like(tensor))
    assert torch.equal(answers(site, model, TEST), before)


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


@pytest.mark.parametrize("name", CARDS)
def test_its_two_halves_are_of_one_name(name: str) -> None:
    assert method_of(name).name == name
    doc = __import__(CARDS[name].code.partition(":")[0], fromlist=["x"]).__doc__
    assert doc and CARDS[name].faith in doc.lower(), "its docstring says what is exact, adapted, assumed"
