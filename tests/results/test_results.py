"""evaluate, predict, export on a real state directory: scored once, and exactly the model that is named."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from federations import FederationOf
from finished_run import PLAN, finished_run, set_phase
from pictures import write_folders
from PIL import Image
from typer.testing import CliRunner

from hsl_node.admin import enrol
from hsl_node.commands.app import app
from hsl_node.errors import DataError, FederationMismatch, LocalStateError, UsageError
from hsl_node.federation.names import Digest
from hsl_node.host.layout import Layout
from hsl_node.host.terminal import print_json
from hsl_node.results import evaluate, measuring, models, predict, words
from hsl_node.results.evaluate import Asked
from hsl_node.sync.round import Phase
from hsl_node.sync.store.journal import Journal
from hsl_node.train.methods import METHODS
from hsl_node.train.site import initial_weights
from hsl_node.weights.checkpoint_file import read_weights
from hsl_node.weights.whole import sha256_of


@pytest.fixture
def state(tmp_path: Path, federation_of: FederationOf) -> Path:
    return finished_run(tmp_path, federation_of)


def recorded(state: Path) -> dict[str, object]:
    with Journal.read_only(Layout(state).journal) as journal:
        found = journal.result(evaluate.EVALUATION)
    assert found is not None
    return found


def test_evaluation_names_the_files_it_scored_and_is_recorded(state: Path) -> None:
    found = evaluate.evaluate(state)
    assert found == recorded(state)
    assert (found["evaluated"], found["final"], found["round"]) == (1, True, 1)
    layout = Layout(state)
    assert found["weights"] == {"fused": sha256_of(layout.fused(1)), "local": sha256_of(layout.outbox(1))}
    assert found["test"]["fused"] != found["test"]["local"]  # two models, two scores
    for scores in found["test"].values():
        assert scores["images"] == found["images"]["test"] == sum(map(sum, scores["confusion"]))


def test_second_call_shows_the_record_and_scores_nothing(state: Path) -> None:
    first = evaluate.evaluate(state)
    Layout(state).fused(1).unlink()  # nothing is left that could be scored
    assert evaluate.evaluate(state) == first


def test_measuring_again_is_counted_and_said(state: Path) -> None:
    first = evaluate.evaluate(state)
    again = evaluate.evaluate(state, again=True)
    assert again["evaluated"] == 2
    assert again["test"] == first["test"]
    assert "has been used 2 times" in words.evaluation_text(again)
    assert "times" not in words.evaluation_text(first)


def test_a_stored_result_is_said_to_be_stored_and_from_when(state: Path) -> None:
    first = evaluate.evaluate(state)
    before, after = first["at"] - 1, first["at"] + 1
    day = time.strftime("%Y-%m-%d %H:%M", time.localtime(first["at"]))
    assert f"The stored result of {day}" in words.evaluation_text(first, asked=after)
    assert "stored" not in words.evaluation_text(first, asked=before)
    shown = CliRunner().invoke(app, ["--state", str(state), "evaluate"])
    assert shown.exit_code == 0 and f"The stored result of {day}" in shown.stdout


def test_what_a_record_lacks_is_added_without_scoring_the_rest_again(state: Path) -> None:
    """The fused model's file is gone: only the model trained alone can have been scored now."""
    first = evaluate.evaluate(state)
    Layout(state).fused(1).unlink()
    found = evaluate.evaluate(state, asked=Asked(alone=True))
    assert found["evaluated"] == 1
    assert found["test"]["fused"] == first["test"]["fused"]
    assert found["weights"]["alone"] == sha256_of(state / "trainer" / "alone.safetensors")
    assert "trained alone" in words.evaluation_text(found)
    assert evaluate.evaluate(state, again=False) == found


def test_unfinished_run_leaves_the_test_set_untouched(state: Path) -> None:
    set_phase(state, Phase.TRAIN)
    with pytest.raises(UsageError, match="not over"):
        evaluate.evaluate(state)
    found = evaluate.evaluate(state, again=True)
    assert not found["final"]
    assert "before the run was over" in words.evaluation_text(found)


@pytest.mark.parametrize("harm", ["gone", "altered"])
def test_a_model_file_that_is_gone_or_altered_is_not_used_and_the_way_back_is_said(
    state: Path, tmp_path: Path, harm: str
) -> None:
    path = Layout(state).fused(1)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.unlink()
    if harm == "altered":
        path.write_bytes(content)
    how = {"gone": "is lost: .* is not there", "altered": "is altered: .* is not the file with sha256"}[harm]
    for use in (
        lambda: evaluate.evaluate(state),
        lambda: models.find_model(state, None),
        lambda: models.find_model(state, 1),
    ):
        with pytest.raises(LocalStateError, match=rf"round 1 \(.*the best on .*\) {how}") as caught:
            use()
        assert "`hsl-node start`" in caught.value.remedy
        assert f"tar -xf BACKUP -C {state} fused/r000001.safetensors" in caught.value.remedy


def test_predictions_are_probabilities_of_each_class_in_the_order_given(state: Path, tmp_path: Path) -> None:
    images = sorted((tmp_path / "images").rglob("*.png"))[:5]
    found = predict.predict(state, images)
    assert [Path(row["image"]) for row in found["images"]] == images
    for row in found["images"]:
        assert set(row["probabilities"]) == {"benign", "malignant"}
        assert sum(row["probabilities"].values()) == pytest.approx(1)
    backwards = predict.predict(state, images[::-1])
    assert [r["probabilities"] for r in backwards["images"]][::-1] == [
        {k: pytest.approx(v, abs=1e-6) for k, v in r["probabilities"].items()} for r in found["images"]
    ]
    (tmp_path / "out.csv").write_text("an earlier one, of mode 0644")
    predict.write_csv(found, tmp_path / "out.csv")
    assert (tmp_path / "out.csv").stat().st_mode & 0o777 == 0o600, "names of images may be names of patients"
    with open(tmp_path / "out.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert float(rows[2]["malignant"]) == pytest.approx(found["images"][2]["probabilities"]["malignant"], abs=1e-6)
    assert {r["model_sha256"] for r in rows} == {sha256_of(Layout(state).fused(1))}


def test_a_file_name_of_other_bytes_than_utf_8_is_told_in_every_output_alike(
    state: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the file, on a terminal, as JSON, and by `data check`: a scanner's M\\xfcller.png."""
    names = [os.fsencode(tmp_path) + name for name in (b"/M\xfcller.png", "/König.png".encode())]
    for name in names:
        shutil.copyfile(next((tmp_path / "images").rglob("*.png")), name)
    found = predict.predict(state, [Path(os.fsdecode(name)) for name in names])
    predict.write_csv(found, tmp_path / "out.csv")
    with open(tmp_path / "out.csv", newline="", encoding="utf-8") as file:
        assert [row["image"] for row in csv.DictReader(file)] == [
            f"{tmp_path}/M\\udcfcller.png",
            f"{tmp_path}/König.png",
        ]
    predict.write_csv(found, None)
    assert capsys.readouterr().out == (tmp_path / "out.csv").read_text(encoding="utf-8")
    print_json(found)
    assert f"{tmp_path}/M\\udcfcller.png" in capsys.readouterr().out


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_no_output_ends_at_a_name_that_the_terminal_has_no_letters_for(tmp_path: Path, encoding: str) -> None:
    folder = write_folders(tmp_path / "d", {"benign": 10, "malignant": 10})
    for name in (b"/benign/M\xfcller.png", "/benign/König.png".encode()):
        Path(os.fsdecode(os.fsencode(folder) + name)).write_text("no picture")
    command = [sys.executable, "-m", "hsl_node", "--state", str(tmp_path / "ash")]
    init = ["init", "--name", "ash", "--address", "127.0.0.1:9001", "--data", str(folder)]
    subprocess.run([*command, *init], check=True, capture_output=True)
    done = subprocess.run(
        [*command, "data", "check", "--classes", "benign,malignant", "--image-size", "16"],
        capture_output=True, env={**os.environ, "PYTHONIOENCODING": encoding}, timeout=120,
    )  # fmt: skip
    assert done.returncode == 78 and not done.stderr, done.stderr.decode()
    shown = done.stdout.decode(encoding)
    assert "benign/M\\udcfcller.png" in shown
    assert ("benign/König.png" if encoding == "utf-8" else "benign/K\\xf6nig.png") in shown


def test_unreadable_images_are_all_named_and_nothing_is_predicted(state: Path, tmp_path: Path) -> None:
    good = next((tmp_path / "images").rglob("*.png"))
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(DataError) as caught:
        predict.predict(state, [good, tmp_path / "text.png", tmp_path / "absent.png"])
    assert "text.png" in str(caught.value)
    assert "absent.png" in str(caught.value)
    assert good.name not in str(caught.value)


def test_colour_and_grey_copies_of_an_image_get_the_same_prediction(state: Path, tmp_path: Path) -> None:
    grey = next((tmp_path / "images").rglob("*.png"))
    with Image.open(grey) as image:
        image.convert("RGB").save(tmp_path / "colour.png")
    first, second = predict.predict(state, [grey, tmp_path / "colour.png"])["images"]
    assert first["probabilities"] == second["probabilities"]


def test_an_image_in_colour_is_predicted_beside_a_grey_one_as_alone(state: Path, tmp_path: Path) -> None:
    grey, stained = next((tmp_path / "images").rglob("*.png")), tmp_path / "stained.png"
    with Image.open(grey) as image:
        Image.merge("RGB", (image.convert("L"), image.convert("L").point(lambda v: 255 - v), image.convert("L"))).save(
            stained
        )
    beside = predict.predict(state, [grey, stained])["images"]
    (alone,) = predict.predict(state, [stained])["images"]
    assert alone["probabilities"] == beside[1]["probabilities"] != beside[0]["probabilities"]


def test_export_holds_the_weights_and_says_where_they_come_from(state: Path, tmp_path: Path) -> None:
    evaluate.evaluate(state)
    files, missing = predict.export(state, tmp_path / "model")
    assert {f.name for f in files} == {"model.safetensors", "model.json"}
    assert missing == ""  # ONNX was not asked for
    assert {oct(f.stat().st_mode & 0o777) for f in files} == {"0o600"}
    assert (tmp_path / "model").stat().st_mode & 0o777 == 0o700
    card = json.loads((tmp_path / "model" / "model.json").read_text())
    assert card["trained_by"] == "ash"
    assert card["source_weights_sha256"] == sha256_of(Layout(state).fused(1))
    assert card["test"]["images"] == evaluate.evaluate(state)["images"]["test"]
    exported, fused = read_weights(files[0]), read_weights(Layout(state).fused(1))
    assert exported.keys() == fused.keys()
    assert all((exported[n] == fused[n]).all() for n in fused)


def test_an_export_without_onnx_says_so_in_one_line_with_the_remedy(
    state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    done = CliRunner().invoke(app, ["--state", str(state), "export", "--out", str(tmp_path / "model"), "--onnx"])
    assert done.exit_code == 0 and len(done.stdout.splitlines()) == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("No ONNX file: onnx and onnxscript not installed: pip install 'hsl-node[onnx]'")


def test_round_that_is_not_kept_names_those_that_are(state: Path) -> None:
    with pytest.raises(UsageError, match="no fused model of round 7") as caught:
        models.find_model(state, 7)
    assert "rounds kept here: 1" in str(caught.value)


@pytest.mark.parametrize("phase", [Phase.FINISHED, Phase.HALTED])
def test_while_the_last_fused_model_is_to_be_validated_none_is_the_final_one(state: Path, phase: Phase) -> None:
    """It may be the best: else an earlier one would be measured, and the test set used again for the last."""
    digest, _ = initial_weights(
        state, PLAN.model_copy(update={"seed": 3}), METHODS[PLAN.method], Layout(state).fused(2)
    )
    with Journal.create(Layout(state).journal) as journal:
        journal.record_fused(2, digest)
        set_phase(state, phase)
        for take in (evaluate.evaluate, lambda s: models.find_model(s, None)):
            with pytest.raises(UsageError, match=r"last fused model \(round 2\) is still to be validated") as caught:
                take(state)
            assert 'no line "still to do"' in caught.value.remedy
        assert [models.find_model(state, r).round for r in (1, 2)] == [1, 2]
        early = evaluate.evaluate(state, again=True)
        assert (early["final"], early["round"]) == (False, 1)
        set_phase(state, Phase.TRAIN)
        assert models.find_model(state, None).round == 1, "in the midst of a run: the best so far"
        set_phase(state, phase)
        journal.record_validation(2, 0.9, 0.7)
    assert models.find_model(state, None).round == 2
    found = evaluate.evaluate(state)
    assert (found["final"], found["round"]) == (True, 2)


# ------------------------------------------------------------------ what happens while it measures, which takes minutes


def meanwhile(monkeypatch: pytest.MonkeyPatch, happens: Callable[[], object]) -> None:
    """Once, when the figures are there and not recorded yet."""
    measured = measuring.measured

    def then(*args: Any) -> Any:
        found = measured(*args)
        monkeypatch.setattr(measuring, "measured", measured)
        happens()
        return found

    monkeypatch.setattr(measuring, "measured", then)


def another_run(state: Path, federation: str | None, model: str) -> None:
    """As `federation join --replace` and a start leave it; federation None: before the start."""
    layout = Layout(state)
    enrol._set_aside(layout)
    if federation is not None:
        with Journal.create(layout.journal) as journal:
            journal.set_meta("federation", federation)
            journal.record_fused(1, Digest(model))
            journal.record_validation(1, 0.6, 0.7)
        set_phase(state, Phase.FINISHED)


@pytest.mark.parametrize(
    ("federation", "model"),
    [("b" * 64, "b" * 64), ("a" * 64, "b" * 64), ("b" * 64, "the same"), (None, "")],
    ids=["another federation", "another model", "the same model", "not started yet"],
)
def test_figures_of_one_run_are_never_recorded_in_the_journal_of_the_next(
    state: Path, monkeypatch: pytest.MonkeyPatch, federation: str | None, model: str
) -> None:
    with Journal.create(Layout(state).journal) as journal:
        journal.set_meta("federation", "a" * 64)
    model = sha256_of(Layout(state).fused(1)) if model == "the same" else model
    meanwhile(monkeypatch, lambda: another_run(state, federation, model))
    with pytest.raises(FederationMismatch, match="another run than when the evaluation began: nothing was recorded"):
        evaluate.evaluate(state)
    path = Layout(state).journal
    assert path.exists() == (federation is not None), "it makes no journal"
    if federation is not None:
        with Journal.read_only(path) as journal:
            assert journal.result(evaluate.EVALUATION) is None


def test_a_record_of_another_runs_model_is_not_shown(state: Path, tmp_path: Path) -> None:
    """As an earlier version may have left it: neither by evaluate, nor on the card of an export."""
    with Journal.create(Layout(state).journal) as journal:
        alien = {"evaluated": 3, "final": True, "round": 1, "weights": {"fused": "c" * 64, "local": "d" * 64}}
        journal.record_result(evaluate.EVALUATION, {**alien, "test": {"fused": {"auc": 1}, "local": {"auc": 1}}})
    predict.export(state, tmp_path / "model")
    assert json.loads((tmp_path / "model" / "model.json").read_text())["test"] is None
    found = evaluate.evaluate(state)
    assert (found["evaluated"], found["weights"]["fused"]) == (1, sha256_of(Layout(state).fused(1)))
    assert found == recorded(state)


def test_two_evaluations_at_once_are_two_and_both_sets_of_figures_stay(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meanwhile(monkeypatch, lambda: evaluate.evaluate(state, asked=Asked(pairing="random")))
    found = evaluate.evaluate(state)
    assert found == recorded(state)
    assert (found["evaluated"], set(found["test"])) == (2, {"fused", "local", "fused_random"})
    assert found["weights"].keys() == found["auc_validation"].keys() == found["test"].keys()


def test_what_is_added_while_another_measures_again_is_no_use_of_the_test_set_more(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate.evaluate(state)
    meanwhile(monkeypatch, lambda: evaluate.evaluate(state, again=True))
    found = evaluate.evaluate(state, asked=Asked(pairing="random"))
    assert (found["evaluated"], set(found["test"])) == (2, {"fused", "local", "fused_random"})


def test_what_was_measured_before_the_end_is_measured_anew_after_it(state: Path) -> None:
    """The final model is another one by then; until the end the stored record is shown."""
    set_phase(state, Phase.TRAIN)
    first = evaluate.evaluate(state, again=True)
    digest, _ = initial_weights(
        state, PLAN.model_copy(update={"seed": 3}), METHODS[PLAN.method], Layout(state).fused(2)
    )
    with Journal.create(Layout(state).journal) as journal:
        journal.record_fused(2, digest)
        journal.record_validation(2, 0.9, 0.7)
    assert evaluate.evaluate(state) == first
    set_phase(state, Phase.FINISHED)
    found = evaluate.evaluate(state)
    assert (found["evaluated"], found["final"], found["weights"]["fused"]) == (2, True, digest)
