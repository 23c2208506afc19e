"""The whole federation in one process: what pooling does, and turns of a ring. That it is the daemon: tests/whole."""

from __future__ import annotations

from pathlib import Path

import learning
import numpy as np
import pytest
from every_method import PEERS, SIZES, plan_for, sites_for

from hsl_node.errors import ConfigError
from hsl_node.federation.names import Peer
from hsl_node.study.simulate import CENTRAL, pooled, simulate
from hsl_node.train.data.sources import TEST, TRAIN


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
