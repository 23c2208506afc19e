"""The sentences of a methods section say what this plan says, and nothing that it does not."""

from __future__ import annotations

import pytest
from federations import FederationOf

from hsl_node.federation.config import AnchorCard, Federation
from hsl_node.federation.methods import CARDS
from hsl_node.federation.plan import Augment, Plan
from hsl_node.results import method


@pytest.fixture(scope="module")
def federation(federation_of: FederationOf) -> Federation:
    return federation_of(3).federation


def told(federation: Federation, plan: Plan) -> dict[str, str]:
    return dict(method.sentences(federation.model_copy(update={"plan": plan})))


@pytest.mark.parametrize("name", CARDS)
def test_each_method_is_told_and_cited_as_its_card_says(federation: Federation, name: str) -> None:
    card = CARDS[name]
    optimizer = card.optimizer or "adam"
    plan = Plan.model_construct(**{**Plan().__dict__, "method": name, "settings": card.settle({}), "fusion": None,
                                   "optimizer": optimizer})  # fmt: skip
    said = told(federation, plan)
    assert said["method"].startswith(card.title)
    assert list(method.citations(plan)[:-1]) == ([card.cite] if card.cite else [])
    assert f"({card.fusion}: " in said["rounds"]
    assert ("the method's settings" in said) == bool(card.settings)
    assert said.get("other than published", "") == card.differs


def test_at_the_defaults_nothing_is_claimed_that_was_not_done(federation: Federation) -> None:
    said = told(federation, Plan(method="fedavg"))
    assert said["optimiser"] == (
        "Adam, batches of 32, weight decay 0.0001, learning rate by cosine from 0.001 to 0.0001 every 10 epochs"
    )
    assert said["loss"] == "binary cross-entropy; classes are not weighted"
    assert "not augmented" in said["images"] and "GroupNorm" not in said["method"] and "anchor" not in said["rounds"]


def test_what_the_plan_changes_is_told(federation: Federation) -> None:
    augment = Augment(flip=True, shift=0.1, turn=15, contrast=0.2)
    plan = Plan(
        method="fedprox", settings={"mu": 0.5}, optimizer="sgd", momentum=0.9, clip_norm=10, schedule="cosine_run",
        warmup_epochs=2, norm="group", recalibrate=False, class_balance="weights", augment=augment, fusion="median",
    )  # fmt: skip
    said = told(federation, plan)
    assert said["optimiser"] == (
        "SGD, momentum 0.9, batches of 32, weight decay 0.0001, gradients clipped to a norm of 10, learning rate by "
        "cosine from 0.001 to 0.0001 once over the run, after a rise over the first 2 epochs"
    )
    assert said["loss"] == "binary cross-entropy; a class weighs the more the rarer it is at the hospital"
    assert (
        "in training at random mirrored left and right, turned by up to 15 degrees, place changed by up to 10%, "
        "contrast changed by up to 20%" in said["images"]
    )
    assert "resnet18 with GroupNorm in place of BatchNorm" in said["method"]
    assert said["the method's settings"] == "mu 0.5" and "BatchNorm statistics" not in said["which model"]
    assert said["other than published"] == "fused by median; its authors fuse by weighted_mean"


def test_an_anchor_set_is_in_the_loss_and_in_what_an_epoch_is(federation: Federation) -> None:
    card = AnchorCard(name="digits", fingerprint="0" * 64, images=100, image_size=224)
    with_anchor = federation.model_copy(update={"anchor": card})
    said = told(with_anchor, Plan())
    assert said["loss"].startswith("binary cross-entropy, plus that of as many anchor images; ")
    assert "(a pass over the larger of own images and anchor set)" in said["rounds"]
    assert "(a pass over the hospital's own images)" in told(with_anchor, Plan(epoch="own"))["rounds"]
    assert said["anchor set"] == "digits, 100 images, the same file at every hospital"
    assert "statistics of the hospital's own training images" in said["which model"]
