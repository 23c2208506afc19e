"""The anchor task must reach what the primary task stands on: as published it does not, in the other forms it does."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from learning import SIZE, blobs

from hsl_node.federation.plan import load_plan
from hsl_node.train.batches import normalise
from hsl_node.train.methods import method_of
from hsl_node.train.networks.anchor_reach import Reach, anchor_reach
from hsl_node.train.networks.initial import initialise
from hsl_node.train.networks.mmoe import MMoE
from hsl_node.train.site import initial_model
from hsl_node.train.tasks.classification import primary_loss

PUBLISHED = ("hsl.preset=published",)


def reach(seed: int = 1, **form: object) -> Reach:
    model = MMoE(backbone="tiny", image_size=SIZE, **form)  # type: ignore[arg-type]
    initialise(model, seed)
    return reach_of(model)  # of the losses themselves, whatever their weight


def reach_of(model: MMoE, weight: float = 1.0) -> Reach:
    images, labels = (torch.from_numpy(a) for a in blobs(8, seed=1))
    anchors, anchor_labels = (torch.from_numpy(a) for a in blobs(8, seed=99))
    return anchor_reach(model, normalise(images), labels, normalise(anchors), anchor_labels, primary_loss, weight)


def test_the_published_form_is_two_networks_side_by_side() -> None:
    """Measured on ResNet18 at 64 px: 1.5e-7 of the anchor loss on primary features, 1.9e-3 of the primary loss."""
    for seed in (1, 2, 3):
        found = reach(seed)
        assert found.features < 1e-3 and found.encoder < 1e-3
        assert not found.aligns


@pytest.mark.parametrize(
    "form",
    [
        {"embedding": "layernorm"},
        {"embedding": "softmax_scaled"},
        {"embedding": "softmax_scaled", "temperature": 1.0},
        {"encoder": "shared"},
        {"encoder": "shared", "embedding": "layernorm"},
        {"encoder": "shared", "embedding": "softmax_scaled"},
    ],
)
def test_every_other_form_lets_the_anchor_task_move_the_primary_encoder(form: dict[str, object]) -> None:
    for seed in (1, 2, 3):
        found = reach(seed, **form)
        assert found.encoder >= 0.01 and found.aligns


@pytest.mark.parametrize("embedding", ["layernorm", "softmax_scaled"])
def test_an_embedding_that_is_not_flat_carries_the_anchor_task_to_the_primary_features(embedding: str) -> None:
    for seed in (1, 2, 3):
        assert reach(seed, embedding=embedding).features >= 0.01


def test_what_a_plan_has_by_default_aligns_and_the_published_preset_does_not() -> None:
    default, published = (
        reach_of(cast(MMoE, initial_model(plan, method_of("hsl"), None)), plan.settings["anchor_weight"])
        for plan in (load_plan(None, ["backbone=tiny", f"image_size={SIZE}", *more]) for more in ((), PUBLISHED))
    )
    assert default.features >= 0.01 and default.encoder >= 0.01
    assert published.features < 1e-3 and published.encoder < 1e-3


def test_with_a_shared_encoder_alone_the_embedding_stays_flat() -> None:
    found = reach(encoder="shared")
    assert found.features < 1e-3 < 0.1 < found.encoder  # all of it through the skip projection


def test_measuring_leaves_the_model_as_it_was() -> None:
    model = MMoE(backbone="tiny", image_size=SIZE, embedding="layernorm")
    initialise(model, 1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert reach_of(model) == reach_of(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model.training and all(p.grad is None for p in model.parameters())
    assert all(module.training for module in model.modules())
