"""FedDP: heads that stay, that are told once, and a calibration where they disagree."""

from __future__ import annotations

from pathlib import Path

import learning
import pytest
import torch
from steps import batch_of, step_of

from hsl_node.federation.names import Peer
from hsl_node.study.simulate import Exchanged, simulate
from hsl_node.train.hardware import prepare
from hsl_node.train.method import Start
from hsl_node.train.methods.feddp import FEDDP, calibrated, panel
from hsl_node.train.start import new_learner
from hsl_node.weights.checkpoint_file import Array, read_weights

HEAD = ("out.weight", "out.bias")
TOLD = ("told_weight", "told_bias")
ROUNDS = 4


@pytest.fixture(scope="module")
def rounds(tmp_path_factory: pytest.TempPathFactory) -> list[Exchanged]:
    prepare(device="cpu", threads=1, precision="float32", image_size=learning.SIZE)
    plan = learning.small_plan(method="feddp", rounds=ROUNDS, epochs_per_round=1)
    sites = {
        peer: learning.site(plan, learning.dataset(16, 8, 4, seed=n), peer)
        for n, peer in enumerate(map(Peer, ("ash", "birch", "cedar")))
    }
    return simulate(sites, tmp_path_factory.mktemp("feddp"))


def tensors(path: Path, names: tuple[str, ...]) -> list[Array]:
    found = read_weights(path)
    return [found[name] for name in names]


def same(one: list[Array], other: list[Array]) -> bool:
    return all((a == b).all() for a, b in zip(one, other, strict=True))


# ---------------------------------------------------------------- what leaves a hospital


def test_heads_are_in_no_checkpoint_and_told_in_the_round_before_the_last_alone(rounds: list[Exchanged]):
    for done in rounds[1:]:
        for peer, path in done.sent.items():
            assert not set(HEAD) & set(read_weights(path))
            told, own = tensors(path, TOLD), tensors(done.own[peer], HEAD)
            assert same(told, own) == (done.round == ROUNDS - 1)
            if done.round < ROUNDS - 1:
                assert not any(tensor.any() for tensor in told)


def test_every_hospitals_head_goes_on_from_its_own_the_first_ones_too(rounds: list[Exchanged]):
    """The published release puts the average into the first site's own parameters."""
    heads = [tensors(rounds[1].own[peer], HEAD) for peer in rounds[1].own]
    assert not same(heads[0], heads[1])
    plan = learning.small_plan(method="feddp", rounds=ROUNDS, epochs_per_round=1)
    for peer, head in zip(rounds[1].own, heads, strict=True):
        site = learning.site(plan, peer=peer)
        learner = new_learner(site)
        mine = {n: torch.tensor(t) for n, t in read_weights(rounds[1].own[peer]).items()}
        fused = {n: torch.tensor(t) for n, t in read_weights(rounds[1].fused).items()}
        FEDDP.adopt(learner, Start(2, fused, mine=mine))
        state = learner.model.state_dict()
        assert same([state[name].numpy() for name in HEAD], head)
        assert torch.equal(state["trunk.net.conv1.weight"], fused["trunk.net.conv1.weight"])


# ---------------------------------------------------------------- the calibration


def last_round(rounds: list[Exchanged], heads: str = "theirs") -> tuple[float, float]:
    """Mean loss terms (primary, calibration) of a batch at the beginning of the last round."""
    before = rounds[ROUNDS - 1]
    site = learning.site(learning.small_plan(method="feddp", rounds=ROUNDS), peer="ash")
    learner = new_learner(site)
    fused = {n: torch.tensor(t) for n, t in read_weights(before.fused).items()}
    whole = {peer: {n: torch.tensor(t) for n, t in read_weights(p).items()} for peer, p in before.sent.items()}
    if heads == "equal":
        for theirs in whole.values():
            theirs |= {name: whole[Peer("ash")][name] for name in TOLD}
    mine = {n: torch.tensor(t) for n, t in read_weights(before.own[Peer("ash")]).items()}
    start = Start(ROUNDS, fused, full_set=whole, mine=mine)
    FEDDP.adopt(learner, start)
    beside = panel(learner, start)
    assert beside is not None and not beside.trunk.training
    assert not any(p.requires_grad for p in beside.trunk.parameters())
    terms = calibrated(step_of(learner.model.eval(), site=site, batch=batch_of(8, site), beside=beside))
    return terms["primary"].item(), terms["calibration"].item()


def test_where_hospitals_disagree_the_loss_counts_more(rounds: list[Exchanged]):
    primary, calibration = last_round(rounds)
    assert 0 < calibration <= primary + 1e-6  # each image at most once more


def test_hospitals_that_agree_calibrate_nothing(rounds: list[Exchanged]):
    assert last_round(rounds, "equal")[1] == 0


def test_before_the_last_round_there_is_no_panel():
    learner = new_learner(learning.site(learning.small_plan(method="feddp", rounds=3)))
    assert panel(learner, Start(2, {}, full_set={"ash": {}})) is None
    terms = calibrated(step_of(learner.model, site=learner.site, batch=batch_of(8, learner.site)))
    assert set(terms) == {"primary"}
