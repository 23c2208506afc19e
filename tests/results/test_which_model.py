"""A hospital's model is its best own, fused or recalibrated one: evaluate, predict and export follow, and say so."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federations import FederationOf
from finished_run import PLAN, finished_run
from typer.testing import CliRunner

from hsl_node.commands.app import app
from hsl_node.errors import LocalStateError, UsageError
from hsl_node.federation.method_card import SCORE_NAMES
from hsl_node.federation.names import Peer, Round
from hsl_node.host.layout import Layout
from hsl_node.host.terminal import progress_lines
from hsl_node.results import evaluate, export, facts, models, words
from hsl_node.status.recorded import told_by
from hsl_node.sync.store.journal import Journal
from hsl_node.train.bundle import read_card
from hsl_node.train.methods import method_of
from hsl_node.train.predictor import of_bundle
from hsl_node.train.site import initial_model
from hsl_node.train.state_dict import all_tensors, to_weights
from hsl_node.weights.checkpoint_file import read_weights, write_weights
from hsl_node.weights.whole import sha256_of

STATISTICS = ("running_mean", "running_var")


@pytest.fixture
def state(tmp_path: Path, federation_of: FederationOf) -> Path:
    """ash after one round: its fused model is worth 0.6, its own 0.5; of two models with other weights."""
    return finished_run(tmp_path, federation_of)


def set_worth(state: Path, *, own: float | None = None, again: float | None = None) -> None:
    """`own`: of what it sent in round 2."""
    with Journal.create(Layout(state).journal) as journal, journal.transaction():
        if own is not None:
            shutil.copy(Layout(state).own(1), Layout(state).own(2))
            journal.record_own(2, sha256_of(Layout(state).own(2)), own, 0.8)
        journal.record_validation(1, 0.6, 0.7, (again, None if again is None else 0.6))


def run(state: Path, *arguments: str) -> Any:
    return CliRunner().invoke(app, ["--state", str(state), *arguments])


def squares() -> list[Any]:
    return [np.random.default_rng(n).integers(0, 256, (16, 16, 3), dtype=np.uint8) for n in range(5)]


# ------------------------------------------------------------------ the hospital's own


def test_scores_are_called_as_the_methods_card_calls_them(
    state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    set_worth(state, own=0.9)
    monkeypatch.setitem(SCORE_NAMES, "classification", "kappa")  # type: ignore[attr-defined]
    assert evaluate.evaluate(state, again=True)["why"].startswith("own model of round 2: best validation kappa here")
    assert "best validation kappa here" in export.own_predictor(state).card.why
    progress_lines("kappa")({"event": "epoch", "epoch": 2, "score": 0.5})
    assert capsys.readouterr().err == "epoch 2 trained, validation kappa 0.500\n"


def test_where_the_own_model_is_best_it_is_measured_asked_and_exported(state: Path, tmp_path: Path) -> None:
    set_worth(state, own=0.9)
    model = models.find_model(state, None)
    assert (model.kind, model.round, model.path(Layout(state))) == ("own", 2, Layout(state).own(2))

    found = evaluate.evaluate(state)
    assert (found["kind"], found["round"], set(found["test"])) == ("own", 2, {"own", "fused"})
    assert found["rounds"] == {"own": 2, "fused": 1}
    assert found["weights"] == {"own": sha256_of(Layout(state).own(2)), "fused": sha256_of(Layout(state).fused(1))}
    shown = words.evaluation_text(found, evaluate.statistics(state, found))
    assert "this hospital's own model of round 2, sha256 " in shown
    assert (
        "this hospital's model: own model of round 2: best validation AUC here, 0.900 (fused 0.600 in round 1)" in shown
    )
    assert "its own model after fusions is better than the best one as it was fused cannot be said" in shown

    export.export(state, tmp_path / "model")
    card = read_card(tmp_path / "model")
    assert (card.kind, card.round, card.source_weights_sha256) == ("own", 2, found["weights"]["own"])
    own, out = read_weights(Layout(state).own(2)), read_weights(tmp_path / "model" / "model.safetensors")
    assert own.keys() == out.keys() and all(np.array_equal(own[name], out[name]) for name in own)
    text = (tmp_path / "model" / "CARD.md").read_text()
    assert "- The own model of ash of round 2: trained on there from the fused model before, exported by ash." in text
    assert "- Why this one: own model of round 2: best validation AUC here, 0.900" in text
    assert json.loads((tmp_path / "model" / "model.json").read_text())["test"]["auc"] == found["test"]["own"]["auc"]
    same = export.own_predictor(state)(squares())
    assert np.array_equal(of_bundle(tmp_path / "model")(squares()), same)
    assert not np.array_equal(export.own_predictor(state, 1)(squares()), same), "--round is the fused one"


def test_a_lost_own_model_is_named_and_a_fused_one_the_way_out(state: Path) -> None:
    set_worth(state, own=0.9)
    Layout(state).own(2).unlink()
    for take in (lambda: evaluate.evaluate(state), lambda: export.own_predictor(state)):
        with pytest.raises(LocalStateError, match=r"own model of round 2 .* is lost") as lost:
            take()
        assert "No other hospital has it" in lost.value.remedy and "--round N" in lost.value.remedy
    found = evaluate.evaluate(state, round=1)
    assert (found["kind"], set(found["test"])) == ("fused", {"fused", "local"})


def test_when_another_model_becomes_the_best_the_test_set_is_measured_with_that_and_it_is_counted(state: Path) -> None:
    first = evaluate.evaluate(state)
    assert (first["kind"], set(first["test"])) == ("fused", {"fused", "local"})
    set_worth(state, own=0.9)
    second = evaluate.evaluate(state)
    assert (second["kind"], second["evaluated"]) == ("own", 2)
    assert evaluate.evaluate(state) == second


def test_before_anything_is_fused_there_is_no_model_of_the_federation(state: Path) -> None:
    with Journal.create(Layout(state).journal) as journal:
        journal._write("DELETE FROM fused", ())
    with pytest.raises(UsageError, match="no fused model has been validated here yet"):
        models.find_model(state, None)
    with Journal.read_only(Layout(state).journal) as journal:
        assert told_by(journal, Peer("ash"))["model"] is None, "nor does status have another opinion"
    assert facts.read(state).why == ""


# ------------------------------------------------------------------ recalibrated


def test_where_it_is_best_recalibrated_the_statistics_are_those_of_own_images_in_all_that_goes_out(
    state: Path, tmp_path: Path
) -> None:
    set_worth(state, again=0.8)
    found = evaluate.evaluate(state)
    assert (found["kind"], set(found["test"])) == ("recalibrated", {"recalibrated", "fused", "local"})
    assert found["weights"]["recalibrated"] == found["weights"]["fused"], "one file"
    chances = evaluate.find_scores(Journal.read_only(Layout(state).journal), found)
    assert chances is not None
    said = chances["test"]["probabilities"]
    assert said["recalibrated"] != said["fused"]

    export.export(state, tmp_path / "model")
    fused, out = read_weights(Layout(state).fused(1)), read_weights(tmp_path / "model" / "model.safetensors")
    differing = {name for name in fused if not np.array_equal(fused[name], out[name])}
    assert differing and all(name.endswith(STATISTICS) for name in differing)
    card = read_card(tmp_path / "model")
    assert (card.kind, card.source_weights_sha256) == ("recalibrated", found["weights"]["fused"])
    text = (tmp_path / "model" / "CARD.md").read_text()
    assert (
        "The fused model of round 1, with BatchNorm statistics of the training images of ash, exported by ash" in text
    )
    same = export.own_predictor(state)(squares())
    assert np.array_equal(of_bundle(tmp_path / "model")(squares()), same)


def test_the_fused_model_of_a_round_is_taken_in_the_form_that_is_better_here(state: Path) -> None:
    assert models.find_model(state, 1).kind == "fused"
    set_worth(state, own=0.9, again=0.8)
    assert models.find_model(state, 1).kind == "recalibrated"
    set_worth(state, own=0.9, again=0.3)
    assert models.find_model(state, 1).kind == "fused"


def test_who_predicts_with_a_recalibrated_model_is_told_what_takes_so_long(state: Path, tmp_path: Path) -> None:
    set_worth(state, again=0.8)
    image = next((tmp_path / "images").rglob("*.png"))
    done = run(state, "predict", str(image))
    assert done.exit_code == 0 and "measuring BatchNorm statistics" in done.stderr
    assert "measuring" not in done.stdout


# ------------------------------------------------------------------ tensors that stay at the hospital


@pytest.fixture
def private(tmp_path: Path, federation_of: FederationOf) -> Path:
    """As `state`, of FedBN: the fused file has no normalisation layers."""
    plan = PLAN.model_copy(update={"method": "fedbn"})
    state = finished_run(tmp_path, federation_of, plan)
    model = initial_model(plan.model_copy(update={"seed": 2}), method_of("fedbn"), None)
    own = write_weights(Layout(state).own(1), to_weights(model, all_tensors(model)))
    with Journal.create(Layout(state).journal) as journal, journal.transaction():
        journal.record_own(1, own, 0.5, 0.8)
        journal.set_meta("private", "1")
    return state


def test_a_fused_model_is_used_with_the_private_tensors_of_its_round(private: Path, tmp_path: Path) -> None:
    assert models.find_model(private, None).kind == "fused"
    export.export(private, tmp_path / "model")
    fused, own = (read_weights(f) for f in (Layout(private).fused(1), Layout(private).own(1)))
    out = read_weights(tmp_path / "model" / "model.safetensors")
    assert out.keys() == own.keys() > fused.keys()
    assert all(np.array_equal(out[name], fused.get(name, own[name])) for name in out)
    assert evaluate.evaluate(private)["kind"] == "fused"


@pytest.mark.parametrize("take", [evaluate.evaluate, export.own_predictor], ids=["evaluate", "export"])
def test_without_them_it_is_not_used_at_all(private: Path, take: Callable[..., Any]) -> None:
    """With the initial ones in their place it would be another model, and its figures somebody else's."""
    Layout(private).own(1).unlink()
    with pytest.raises(LocalStateError, match=r"its private tensors belong to a fused model that is kept\) is lost"):
        take(private)
    with Journal.create(Layout(private).journal) as journal:
        journal._write("DELETE FROM own", ())
    with pytest.raises(LocalStateError, match="round 1 that this hospital keeps to itself were lost"):
        take(private, round=1)
    with pytest.raises(UsageError, match="no fused model has been validated here yet"):
        take(private)


# ------------------------------------------------------------------ made of everybody's checkpoints


@pytest.mark.parametrize("method", ["metafed", "feddps"])
@pytest.mark.parametrize("harm", ["", "gone", "altered"])
def test_a_model_that_is_made_of_everybodys_checkpoints_needs_them_whole(
    tmp_path: Path, federation_of: FederationOf, method: str, harm: str
) -> None:
    """FedDpS reads them in training alone."""
    state = finished_run(tmp_path, federation_of, PLAN.model_copy(update={"method": method}))
    layout = Layout(state)
    with Journal.create(layout.journal) as journal, journal.transaction():
        for peer in ("ash", "birch"):
            path = layout.checkpoint(1, peer, "ash")
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(layout.own(1).read_bytes())
            content = {"bytes": 9, "samples": 3, "said": {"able": 1.0}, "score": 0.5}
            journal.record_manifest(Round(1), Peer(peer), sha256_of(path), b"", content)
    if harm == "gone":
        path.unlink()
    elif harm == "altered":
        path.write_bytes(layout.fused(1).read_bytes())
    if harm and method == "metafed":
        with pytest.raises(UsageError, match="round 1, and one is deleted by now, lost or altered") as refused:
            export.own_predictor(state)
        assert "without --round" not in str(refused.value.remedy)
    else:
        assert export.own_predictor(state)(squares()).shape == (5, 2)
