"""What the plan says of the images that training sees, in the loop: augmentation, balance, epochs, anchors; and the
fused model recalibrated on them."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import learning
import numpy as np
import pytest
import torch

from hsl_node.train import loop
from hsl_node.train.checkpoint import RoundState
from hsl_node.train.hardware import prepare
from hsl_node.train.loop import train_round
from hsl_node.train.method import Site
from hsl_node.train.site import initial_weights
from hsl_node.train.start import StartFiles, new_learner
from hsl_node.train.task import Task
from hsl_node.train.tasks.classification import primary_loss
from hsl_node.weights.whole import sha256_of


class Killed(BaseException):
    """Stands for SIGKILL: nothing of ours catches it."""


@pytest.fixture(autouse=True)
def deterministic() -> None:
    prepare(device="cpu", threads=1, precision="float32", image_size=learning.SIZE)


def run(site: Site, folder: Path, round: int = 1) -> tuple[RoundState, list[dict[str, Any]]]:
    base, events = folder / "fused" / "r000000.safetensors", list[dict[str, Any]]()
    digest, _ = initial_weights(folder, site.plan, site.method, base)
    state = train_round(
        site,
        folder=folder / "trainer",
        files=StartFiles(round, base, digest),
        out=folder / "out.safetensors",
        own=folder / "own.safetensors",
        report=events.append,
    )
    return state, events


def sent(folder: Path) -> str:
    return sha256_of(folder / "out.safetensors")


def seen_by_losses(monkeypatch: pytest.MonkeyPatch, site: Site) -> list[Any]:
    """Every batch that the method's loss is asked of."""
    batches: list[Any] = []
    original = loop._batch

    def spy(*args: Any) -> Any:
        batches.append(original(*args))
        return batches[-1]

    monkeypatch.setattr(loop, "_batch", spy)
    return batches


AUGMENT = {"flip": True, "shift": 0.1, "zoom": 0.1, "turn": 10, "brightness": 0.1, "contrast": 0.1}


# ---------------------------------------------------------------- augmentation


def test_own_images_are_changed_anew_in_each_epoch_and_anchors_never(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    seen: dict[bool, list[Any]] = {}
    for on in (False, True):
        site = learning.site(learning.small_plan(batch_size=40, augment=AUGMENT if on else {}))
        with monkeypatch.context() as patch:
            seen[on] = seen_by_losses(patch, site)
            run(site, tmp_path / str(on))
    plain, changed = seen[False], seen[True]
    assert len(plain) == len(changed) == 2  # epochs of one batch
    for one, other in zip(plain, changed, strict=True):
        assert np.array_equal(one.where, other.where) and torch.equal(one.anchor, other.anchor)
        assert not torch.equal(one.image, other.image)
    order = [np.argsort(batch.where) for batch in changed]
    assert not torch.equal(changed[0].image[order[0]], changed[1].image[order[1]])


def test_an_augmented_round_that_is_killed_ends_with_the_same_bytes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    site = learning.site(learning.small_plan(method="fedavg", augment=AUGMENT, class_balance="sampler"))
    run(site, tmp_path / "undisturbed")
    validate, calls = loop.validate, iter(range(9))

    def killed_in_the_second_epoch(*args: Any) -> Any:
        if next(calls) == 2:  # the base, epoch 1, and now epoch 2
            raise Killed
        return validate(*args)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "validate", killed_in_the_second_epoch)
        with pytest.raises(Killed):
            run(site, tmp_path / "killed")
    run(site, tmp_path / "killed")
    assert sent(tmp_path / "killed") == sent(tmp_path / "undisturbed")
    assert learning.same_bytes(tmp_path / "killed" / "trainer", tmp_path / "undisturbed" / "trainer")


# ---------------------------------------------------------------- epochs and anchors


def test_an_own_epoch_has_as_many_steps_as_the_own_images_need(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    data = learning.dataset(train=8)  # beside 24 anchors
    longest, own = (
        run(learning.site(learning.small_plan(epoch=epoch), data), tmp_path / epoch)[0] for epoch in ("longest", "own")
    )
    assert longest.steps == (3, 3) and own.steps == (1, 1)  # batches of 8


def test_anchors_in_every_third_batch_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    site = learning.site(learning.small_plan(hsl={"anchor_every": 3}))
    batches = seen_by_losses(monkeypatch, site)
    _, events = run(site, tmp_path)
    assert [batch.anchor is not None for batch in batches] == [True, False, False, True, False] * 2
    terms = [event["terms"] for event in events if event["event"] == "epoch"]
    assert all(set(t) == {"primary", "anchor"} for t in terms)


# ---------------------------------------------------------------- classes


@pytest.mark.parametrize("classes", [2, 3])
def test_weights_count_each_image_by_its_class(classes: int):
    names = [f"c{c}" for c in range(classes)]
    data = learning.dataset(train=60, classes=classes)
    data.labels[:60] = np.repeat(np.arange(classes), [60 - 6 * (classes - 1), *[6] * (classes - 1)])
    plan = learning.small_plan(method="fedavg", classes=names, class_balance="weights")
    learner = new_learner(learning.site(plan, data))
    logits = torch.randn(60, 1 if classes == 2 else classes, generator=torch.Generator().manual_seed(1))
    labels = torch.from_numpy(data.labels[:60])
    of_class = [primary_loss(logits[labels == c], labels[labels == c]) for c in range(classes)]
    found = learner.task.loss(logits, labels)
    torch.testing.assert_close(found, torch.stack(of_class).mean())  # over all images: every class alike
    assert learner.site.task.loss(logits, labels) != found  # validation and anchors: as they are


def test_classes_of_one_size_and_no_balance_are_the_same_loss():
    logits, labels = torch.randn(40, 1), torch.arange(40) % 2
    weighted, plain = (
        new_learner(learning.site(learning.small_plan(method="fedavg", class_balance=b))).task
        for b in ("weights", "none")
    )
    assert isinstance(plain, Task)
    torch.testing.assert_close(weighted.loss(logits, labels), plain.loss(logits, labels))


def test_the_sampler_makes_a_rare_class_as_frequent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    data = learning.dataset(train=200)
    data.labels[:200] = np.repeat([0, 1], [190, 10])
    site = learning.site(learning.small_plan(method="fedavg", class_balance="sampler"), data)
    batches = seen_by_losses(monkeypatch, site)
    run(site, tmp_path)
    rare = torch.cat([batch.target for batch in batches]).float().mean().item()
    assert abs(rare - 0.5) < 4 * 0.5 / 400**0.5


# ---------------------------------------------------------------- recalibration


@pytest.mark.parametrize("on", [True, False])
def test_a_fused_model_is_validated_recalibrated_too(on: bool, tmp_path: Path):
    site = learning.site(learning.small_plan(method="fedavg", recalibrate=on))
    state, events = run(site, tmp_path, round=2)
    told = [event["recalibrated"] for event in events if event["event"] == "validated"]
    worth = state.worth.recalibrated
    assert told == [asdict(worth) if worth else None]
    assert (worth is not None) == on
    if worth is not None:
        assert worth.loss != state.worth.fused.loss


def test_training_goes_on_from_the_fused_model_not_from_the_recalibrated_one(tmp_path: Path):
    files = {}
    for on in (True, False):
        site = learning.site(learning.small_plan(method="fedavg", recalibrate=on))
        run(replace(site, run=str(on)), tmp_path / str(on), round=2)
        files[on] = sent(tmp_path / str(on))
    assert files[True] == files[False]
