"""BatchNorm statistics measured on own training images: pooled, in evaluation otherwise, the same each time."""

from __future__ import annotations

import copy

import learning
import pytest
import torch
from torch import Tensor, nn

from hsl_node.train import recalibrate
from hsl_node.train.batches import upload
from hsl_node.train.data.sources import TRAIN
from hsl_node.train.hardware import prepare
from hsl_node.train.method import Site
from hsl_node.train.networks.initial import initialise
from hsl_node.train.recalibrate import Moments, recalibrated


@pytest.fixture(autouse=True)
def deterministic() -> None:
    prepare(device="cpu", threads=1, precision="float32", image_size=learning.SIZE)


def model_of(site: Site) -> nn.Module:
    model = site.method.network.build(site.plan)
    initialise(model, 1)
    return model


def own_images(site: Site) -> Tensor:
    return upload(site.dataset.images[site.indices(TRAIN)], site.hardware)


def statistics(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if "running" in name}


def test_batches_of_any_sizes_give_the_moments_of_the_whole():
    x = torch.randn(50, 3, 4, 4, generator=torch.Generator().manual_seed(1)) * 5 + 100
    x[:25] -= 300  # the batches lie far apart: the mean of their variances, 25, would be wrong by a factor of 900
    for sizes in ([50], [25, 25], [1, 2, 47], [10] * 5):
        moments = Moments()
        for part in x.split(sizes):
            moments(nn.BatchNorm2d(3), (part,))
        torch.testing.assert_close(moments.mean, x.double().mean((0, 2, 3)), rtol=1e-6, atol=1e-4)
        torch.testing.assert_close(moments.squares / 799, x.double().var((0, 2, 3)), rtol=1e-6, atol=0)


def test_the_moments_of_two_batches_by_hand():
    moments = Moments()
    for values in ([0.0, 2.0], [4.0, 6.0, 8.0]):
        moments(nn.BatchNorm1d(1), (torch.tensor(values).view(-1, 1),))
    assert moments.count == 5 and moments.mean.item() == 4.0  # (0 + 2 + 4 + 6 + 8) / 5
    assert moments.squares.item() == pytest.approx(40.0)  # 16 + 4 + 0 + 4 + 16


def test_where_all_images_are_one_batch_it_is_what_torch_itself_computes():
    site = learning.site(learning.small_plan(method="fedavg"))  # 40 images, one batch of 64
    model = model_of(site)
    reference = copy.deepcopy(model).train()
    for module in reference.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean over the batches: there is one
    with torch.no_grad():
        reference(own_images(site))
    wanted, found = statistics(reference), statistics(recalibrated(model, site))
    assert found.keys() == wanted.keys() and len(found) == 2 * 7  # mean and variance of the trunk's seven layers
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-4, atol=1e-5)


def test_the_first_layers_statistics_do_not_depend_on_the_batches(monkeypatch: pytest.MonkeyPatch):
    site = learning.site(learning.small_plan(method="fedavg"))
    model = model_of(site)
    whole = statistics(recalibrated(model, site))
    monkeypatch.setattr(recalibrate, "BATCH", 8)
    parts = statistics(recalibrated(model, site))
    for name in ("trunk.net.bn1.running_mean", "trunk.net.bn1.running_var"):
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-5, atol=1e-6)
    deep = "trunk.net.layer2.bn2.running_var"  # its input was normalised by eight images at a time: near, not the same
    torch.testing.assert_close(parts[deep], whole[deep], rtol=0.5, atol=0.05)


@pytest.mark.parametrize("method", ["hsl", "fedavg"])
def test_nothing_else_changes_and_it_is_the_same_each_time(method: str):
    site = learning.site(learning.small_plan(method=method))
    model = model_of(site).train()
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(1)
    first = recalibrated(model, site)
    torch.manual_seed(2)
    torch.randn(7)  # whatever was drawn before
    again = recalibrated(model, site)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items()) and model.training
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
        assert torch.equal(tensor, before[name]) != ("running" in name), name
    assert not any(module.training for module in first.modules())
    assert not any(module._forward_pre_hooks for module in first.modules())


def test_in_training_mode_it_would_have_been_drawn_from_dropout(monkeypatch: pytest.MonkeyPatch):
    """Were dropout on, random numbers would be drawn: the generator stands where it stood."""
    site = learning.site()
    model = model_of(site)
    state = torch.get_rng_state()
    recalibrated(model, site)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_anchor_encoder_is_measured_on_anchor_images_alone():
    """Darker own images move the primary encoder's first mean, not the anchor encoder's."""
    site = learning.site(learning.small_plan(hsl={"encoder": "separate"}))
    model = model_of(site)
    first = statistics(recalibrated(model, site))
    site.dataset.images[:] //= 4
    darker = statistics(recalibrated(model, site))
    for encoder, same in (("encoder_primary", False), ("encoder_anchor", True)):
        name = f"{encoder}.trunk.net.bn1.running_mean"
        assert torch.equal(first[name], darker[name]) == same


def test_a_shared_encoder_is_measured_on_own_images_alone_as_in_training():
    site = learning.site(learning.small_plan(hsl={"encoder": "shared"}))
    model = model_of(site)
    found = statistics(recalibrated(model, site))["encoder.trunk.net.bn1.running_mean"]
    with torch.no_grad():
        own = model.encoder.trunk.net.conv1(own_images(site)).mean((0, 2, 3))
    torch.testing.assert_close(found, own, rtol=1e-4, atol=1e-5)


def test_a_model_without_running_statistics_comes_back_as_it_is():
    site = learning.site(learning.small_plan(method="fedavg"))
    for layer in (nn.GroupNorm(1, 3), nn.BatchNorm2d(3, track_running_stats=False)):
        model = nn.Sequential(layer)
        assert recalibrated(model, site) is model


def test_a_layer_without_weights_is_measured_too_and_one_that_saw_nothing_keeps_what_it_has():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.BatchNorm2d(3, affine=False), nn.BatchNorm2d(3)

        def forward(self, image: Tensor) -> Tensor:
            return self.used(image)

    site = learning.site(learning.small_plan(method="fedavg"))
    found = recalibrated(Odd(), site)
    torch.testing.assert_close(found.used.running_mean, own_images(site).mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.used.running_var, own_images(site).var((0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert found.unused.running_mean.tolist() == [0, 0, 0]


def test_one_image_alone_says_nothing():
    site = learning.site(learning.small_plan(method="fedavg"), learning.dataset(train=1))
    model = model_of(site)
    assert recalibrated(model, site) is model


def test_it_tells_how_far_it_is():
    site, heard = learning.site(), []
    recalibrated(model_of(site), site, lambda done, total: heard.append((done, total)))
    assert heard == [(40, 40)]
