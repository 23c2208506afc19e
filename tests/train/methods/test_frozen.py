"""Frozen features and a head: what travels, what stays to the bit, and that features are computed once."""

from __future__ import annotations

from pathlib import Path

import learning
import pytest
import torch
from rounds import first_round, first_start, train

from hsl_node.federation.names import Peer
from hsl_node.federation.plan import UNALTERED
from hsl_node.train.data.sources import TEST, TRAIN
from hsl_node.train.methods.frozen import FROZEN
from hsl_node.train.networks import frozen
from hsl_node.train.networks.frozen import FrozenClassifier
from hsl_node.train.networks.initial import initialise
from hsl_node.train.recalibrate import recalibrated
from hsl_node.train.site import initial_model
from hsl_node.weights.checkpoint_file import read_schema, read_weights
from hsl_node.weights.fuse_files import fuse_files


@pytest.fixture(autouse=True)
def forgotten() -> None:
    frozen._features.clear()


def site() -> learning.Site:
    return learning.site(learning.small_plan(method="frozen", augment=UNALTERED))


def model_of(plan: learning.Plan) -> FrozenClassifier:
    model = FrozenClassifier(plan)
    initialise(model, 1)
    return model


def head_after_a_step(raw: list[list[float]], labels: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """From zero, one step of rate 1 over all images: the mean of (1/2 - y) times the unit feature, downhill."""
    model = FrozenClassifier(learning.small_plan(method="frozen", augment=UNALTERED))
    model.trunk = torch.nn.Flatten()  # type: ignore[assignment]  # an "image" is its raw feature
    model.trunk.precision, model.trunk.backbone = torch.float32, str(raw)  # type: ignore[assignment]
    model.out = torch.nn.Linear(2, 1)
    torch.nn.init.zeros_(model.out.weight), torch.nn.init.zeros_(model.out.bias)
    optimizer = torch.optim.SGD(model.out.parameters(), lr=1)
    task_loss_of(model(torch.tensor(raw)[:, :, None, None]), torch.tensor(labels)).backward()
    optimizer.step()
    return model.out.weight.detach()[0], model.out.bias.detach()


def task_loss_of(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return learning.site(learning.small_plan(method="frozen")).task.loss(logits, labels)


def test_the_worked_numbers() -> None:
    a = head_after_a_step([[0.0, 2.0], [3.0, 4.0]], [0, 1])
    b = head_after_a_step([[1.0, 0.0], [5.0, 5.0]] * 3, [1] * 6)
    torch.testing.assert_close(a[0], torch.tensor([0.15, -0.05]), atol=1e-6, rtol=0)
    torch.testing.assert_close(b[0], torch.tensor([0.426777, 0.176777]), atol=1e-6, rtol=0)
    assert (a[1].item(), b[1].item()) == (0.0, 0.5)
    fused = [(2 * x + 6 * y) / 8 for x, y in zip(a, b, strict=True)]
    torch.testing.assert_close(fused[0], torch.tensor([0.357583, 0.120083]), atol=1e-6, rtol=0)
    assert fused[1].item() == 0.375


def test_only_the_head_travels_and_the_encoder_is_unchanged_to_the_bit(tmp_path: Path) -> None:
    plan = learning.small_plan(method="frozen", weight_decay=0.1)
    here = learning.site(plan)
    before = {n: t.clone() for n, t in initial_model(plan, FROZEN, here.backbone_weights).state_dict().items()}
    done = train(here, tmp_path, first_round(here, tmp_path).next)
    assert set(read_weights(done.out)) == {"out.weight", "out.bias"}
    assert done.out.stat().st_size < 1024
    own = read_weights(done.own)
    for name, tensor in before.items():
        assert torch.equal(torch.tensor(own[name]), tensor) is not name.startswith("out."), name


def test_recalibration_leaves_the_encoders_statistics_alone() -> None:
    here = site()
    model = model_of(here.plan)
    assert recalibrated(model, here) is model


def test_features_have_length_1_and_depend_on_their_image_alone() -> None:
    model = model_of(site().plan)
    images = learning.images_of(site(), TEST)
    together = model.features(images)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(len(images)))
    frozen._features.clear()
    assert torch.equal(model.features(images[3:4])[0], together[3])
    assert model.train().trunk.training is False
    assert torch.equal(model.features(images), together)


def test_an_image_is_computed_once_in_a_process_whatever_model_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = site().plan
    images = learning.images_of(site(), TRAIN)
    known = model_of(plan).features(images)
    again = model_of(plan)
    monkeypatch.setattr(again.trunk, "forward", lambda image: pytest.fail("computed again"))
    assert torch.equal(again.features(images), known)
    with torch.inference_mode():  # as in scoring; what it leaves must be good for training too
        assert torch.equal(again.features(images), known)
    other = FrozenClassifier(plan)
    initialise(other, 2)
    assert not torch.equal(other.features(images), known)  # another encoder has its own


def test_images_that_are_altered_are_not_kept() -> None:
    model = model_of(learning.small_plan(method="frozen", augment={"flip": True}))
    images = learning.images_of(site(), TEST)
    altered = model.train().features(images)
    assert not frozen._features
    torch.testing.assert_close(altered, model.eval().features(images))
    assert len(frozen._features) == len(images)


def test_a_run_that_was_killed_ends_with_the_same_bytes(tmp_path: Path) -> None:
    undisturbed = first_round(site(), tmp_path / "a")
    frozen._features.clear()

    def dies(event: dict[str, object]) -> None:
        if event["event"] == "epoch" and event["epoch"] == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        first_round(site(), tmp_path / "b", dies)
    frozen._features.clear()  # another process
    resumed = train(site(), tmp_path / "b", first_start(site(), tmp_path / "b"))
    assert resumed.out.read_bytes() == undisturbed.out.read_bytes()


def test_heads_are_averaged_by_images(tmp_path: Path) -> None:
    paths = {Peer(p): first_round(learning.site(site().plan, learning.dataset(seed=n), p), tmp_path / p).out
             for n, p in enumerate(("ash", "birch"))}  # fmt: skip
    fuse_files(
        "weighted_mean", paths, {Peer("ash"): 2, Peer("birch"): 6}, read_schema(paths[Peer("ash")]), tmp_path / "f"
    )
    ash, birch, fused = (read_weights(p)["out.weight"] for p in (*paths.values(), tmp_path / "f"))
    assert fused == pytest.approx(0.25 * ash + 0.75 * birch, rel=1e-6)
