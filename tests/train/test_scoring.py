"""Weights and images in, probabilities out: anchor reference, published pairing, exports, and the run alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import learning
import numpy as np
import pytest
import torch
from every_method import card_of
from torch import Tensor

from hsl_node.errors import ConfigError
from hsl_node.federation.plan import Plan
from hsl_node.train import alone, export, scoring
from hsl_node.train.bundle import NEEDED
from hsl_node.train.data.anchor import AnchorSet
from hsl_node.train.data.sources import TEST, VALIDATION
from hsl_node.train.hardware import Hardware, derived_seed, prepare
from hsl_node.train.method import Site
from hsl_node.train.predictor import Predictor, of_bundle, of_model
from hsl_node.train.site import initial_weights
from hsl_node.train.tasks.classification import log_odds
from hsl_node.train.tasks.metrics import measure
from hsl_node.weights.checkpoint_file import read_weights, write_weights
from hsl_node.weights.whole import sha256_of


@pytest.fixture(autouse=True)
def deterministic() -> None:
    prepare(device="cpu", threads=1, precision="float32", image_size=learning.SIZE)


def weights_of(folder: Path, plan: Any) -> Path:
    path = folder / "weights.safetensors"
    initial_weights(folder, plan, scoring.method_of(plan.method), path)
    return path


def probabilities_of(path: Path, site: Site, split: int = TEST, **changes: Any) -> Any:
    """Of a file, in the set's order."""
    _, model = scoring.open_model(path, site.plan, site.hardware)
    return scoring.as_probabilities(scoring.answers(site, model, split, **changes))


def scored(site: Site, path: Path, split: int, **changes: Any) -> Any:
    return scoring.answers(site, scoring.open_model(path, site.plan, site.hardware)[1], split, **changes)


def predicted(path: Path, images: Any, plan: Plan, hardware: Hardware, *, anchor: AnchorSet | None) -> Any:
    """Of images that are in no site's set."""
    method, model = scoring.open_model(path, plan, hardware)
    embedding = scoring.anchor_embedding(method, model, anchor, hardware)
    return scoring.as_probabilities(scoring.forward(method, model, images, np.arange(len(images)), embedding, hardware))


def predictor_of(weights: Path, plan: Plan, anchor: AnchorSet | None) -> Predictor:
    card = card_of(plan).model_copy(update={"source_weights_sha256": sha256_of(weights)})
    return of_model(scoring.open_model(weights, plan, learning.CPU)[1], card, learning.CPU, anchor)


def test_a_score_covers_exactly_the_test_images_in_order(tmp_path: Path) -> None:
    site = learning.site()
    data, path = site.dataset, weights_of(tmp_path, site.plan)
    found = probabilities_of(path, site)
    where = np.flatnonzero(data.split == 2)
    assert found.shape == (16,) and ((found > 0) & (found < 1)).all()
    in_order = predicted(path, data.images[where], site.plan, site.hardware, anchor=site.anchor)
    assert np.array_equal(found, in_order)
    assert np.array_equal(scoring.as_probabilities(scored(site, path, TEST)), found)
    assert measure(data.labels[where], found).images == 16


def test_the_reference_is_the_mean_anchor_embedding_in_evaluation_mode(tmp_path: Path) -> None:
    plan = learning.small_plan(hsl={"encoder": "separate"})
    anchor = learning.anchor(70)  # more than one evaluation batch
    method, model = scoring.open_model(weights_of(tmp_path, plan), plan, learning.CPU)
    found = scoring.anchor_embedding(method, model, anchor, learning.CPU)
    assert found is not None and found.shape == (512,)
    with torch.no_grad():
        images = scoring.upload(anchor.images, learning.CPU)
        torch.testing.assert_close(found, model.eval().encode_anchor(images).mean(0))


def test_with_a_shared_encoder_the_reference_hardly_depends_on_how_the_anchor_set_is_sorted(tmp_path: Path) -> None:
    plan, anchor = learning.small_plan(), learning.anchor(128)
    method, model = scoring.open_model(weights_of(tmp_path, plan), plan, learning.CPU)

    def reference(order: np.ndarray) -> Tensor:
        of = replace(anchor, images=images[order], labels=anchor.labels[order])
        found = scoring.anchor_embedding(method, model, of, learning.CPU)
        assert found is not None
        return found

    half = np.arange(128) < 64
    images = np.where(half[:, None, None], anchor.images // 4, anchor.images)
    by_class, mixed = reference(np.arange(128)), reference(np.random.default_rng(1).permutation(128))
    with torch.no_grad():
        apart = [model.encode_anchor(scoring.upload(images[at], learning.CPU)).mean(0) for at in (half, ~half)]
    assert (by_class - mixed).norm() < 0.2 * (sum(apart) / 2 - mixed).norm()


def test_epochs_are_compared_beside_a_fixed_part_of_the_anchor_set_and_scored_beside_all(tmp_path: Path) -> None:
    plan, anchor = learning.small_plan(), learning.anchor(200)
    path = weights_of(tmp_path, plan)
    site, seen = replace(learning.site(plan), anchor=anchor), list[Tensor]()
    network = site.method.network
    assert network.reference is not None

    def embed(model: torch.nn.Module, image: Tensor) -> Tensor:
        seen.append(image.clone())
        return network.reference(model, image)  # type: ignore[misc]

    watched = replace(site, method=replace(site.method, network=replace(network, reference=embed)))
    _, model = scoring.open_model(path, plan, learning.CPU)
    found = scoring.validate(watched, model)
    first = torch.cat(seen)
    assert len(first) == scoring.COMPARED_ANCHORS == 128
    seen.clear()
    assert scoring.validate(watched, model) == found and torch.equal(torch.cat(seen), first)
    other = replace(watched, peer="charity", plan=plan.model_copy(update={"seed": 2}))
    seen.clear()
    scoring.validate(other, model)
    assert not torch.equal(torch.cat(seen), first), "the plan's seed chooses, not the peer"
    seen.clear()
    scoring.answers(watched, model, TEST)
    assert len(torch.cat(seen)) == 200


def test_a_prediction_is_a_function_of_the_patients_image_alone(tmp_path: Path) -> None:
    plan, data = learning.small_plan(), learning.dataset()
    path, anchor = weights_of(tmp_path, plan), learning.anchor()
    together = predicted(path, data.images[:5], plan, learning.CPU, anchor=anchor)
    single = [predicted(path, data.images[i : i + 1], plan, learning.CPU, anchor=anchor)[0] for i in range(5)]
    np.testing.assert_allclose(together, single, rtol=1e-5)


def test_random_pairing_gives_the_published_behaviour(tmp_path: Path) -> None:
    """Each image beside one anchor image: the same image twice may get two answers, and the seed decides which."""
    plan = learning.small_plan(hsl={"embedding": "layernorm"})  # where the anchor image matters most
    path, images = weights_of(tmp_path, plan), learning.dataset().images[:1].repeat(8, axis=0)
    site = learning.site(plan, replace(learning.dataset(0, 0, 8), images=images))
    assert np.ptp(probabilities_of(path, site)) < 1e-6
    drawn = probabilities_of(path, site, pairing="random")
    assert np.ptp(drawn) > 1e-6
    assert np.array_equal(drawn, probabilities_of(path, site, pairing="random"))
    assert np.array_equal(scoring.as_probabilities(scored(site, path, TEST, pairing="random")), drawn)
    method, model = scoring.open_model(path, plan, learning.CPU)
    pairs = np.random.default_rng(derived_seed(plan.seed, "anchor pairing")).integers(24, size=8)
    rows = scoring.anchor_embedding(method, model, learning.anchor(), learning.CPU, pairs)
    assert rows is not None
    with torch.no_grad():
        logits = method.network.ask(model, scoring.upload(images, learning.CPU), rows)
    np.testing.assert_allclose(drawn, torch.sigmoid(logits[:, 0]).numpy(), rtol=1e-5)


def test_three_classes_give_three_probabilities_that_add_up_to_one(tmp_path: Path) -> None:
    plan = learning.small_plan(classes=("a", "b", "c"))
    found = probabilities_of(weights_of(tmp_path, plan), learning.site(plan))
    assert found.shape == (16, 3)
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-6)


def test_a_split_without_images_scores_as_undefined(tmp_path: Path) -> None:
    for classes in (("a", "b"), ("a", "b", "c")):
        plan = learning.small_plan(classes=classes)
        path = weights_of(tmp_path / str(len(classes)), plan)
        said = scored(learning.site(plan, learning.dataset(8, 0, 4)), path, VALIDATION)
        found = measure(np.empty(0, np.int64), scoring.as_probabilities(said), scoring.as_log_odds(said))
        assert found.images == 0 and found.auc is None


@pytest.mark.parametrize(
    "logits",
    [
        [[20.0], [30.0], [18.0], [40.0]],  # of class 1: as float32 probabilities all are 1
        [[0.0, 20.0, -9.0], [0.0, 30.0, -9.0], [0.0, 18.0, -9.0], [0.0, 40.0, -9.0]],
    ],
)
def test_a_network_that_is_sure_of_everything_still_ranks(
    monkeypatch: pytest.MonkeyPatch, logits: list[list[float]]
) -> None:
    said, many = torch.tensor(logits), len(logits[0])
    assert (scoring.as_probabilities(said).reshape(4, many)[:, min(1, many - 1)] == 1).all()
    site = learning.site(learning.small_plan(classes=("a", "b", "c")[: max(2, many)]), learning.dataset(0, 4, 0))
    monkeypatch.setattr(scoring, "answers", lambda *_, **__: said)
    labels = np.array([0, 1, 0, 1])
    found = scoring.validate(replace(site, dataset=replace(site.dataset, labels=labels)), torch.nn.Module())
    assert found.score == 1.0  # 30 and 40 before 18 and 20


def test_log_odds_are_those_of_the_probabilities() -> None:
    logits = torch.tensor([[0.3, -1.0, 2.0], [0.0, 0.0, 0.0]])
    chances = torch.softmax(logits.double(), dim=1)
    torch.testing.assert_close(log_odds(logits), torch.log(chances / (1 - chances)))
    torch.testing.assert_close(log_odds(torch.tensor([[0.5], [-2.0]])), torch.tensor([0.5, -2.0]))


def test_a_validation_set_of_one_class_has_a_loss_but_no_auc(tmp_path: Path) -> None:
    site = learning.site()
    one_class = replace(site.dataset, labels=np.zeros_like(site.dataset.labels))
    _, model = scoring.open_model(weights_of(tmp_path, site.plan), site.plan, learning.CPU)
    found = scoring.validate(replace(site, dataset=one_class), model)
    assert found.score is None and found.loss is not None and found.loss > 0


def test_the_method_without_anchor_needs_none_and_hsl_says_that_it_does(tmp_path: Path) -> None:
    plan = learning.small_plan(method="fedavg")
    path = weights_of(tmp_path, plan)
    assert len(predicted(path, learning.dataset().images[:3], plan, learning.CPU, anchor=None)) == 3
    hsl = learning.small_plan()
    with pytest.raises(ConfigError, match="anchor set"):
        other = weights_of(tmp_path / "hsl", hsl)
        predicted(other, learning.dataset().images[:3], hsl, learning.CPU, anchor=None)


def test_spoilt_weights_are_named_instead_of_scored(tmp_path: Path) -> None:
    plan = learning.small_plan()
    weights = read_weights(weights_of(tmp_path, plan))
    weights["tower_primary.out.bias"] = weights["tower_primary.out.bias"] * np.float32("nan")
    write_weights(tmp_path / "spoilt.safetensors", weights)
    with pytest.raises(ConfigError, match="not a finite number"):
        scored(learning.site(plan), tmp_path / "spoilt.safetensors", TEST)


# ---------------------------------------------------------------- export


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    "settings", [{}, {"classes": ("a", "b", "c"), "hsl": {"embedding": "layernorm"}}, {"method": "fedavg"}]
)
def test_an_exported_model_predicts_without_anchor_set_and_as_onnx(tmp_path: Path, settings: dict[str, Any]) -> None:
    onnx = pytest.importorskip("onnx", reason="the onnx extra is not installed")
    pytest.importorskip("onnxscript", reason="the onnx extra is not installed")
    from onnx.reference import ReferenceEvaluator

    plan, images = learning.small_plan(**settings), learning.dataset().images[:3]
    path, anchor = weights_of(tmp_path, plan), learning.anchor() if plan.method == "hsl" else None
    facts = {"federation": {"name": "trees", "sha256": "f" * 64, "peers": ["ash"]}, "trained_by": "ash"}
    files, onnx_missing = export.export_model(
        tmp_path / "out", predictor=predictor_of(path, plan, anchor), facts=facts, onnx=True
    )
    assert onnx_missing == ""
    assert {oct(f.stat().st_mode & 0o777) for f in files} == {"0o600"}
    assert {p.name for p in files} == {*NEEDED, "model.onnx", "SHA256SUMS"}

    expected = predicted(path, images, plan, learning.CPU, anchor=anchor)
    exported = of_bundle(tmp_path / "out")(images)  # of that folder alone: no anchor set, no state
    np.testing.assert_array_equal(exported[:, 1] if expected.ndim == 1 else exported, expected)

    model = onnx.load(tmp_path / "out" / "model.onnx")
    onnx.checker.check_model(model)
    pixels = np.repeat(images[:, None], 3, axis=1).astype(np.float32) / 255
    (found,) = ReferenceEvaluator(model).run(None, {"pixels": pixels})
    np.testing.assert_allclose(found, expected, atol=1e-5)  # 3 images, exported with 2: the batch is free

    card = json.loads((tmp_path / "out" / "model.json").read_text())
    assert card["federation"]["sha256"] == "f" * 64 and card["classes"] == list(plan.classes)
    assert card["source_weights_sha256"] == sha256_of(path)
    assert all(sha256_of(tmp_path / "out" / name) == digest for name, digest in card["files"].items())


def test_an_export_without_the_onnx_packages_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    plan = learning.small_plan()
    path = weights_of(tmp_path, plan)
    files, onnx_missing = export.export_model(
        tmp_path / "out", predictor=predictor_of(path, plan, learning.anchor()), facts={}, onnx=True
    )
    assert "hsl-node[onnx]" in onnx_missing
    assert {p.name for p in files} == {*NEEDED, "SHA256SUMS"}


# ---------------------------------------------------------------- trained alone


class Killed(BaseException):
    pass


def test_the_run_alone_has_as_many_epochs_and_the_same_start_as_the_federation(tmp_path: Path) -> None:
    site = learning.site()  # 2 rounds of 2 epochs
    events: list[dict[str, Any]] = []
    done = alone.train_alone(site, tmp_path, rounds=2, report=events.append)
    assert [e["epoch"] for e in events if e["event"] == "epoch"] == [1, 2, 3, 4]
    assert done.epochs == 4 and alone.find_alone(tmp_path) == done
    epochs = [e for e in events if e["event"] == "epoch"]
    best = min(epochs, key=lambda e: (-e["score"], e["validation_loss"], e["epoch"]))
    assert (done.score, done.best_epoch) == (best["score"], best["epoch"])
    assert sha256_of(tmp_path / "trainer" / "alone.safetensors") == done.sha256
    start, _ = initial_weights(tmp_path, site.plan, site.method, tmp_path / "r000000.safetensors")
    assert sha256_of(tmp_path / "trainer/alone/initial.safetensors") == start

    again: list[dict[str, Any]] = []
    assert alone.train_alone(site, tmp_path, rounds=2, report=again.append) == done
    assert again == []  # finished: at once


def test_the_run_alone_of_a_method_with_a_longer_first_round_has_all_its_epochs(tmp_path: Path) -> None:
    """FedPPKT's teacher alone: 3 epochs, and one of each round after it."""
    settings = {"teacher_epochs": 3, "images": 8, "pool": 16, "distillations": 1, "refinements": 0}
    site = learning.site(learning.small_plan(method="fedppkt", epochs_per_round=1, fedppkt=settings))
    events: list[dict[str, Any]] = []
    assert alone.train_alone(site, tmp_path, rounds=3, report=events.append).epochs == 5
    assert [e["epoch"] for e in events if e["event"] == "epoch"] == [1, 2, 3, 4, 5]


def test_the_run_alone_goes_on_where_it_was_killed(tmp_path: Path) -> None:
    site = learning.site()
    undisturbed = alone.train_alone(site, tmp_path / "a", rounds=2, report=lambda _: None)

    def dies(event: dict[str, Any]) -> None:
        if event["event"] == "progress" and event["epoch"] == 3:
            raise Killed

    with pytest.raises(Killed):
        alone.train_alone(site, tmp_path / "b", rounds=2, report=dies)
    assert alone.find_alone(tmp_path / "b") is None
    events: list[dict[str, Any]] = []
    assert alone.train_alone(site, tmp_path / "b", rounds=2, report=events.append) == undisturbed
    assert [e["epoch"] for e in events if e["event"] == "epoch"] == [3, 4]


def test_a_run_alone_of_another_length_starts_anew(tmp_path: Path) -> None:
    site = learning.site()
    alone.train_alone(site, tmp_path, rounds=1, report=lambda _: None)
    done = alone.train_alone(site, tmp_path, rounds=2, report=lambda _: None)
    assert done.epochs == 4
