"""The sentences of a methods section say what this plan says, and nothing that it does not."""

from __future__ import annotations

import pytest
from federations import FederationOf

from hsl_node.federation.config import AnchorCard, Federation
from hsl_node.federation.methods import CARDS, FAITH
from hsl_node.federation.plan import UNALTERED, Plan
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
    told_otherwise = said.get("other than published", "")
    assert told_otherwise.endswith(card.differs) if card.presets else told_otherwise == card.differs
    assert said["compared with its publication"].removesuffix(", but for what is named below") == FAITH[card.faith]
    assert ("but for" in said["compared with its publication"]) == bool(card.differs)
    assert ("anchor images" in said["loss"]) == ("anchor_weight" in card.settings), "fedktl has no such term"


def test_what_the_plan_has_otherwise_than_the_published_preset_is_told(federation: Federation) -> None:
    """Not the method's own settings alone: altered images and another schedule are no published form either."""
    defaults = told(federation, Plan())["other than published"]
    assert defaults == (
        "encoder shared, published separate; embedding softmax_scaled, published softmax; anchor_weight 0.1, published "
        "1; images altered in training, published as they are; recalibrate "
        "on, published off; schedule cosine_run, published restarts; " + CARDS["hsl"].differs
    )
    published = told(federation, Plan(settings={"preset": "published"}))
    assert published["other than published"] == CARDS["hsl"].differs
    warm = Plan(settings={"preset": "published"}, warmup_epochs=3)
    assert told(federation, warm)["other than published"].startswith("warmup_epochs 3, published 0; ")


def test_without_augmentation_nothing_is_claimed_that_was_not_done(federation: Federation) -> None:
    said = told(federation, Plan(method="fedavg", augment=UNALTERED, schedule="restarts"))
    assert said["optimiser"] == (
        "Adam, batches of 32, weight decay 0.0001, learning rate by cosine from 0.001 to 0.0001 every 10 epochs"
    )
    assert said["loss"] == "binary cross-entropy; classes are not weighted"
    assert "not augmented" in said["images"] and "GroupNorm" not in said["method"] and "anchor" not in said["rounds"]


def test_what_the_plan_changes_is_told(federation: Federation) -> None:
    augment = UNALTERED.model_copy(update={"flip": True, "shift": 0.1, "turn": 15, "contrast": 0.2})
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
    assert said["loss"].startswith("binary cross-entropy, plus 0.1 times that of as many anchor images; ")
    assert "(a pass over the larger of own images and anchor set)" in said["rounds"]
    assert "(a pass over the hospital's own images)" in told(with_anchor, Plan(epoch="own"))["rounds"]
    assert said["anchor set"] == "digits, 100 images, the same file at every hospital"
    assert "statistics of the hospital's own training images" in said["which model"]


def test_only_what_there_is_to_measure_or_to_end_early_is_told(federation: Federation) -> None:
    assert "BatchNorm statistics" not in told(federation, Plan(method="fedavg", backbone="vit_tiny"))["which model"]
    frozen = Plan(method="frozen", backbone_weights="0" * 64, backbone="timm:vit_b")
    assert "BatchNorm statistics" not in told(federation, frozen)["which model"]
    assert "scaled by its trunk's own mean" in told(federation, frozen)["images"]
    assert "fewer" not in told(federation, Plan(method="fedavg"))["rounds"], "5 epochs, patience of 5: none ends early"
    impatient = told(federation, Plan(method="fedavg", epochs_per_round=9, optimizer_state="reset"))
    assert "9 local epochs each, fewer where 5 have brought no better validation AUC;" in impatient["rounds"]
    assert impatient["optimiser"].startswith("Adam, begun anew in each round, ")
    teacher = Plan(method="fedppkt", image_size=32)
    assert "5 local epochs each, after a first of 200, of the teacher alone" in told(federation, teacher)["rounds"]
    rare = Plan(settings={"anchor_weight": 0.5, "anchor_every": 3})
    assert "plus 0.5 times that of as many anchor images, in each batch of 3;" in told(federation, rare)["loss"]
