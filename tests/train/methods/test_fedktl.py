"""FedKTL: the frame, the loss and the prototypes, worked by hand; that prototypes are all that leaves a hospital."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import learning
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rounds import Trained, first_round, first_start, train
from steps import batch_of, step_of

from hsl_node.federation.names import Peer
from hsl_node.federation.plan import UNALTERED
from hsl_node.train.data.sources import TRAIN
from hsl_node.train.method import Start
from hsl_node.train.methods.fedktl import FEDKTL, Sent, generated, transfer
from hsl_node.train.networks.fedktl import (
    SCALE,
    Generator,
    TransferNetwork,
    aligned,
    frame,
    mmd,
    widened,
)
from hsl_node.train.networks.initial import initialise
from hsl_node.train.scoring import open_model
from hsl_node.train.start import StartFiles, begin, new_learner
from hsl_node.weights.checkpoint_file import read_schema, read_weights
from hsl_node.weights.fuse_files import fuse_files

PEERS = ("ash", "birch")


def arcface(cosines: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(widened(cosines, target), target)


def plan(**changes: object) -> learning.Plan:
    return learning.small_plan(method="fedktl", **{"augment": UNALTERED, **changes})


def model_of(**changes: object) -> TransferNetwork:
    model = TransferNetwork(plan(**changes))
    initialise(model, 1)
    return model


# ---------------------------------------------------------------- by hand


def test_the_worked_numbers() -> None:
    cosines = F.normalize(torch.tensor([[0.2, 0.1, 0.05]])) @ frame(torch.eye(3))
    torch.testing.assert_close(cosines[0], torch.tensor([0.445435, -0.0890871, -0.356348]), atol=1e-6, rtol=1e-6)
    assert arcface(cosines, torch.tensor([0])).item() == pytest.approx(0.0380994, rel=1e-4)


def test_prototypes_are_unit_means_of_unit_projections() -> None:
    model = model_of()
    model.trunk = torch.nn.Flatten()  # type: ignore[assignment]
    model.project = torch.nn.Identity()  # type: ignore[assignment]
    images = torch.tensor([[5.0, 0.0], [0.3, 0.4], [0.0, 2.0]])[:, :, None, None]
    model.gather(images[:2], torch.tensor([0, 0]), 1)
    torch.testing.assert_close(model.prototypes[0], torch.tensor([0.894427, 0.447214]), atol=1e-6, rtol=0)
    assert not model.prototypes[1].any()  # no image of that class
    model.gather(images[2:], torch.tensor([1]), 1)  # the epoch's second batch
    assert model.prototypes.tolist()[1] == [0, 1] and model.prototypes[0, 0] > 0.89
    model.gather(images[2:], torch.tensor([0]), 2)  # another epoch begins anew
    assert model.prototypes.tolist() == [[0, 1], [0, 0]]


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_the_frame_is_a_simplex(classes: int) -> None:
    names = tuple(f"c{n}" for n in range(classes))
    found = model_of(classes=names).frame
    expected = torch.full((classes, classes), -1 / (classes - 1)).fill_diagonal_(1.0)
    torch.testing.assert_close(found.T @ found, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.sum(1), torch.zeros(classes), atol=1e-5, rtol=0)
    assert torch.equal(found, model_of(classes=names).frame)  # of the plan's seed: everybody's
    assert not torch.allclose(found, model_of(classes=names, seed=2).frame)


def test_without_a_margin_the_loss_is_that_of_scaled_cosines(monkeypatch: pytest.MonkeyPatch) -> None:
    cosines, target = torch.rand(5, 3) * 2 - 1, torch.tensor([0, 1, 2, 0, 1])
    with_margin = arcface(cosines, target)
    monkeypatch.setattr("hsl_node.train.networks.fedktl.MARGIN", 0.0)
    torch.testing.assert_close(arcface(cosines, target), F.cross_entropy(SCALE * cosines, target), atol=1e-3, rtol=1e-4)
    assert with_margin > arcface(cosines, target)


def test_a_cosine_of_1_has_a_finite_gradient() -> None:
    cosines = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], requires_grad=True)
    arcface(cosines, torch.tensor([0, 0])).backward()
    assert cosines.grad is not None and torch.isfinite(cosines.grad).all()


def test_scaling_features_changes_no_loss_beyond_the_projections_bias() -> None:
    model = model_of()
    torch.nn.init.zeros_(model.project.bias)
    feature = torch.rand(4, 64)
    torch.testing.assert_close(model.cosines(feature), model.cosines(feature * 9), atol=1e-5, rtol=0)


@pytest.mark.parametrize("balance", ["none", "weights"])
def test_classes_weigh_what_the_plan_says(balance: str) -> None:
    data = learning.dataset(train=40)
    data.labels[:30] = 0  # of 40: classes weigh 40 / 70 and 4
    site, model = learning.site(plan(class_balance=balance), data), model_of().eval()
    batch = replace(batch_of(4, site), target=torch.tensor([0, 1, 1, 0]))
    each = F.cross_entropy(
        widened(model.cosines(model.trunk(batch.image)), batch.target), batch.target, reduction="none"
    )
    weight = {"none": torch.ones(2), "weights": torch.tensor([40 / 70, 4.0])}[balance]
    found = transfer(step_of(model, site=site, batch=batch))["primary"]
    torch.testing.assert_close(found, (each * weight[batch.target]).mean(), rtol=1e-4, atol=1e-4)


def test_the_discrepancy_is_0_for_equals_symmetric_and_not_negative() -> None:
    x, y = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert mmd(x, x).item() == 0
    assert mmd(x, y).item() == pytest.approx(mmd(y, x).item()) and mmd(x, y) > 0
    assert mmd(x, x + 5) > mmd(x, y)


def test_two_classes_give_the_log_odds_of_the_second() -> None:
    model = model_of().eval()
    image = torch.rand(3, 3, learning.SIZE, learning.SIZE)
    cosines = model.cosines(model.trunk(image))
    torch.testing.assert_close(torch.sigmoid(model(image)[:, 0]), torch.softmax(SCALE * cosines, 1)[:, 1])
    assert model_of(classes=("a", "b", "c"))(image).shape == (3, 3)


# ---------------------------------------------------------------- generator and map


def test_the_stand_in_generator_rebuilds_the_anchor_set_from_enough_components() -> None:
    images = learning.anchor().images
    generator = Generator.of_anchor(images, len(images) - 1)
    flat = images.reshape(len(images), -1).astype(float)
    latents = (flat - generator.mean) @ np.linalg.pinv(generator.basis)
    np.testing.assert_allclose(generator.mean + latents @ generator.basis, flat, atol=1e-6)
    np.testing.assert_allclose(latents.var(0), 1, rtol=1e-6)  # latents are standard
    few = Generator.of_anchor(images, 3)
    np.testing.assert_allclose(few.basis, generator.basis[:3], atol=1e-9)
    assert few(torch.zeros(2, 3)).shape == (2, 3, learning.SIZE, learning.SIZE)


def test_the_map_is_the_same_each_time_and_parts_the_classes() -> None:
    rng = torch.Generator().manual_seed(0)
    near = [F.normalize(torch.eye(3) + 0.1 * torch.randn(3, 3, generator=rng)) for _ in PEERS]
    found = aligned(near, 5, 7)
    assert found.shape == (3, 5) and torch.equal(found, aligned(near, 5, 7))
    assert torch.pdist(found).min() > 0.1
    assert not torch.equal(found, aligned(near, 5, 8))


def test_a_class_that_nobody_has_gets_no_image() -> None:
    none = torch.eye(3)
    none[2] = 0
    found = aligned([none, none], 4, 1)
    assert torch.isfinite(found[:2]).all() and torch.isnan(found[2]).all()


def test_a_peer_that_sends_prototypes_of_1e9_does_not_make_all_classes_one() -> None:
    """They are within a checkpoint's bounds, and drowned all others': each class got the same image."""
    honest = [torch.eye(2), torch.eye(2)]
    found = aligned([*honest, torch.full((2, 2), 1e9)], 5, 7)
    assert torch.dist(*found) > 0.01  # it was 1e-5
    torch.testing.assert_close(aligned([*honest, 1e9 * torch.eye(2)], 5, 7), aligned([*honest, torch.eye(2)], 5, 7))


def test_a_peer_that_sends_no_prototype_does_not_end_the_run_of_a_hospital_with_one_class() -> None:
    """One prototype has no batch statistics: each attempt at the round failed, by an error of torch's."""
    one, none = torch.tensor([[1.0, 0], [0, 0]]), torch.zeros(2, 2)
    found = aligned([one, none], 4, 1)
    assert torch.isfinite(found[0]).all() and torch.isnan(found[1]).all()
    learner = new_learner(replace(site_of("ash"), anchor=learning.anchor(12)))
    sent = generated(learner, Start(2, {}, full_set={p: {"prototypes": none} for p in PEERS}))
    assert sent is None  # as in the first round


# ---------------------------------------------------------------- in a federation


def site_of(peer: str) -> learning.Site:
    return learning.site(plan(), learning.dataset(seed=PEERS.index(peer)), peer)


@pytest.fixture(scope="module")
def second_round(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Trained], dict[str, StartFiles]]:
    folder = tmp_path_factory.mktemp("fedktl")
    done = {peer: first_round(site_of(peer), folder / peer) for peer in PEERS}
    paths = {Peer(peer): one.out for peer, one in done.items()}
    digest = fuse_files("mean", paths, dict.fromkeys(paths, 1), read_schema(paths[Peer("ash")]), folder / "fused")
    common = {"base": folder / "fused", "base_sha256": digest, "full_set": paths}
    return done, {peer: replace(one.next, **common) for peer, one in done.items()}


def test_prototypes_of_the_best_epoch_are_all_that_leaves(
    second_round: tuple[dict[str, Trained], dict[str, StartFiles]],
) -> None:
    done, _ = second_round
    for peer, one in done.items():
        sent = read_weights(one.out)
        assert set(sent) == {"prototypes"} and sent["prototypes"].shape == (2, 2)
        assert one.out.stat().st_size < 300
        site = site_of(peer)
        model = open_model(one.own, site.plan, site.hardware)[1]
        assert isinstance(model, TransferNetwork)
        labels = torch.from_numpy(site.dataset.labels[site.indices(TRAIN)])
        model.gather(learning.images_of(site, TRAIN), labels, 999)
        np.testing.assert_allclose(sent["prototypes"], model.prototypes.numpy(), atol=1e-5)
    assert not np.array_equal(*(read_weights(one.out)["prototypes"] for one in done.values()))


def test_the_second_round_learns_from_generated_images(
    second_round: tuple[dict[str, Trained], dict[str, StartFiles]], tmp_path: Path
) -> None:
    done, starts = second_round
    beside = begin(site_of("ash"), starts["ash"]).beside
    assert isinstance(beside, Sent) and beside.images.shape == (2, 3, learning.SIZE, learning.SIZE)
    assert torch.equal(beside.latents, begin(site_of("ash"), starts["ash"]).beside.latents)
    events: list[dict[str, object]] = []
    train(site_of("ash"), tmp_path, starts["ash"], events.append)
    terms = [event["terms"] for event in events if event["event"] == "epoch"]
    assert all(set(one) == {"primary", "transfer"} for one in terms)  # type: ignore[call-overload]
    mine = begin(site_of("ash"), starts["ash"]).learner.model.state_dict()
    own = read_weights(done["ash"].own)
    assert all(np.array_equal(mine[n].numpy(), own[n]) for n in own if n != "prototypes")  # no weight of anybody else


def test_a_run_that_was_killed_ends_with_the_same_bytes(tmp_path: Path) -> None:
    undisturbed = first_round(site_of("ash"), tmp_path / "a")

    def dies(event: dict[str, object]) -> None:
        if event["event"] == "epoch" and event["epoch"] == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        first_round(site_of("ash"), tmp_path / "b", dies)
    resumed = train(site_of("ash"), tmp_path / "b", first_start(site_of("ash"), tmp_path / "b"))
    assert resumed.out.read_bytes() == undisturbed.out.read_bytes()
    assert resumed.own.read_bytes() == undisturbed.own.read_bytes()


def test_only_prototypes_travel() -> None:
    assert FEDKTL.travels(model_of()) == {"prototypes"}
