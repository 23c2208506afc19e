"""The whole federation in one process: what pooling does, and turns of a ring. That it is the daemon: tests/whole."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import learning
import numpy as np
import pytest
from every_method import PEERS, SIZES, plan_for, sites_for

from hsl_node.errors import ConfigError
from hsl_node.federation.names import Peer
from hsl_node.study.simulate import CENTRAL, begun, next_round, pooled, simulate
from hsl_node.train.data.sources import TEST, TRAIN
from hsl_node.weights.checkpoint_file import read_weights


def test_pooled_images_stay_in_their_parts_and_grey_becomes_colour_where_one_hospital_has_it() -> None:
    plan = learning.small_plan(method="fedavg")
    sites = {**sites_for(plan)}
    one = pooled(sites)
    assert len(one.indices(TRAIN)) == sum(SIZES.values()) and len(one.indices(TEST)) == 12
    assert one.peer == CENTRAL and one.dataset.images.ndim == 3
    first = sites[PEERS[0]].dataset
    assert np.array_equal(one.dataset.labels[: len(first.labels)], first.labels)
    colour = np.repeat(sites[PEERS[1]].dataset.images[..., None], 3, axis=-1)
    sites[PEERS[1]] = learning.site(plan, learning.of_images(sites[PEERS[1]].dataset, colour), "birch")
    mixed = pooled(sites).dataset.images
    assert mixed.ndim == 4 and np.array_equal(mixed[: len(first.labels), ..., 2], first.images)


def test_central_is_a_federation_of_one_that_has_all(tmp_path: Path) -> None:
    plan = learning.small_plan(method="central")
    done = simulate(sites_for(plan), tmp_path)
    assert [d.round for d in done] == [0, 1, 2]
    assert done[-1].samples == {CENTRAL: sum(SIZES.values())}
    assert done[-1].fused.read_bytes() == done[-1].sent[CENTRAL].read_bytes()


def test_what_exchanges_no_models_says_where_it_is_simulated(tmp_path: Path) -> None:
    for method, where in (("splitavg", "study.splitavg"), ("local", "by itself")):
        with pytest.raises(ConfigError) as caught:
            simulate(sites_for(learning.small_plan(method=method)), tmp_path)
        assert where in caught.value.remedy


def test_a_simulation_that_was_killed_ends_with_the_same_bytes(tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    def dying(peer: Peer, event: dict[str, object]) -> None:
        if (peer, event["event"], event.get("round"), event.get("epoch")) == ("birch", "epoch", 2, 1):
            raise Killed

    sites = sites_for(plan_for("fedprox"))
    undisturbed = [done.sha256 for done in simulate(sites, tmp_path / "a")]
    with pytest.raises(Killed):
        simulate(sites, tmp_path / "b", dying)
    assert [done.sha256 for done in simulate(sites, tmp_path / "b")] == undisturbed


def parameters_of(path: Path) -> np.ndarray:
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    return np.concatenate([a.ravel() for n, a in sorted(read_weights(path).items()) if not n.endswith(statistics)])


@pytest.mark.parametrize(
    ("method", "whose"),
    [("metafed_ring", {"ash": "cedar", "birch": "cedar", "cedar": "cedar"}),
     ("metafed", {"ash": "cedar", "birch": "ash", "cedar": "birch"})],
)  # fmt: skip
def test_in_turns_one_model_goes_all_round_and_else_all_move_by_one_place(
    tmp_path: Path, method: str, whose: dict[str, str]
) -> None:
    """Nobody is able, and from the second round on nobody learns: the weights show where they come from."""
    plan = learning.small_plan(method=method, rounds=3, epochs_per_round=1, **{method: {"threshold": 1.0}})
    sites = sites_for(plan)
    first = next_round(sites, tmp_path, begun(sites, tmp_path), lambda peer, event: None)
    still = plan.model_copy(update={"learning_rate": 1e-12, "learning_rate_min": 0.0})
    sites = {peer: replace(site, plan=still) for peer, site in sites.items()}
    second = next_round(sites, tmp_path, first, lambda peer, event: None, in_turn=method == "metafed_ring")
    for peer, other in whose.items():
        assert second.best[Peer(peer)].said == {"able": 0.0}
        np.testing.assert_allclose(
            parameters_of(second.own[Peer(peer)]), parameters_of(first.own[Peer(other)]), atol=1e-7
        )
        for another in PEERS:
            if another != other:
                assert np.abs(parameters_of(second.own[Peer(peer)]) - parameters_of(first.own[another])).max() > 1e-4
