"""FedBN: what stays, by type and not by name; that it is what training, validation and scoring go on from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import learning
import numpy as np
import pytest
import torch
from rounds import first_round, train
from torch import nn

from hsl_node.federation.names import Peer
from hsl_node.train.data.sources import TEST
from hsl_node.train.method import norm_tensors
from hsl_node.train.methods.fedbn import FEDBN
from hsl_node.train.scoring import answers, as_probabilities, open_fused, open_model, validate
from hsl_node.train.start import StartFiles, adopted
from hsl_node.weights.checkpoint_file import read_schema, read_weights
from hsl_node.weights.fuse_files import fuse_files


class Small(nn.Module):
    """The names of torchvision's ResNet, where one normalisation layer is called downsample.1."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(1)
        self.layer2 = nn.Sequential(nn.Module())
        self.layer2[0].downsample = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.BatchNorm2d(1))
        self.fc = nn.Linear(1, 1, bias=False)


def test_normalisation_layers_are_found_by_type() -> None:
    assert FEDBN.travels(Small()) == {"conv1.weight", "fc.weight", "layer2.0.downsample.0.weight"}
    assert len(norm_tensors(Small())) == 10
    others = nn.Sequential(nn.GroupNorm(1, 2), nn.LayerNorm(2), nn.InstanceNorm2d(2, affine=True), nn.Linear(2, 2))
    assert FEDBN.travels(others) == {"3.weight", "3.bias"}


def test_of_resnet18_a_hundred_tensors_stay() -> None:
    model = FEDBN.network.build(learning.small_plan(method="fedbn", backbone="resnet18"))
    assert len(norm_tensors(model)) == 100
    assert not [n for n in FEDBN.travels(model) if "downsample.1" in n or ".bn" in n]


@pytest.fixture(scope="module")
def two_rounds(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[Peer, StartFiles], Path]:
    """Two unlike hospitals after a round, and what each begins the second one with."""
    folder, plan = tmp_path_factory.mktemp("fedbn"), learning.small_plan(method="fedbn")
    sites = {Peer(p): learning.site(plan, learning.dataset(seed=n), p) for n, p in enumerate(("ash", "birch"))}
    done = {peer: first_round(site, folder / peer) for peer, site in sites.items()}
    paths = {peer: one.out for peer, one in done.items()}
    fused = folder / "fused"
    digest = fuse_files("mean", paths, dict.fromkeys(paths, 1), read_schema(paths[Peer("ash")]), fused)
    return {peer: replace(one.next, base=fused, base_sha256=digest) for peer, one in done.items()}, folder


def site_of(peer: str) -> learning.Site:
    return learning.site(learning.small_plan(method="fedbn"), learning.dataset(seed=("ash", "birch").index(peer)), peer)


def test_after_a_fusion_its_own_layers_are_each_hospitals_and_all_else_is_everybodys(
    two_rounds: tuple[dict[Peer, StartFiles], Path],
) -> None:
    starts, folder = two_rounds
    models = {peer: adopted(site_of(peer), files)[0].model for peer, files in starts.items()}
    private = norm_tensors(models[Peer("ash")])
    states = [models[Peer(p)].state_dict() for p in ("ash", "birch")]
    for name in states[0]:
        assert torch.equal(states[0][name], states[1][name]) is (name not in private or name.endswith("tracked")), name
    for peer in starts:
        own = read_weights(folder / peer / "own_r1.safetensors")
        state = models[peer].state_dict()
        assert all(np.array_equal(own[name], state[name].numpy()) for name in private)
        assert not private & set(read_weights(folder / peer / "out_r1.safetensors"))  # nothing of it leaves


def test_scoring_uses_the_layers_that_were_trained(two_rounds: tuple[dict[Peer, StartFiles], Path]) -> None:
    """Before, a model of shared tensors alone would have been scored with layers that never were."""
    starts, folder = two_rounds
    site, files = site_of("ash"), starts[Peer("ash")]
    here = open_fused(site, files, recalibrate=False)
    found = as_probabilities(answers(site, here, TEST))
    with torch.no_grad():
        by_hand = torch.sigmoid(adopted(site, files)[0].model.eval()(learning.images_of(site, TEST)))[:, 0].numpy()
    np.testing.assert_allclose(found, by_hand, rtol=1e-5)
    untrained = open_fused(site, replace(files, mine=None, mine_sha256=None), recalibrate=False)
    assert not np.array_equal(as_probabilities(answers(site, untrained, TEST)), found)
    own = open_model(folder / "ash" / "own_r1.safetensors", site.plan, site.hardware)[1]
    assert validate(site, own).loss is not None


def test_the_next_round_goes_on_from_them(two_rounds: tuple[dict[Peer, StartFiles], Path], tmp_path: Path) -> None:
    starts, _ = two_rounds
    done = train(site_of("ash"), tmp_path, starts[Peer("ash")])
    mine, before = read_weights(done.own), read_weights(starts[Peer("ash")].mine or Path())
    counter = "trunk.net.bn1.num_batches_tracked"
    assert done.state.best is not None
    assert mine[counter] == before[counter] + 5 * done.state.best.epoch  # 40 images, batches of 8


def test_private_tensors_that_are_lost_begin_anew_from_the_initial_ones_and_it_is_said(
    two_rounds: tuple[dict[Peer, StartFiles], Path], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    starts, _ = two_rounds
    site = site_of("ash")
    altered = tmp_path / "own.safetensors"
    altered.write_bytes((starts[Peer("ash")].mine or Path()).read_bytes()[:-1] + b"x")
    model = adopted(site, replace(starts[Peer("ash")], mine=altered))[0].model
    assert "begin anew" in caplog.text
    assert float(model.state_dict()["trunk.net.bn1.weight"].sum()) == 16  # 16 channels of 1
