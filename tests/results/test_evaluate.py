"""Intervals, thresholds, scores for each image, other rounds and other images: what `evaluate` keeps and says."""

from __future__ import annotations

import csv
import json
import shutil
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federations import FederationOf
from finished_run import PLAN, finished_run, set_phase
from pictures import write_dicom
from sklearn.metrics import roc_auc_score
from typer.testing import CliRunner

from hsl_node.admin import enrol
from hsl_node.commands.app import app
from hsl_node.errors import DataError, LocalStateError, UsageError
from hsl_node.host.layout import Layout
from hsl_node.host.units import as_csv
from hsl_node.results import evaluate, words
from hsl_node.results.evaluate import Wish
from hsl_node.sync.round import Phase
from hsl_node.sync.store.journal import Journal
from hsl_node.train.data.patients import patient_keys
from hsl_node.train.methods import method_of
from hsl_node.train.site import initial_weights
from hsl_node.weights.whole import sha256_of


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory, federation_of: FederationOf) -> Path:
    """80 patients, so that the test set has more than ten of each class. Not to be changed."""
    return finished_run(tmp_path_factory.mktemp("many"), federation_of, patients=80)


@pytest.fixture
def state(tmp_path: Path, many: Path) -> Path:
    shutil.copytree(many.parent, tmp_path / "run")
    state = tmp_path / "run" / many.name
    toml = (state / "node.toml").read_text().replace(str(many.parent), str(tmp_path / "run"))
    (state / "node.toml").write_text(toml)
    return state


def run(state: Path, *arguments: str) -> Any:
    return CliRunner().invoke(app, ["--state", str(state), "evaluate", *arguments])


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def another_round(state: Path, round: int, auc: float = 0.5) -> str:
    plan = PLAN.model_copy(update={"seed": 10 + round})
    digest, _ = initial_weights(state, plan, method_of(PLAN.method), Layout(state).fused(round))
    with Journal.create(Layout(state).journal) as journal:
        journal.record_fused(round, digest)
        journal.record_validation(round, auc, 0.7)
    return digest


# ------------------------------------------------------------------ how sure, and better or not


def test_figures_come_with_intervals_over_patients_and_with_a_verdict(state: Path) -> None:
    found = evaluate.evaluate(state)
    said = evaluate.statistics(state, found)
    assert said is not None and not said.too_few
    assert said.patients == found["patients"]["test"] < found["images"]["test"] == said.images
    assert set(said.models) == {"fused", "local"}
    for kind, model in said.models.items():
        assert model.auc.value == pytest.approx(found["test"][kind]["auc"])
        assert model.auc.low is not None and model.auc.low < model.auc.value < (model.auc.high or 0)
    pair = said.find("fused", "local")
    assert pair is not None and pair.p is not None
    text = words.evaluation_text(found, said)
    assert f"over {said.patients} patients" in text
    assert f"{found['images']['test']} test images of {said.patients} patients" in text
    assert "split by patient" in text
    assert "At this hospital the fused model is" in text and "its own of the last round: AUC" in text


def test_two_calls_give_the_same_bytes(state: Path) -> None:
    first, second = run(state, "--json"), run(state, "--json")
    assert first.exit_code == second.exit_code == 0
    assert first.stdout == second.stdout
    assert json.loads(first.stdout)["statistics"]["comparisons"][0]["model"] == "fused"


def test_six_test_images_are_too_few_to_say(tmp_path: Path, federation_of: FederationOf) -> None:
    found = evaluate.evaluate(small := finished_run(tmp_path, federation_of))
    said = evaluate.statistics(small, found)
    assert said is not None and "at least 10 of each class are needed" in said.too_few
    text = words.evaluation_text(found, said)
    assert "Too few to say how sure the figures are (patients: " in text
    assert "whether the fused model is better than its own of the last round cannot be said: too few" in text
    assert "+0." not in text and "(0." not in text


def test_without_known_patients_the_intervals_are_by_image_and_that_is_said(state: Path) -> None:
    table = state.parent / "images" / "metadata.csv"
    lines = [line.rsplit(",", 1)[0] for line in table.read_text().splitlines()]
    table.write_text("\n".join(lines) + "\n")
    (state / "splits.json").unlink(missing_ok=True)
    found = evaluate.evaluate(state)
    said = evaluate.statistics(state, found)
    assert said is not None and said.patients is None
    text = words.evaluation_text(found, said)
    assert "split by image: no patient is known" in text
    assert f"over {said.images} images, by image: no patient is known" in text


def test_images_that_are_grouped_by_their_study_are_not_said_to_be_split_by_patient(state: Path) -> None:
    from PIL import Image

    table = state.parent / "images" / "metadata.csv"
    rows = rows_of(table)
    for n, row in enumerate(rows):
        path = state.parent / "images" / row["path"]
        with Image.open(path) as picture:
            pixels = np.asarray(picture.convert("L"))
        write_dicom(path, pixels, PatientID="", StudyInstanceUID=f"1.2.{n // 2}")
    table.write_text("\n".join(["path,label", *(f"{row['path']},{row['label']}" for row in rows)]) + "\n")
    (state / "splits.json").unlink(missing_ok=True)
    found = evaluate.evaluate(state)
    assert (found["by_study"], found["without_patient"]) == (len(rows), 0)
    text = words.evaluation_text(found, evaluate.statistics(state, found))
    assert f"\n{len(rows)} images without a known patient by their DICOM study, so two studies of one patient" in text
    assert "split by patient" not in text
    some = {**found, "by_study": len(rows) - 9, "without_patient": 5}
    assert words.split_by(some).startswith(
        f"split by patient; {len(rows) - 9} images"
    ) and "; 5 images" in words.split_by(some)


# ------------------------------------------------------------------ the threshold


def test_the_threshold_is_chosen_on_validation_images_and_kept_with_its_rule(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hsl_node.train.tasks.metrics.CHOOSE_MIN", 3)
    found = evaluate.evaluate(state)
    limit = found["thresholds"]["fused"]
    assert limit["rule"].startswith("largest Youden's J on ") and limit["rule"].endswith("validation images")
    with Journal.read_only(Layout(state).journal) as journal:
        scores = journal.result(evaluate.scores_name(evaluate.EVALUATION))
    assert scores is not None
    assert np.float32(limit["value"]) in np.array(scores["validation"]["probabilities"]["fused"], np.float32)
    said = evaluate.statistics(state, found)
    assert said is not None
    labels, chances = np.array(scores["test"]["labels"]), np.array(scores["test"]["probabilities"]["fused"], np.float32)
    expected = np.mean(chances[labels == 1] >= np.float32(limit["value"]))
    assert said.models["fused"].sensitivity.value == pytest.approx(expected)
    assert f"* fused: from {limit['value']:.3f} on; largest Youden's J" in words.evaluation_text(found, said)


def test_a_sensitivity_of_three_classes_is_refused(tmp_path: Path, federation_of: FederationOf) -> None:
    three = finished_run(tmp_path, federation_of, PLAN.model_copy(update={"classes": ("a", "b", "c")}))
    with pytest.raises(UsageError, match="a threshold belongs to two classes, and the plan has 3"):
        evaluate.evaluate(three, asked=Wish(sensitivity=0.9))


def test_another_wish_for_the_threshold_is_no_use_of_the_test_set(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hsl_node.train.tasks.metrics.CHOOSE_MIN", 3)
    evaluate.evaluate(state)
    Layout(state).fused(1).unlink()  # nothing is left that could be scored
    found = evaluate.evaluate(state, asked=Wish(sensitivity=0.9))
    assert found["evaluated"] == 1
    assert "sensitivity of at least 0.9" in found["thresholds"]["fused"]["rule"]
    assert evaluate.evaluate(state) == found, "it stays"


# ------------------------------------------------------------------ scores


def test_scores_are_written_for_each_image_and_model_privately_and_give_the_auc(state: Path) -> None:
    out = state.parent / "scores.csv"
    assert run(state, "--scores", str(out)).exit_code == 0
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    rows, found = rows_of(out), evaluate.evaluate(state)
    counts = found["images"]
    assert len(rows) == 2 * (counts["test"] + counts["validation"])
    assert {(r["split"], r["model"]) for r in rows} == {
        (s, m) for s in ("validation", "test") for m in ("fused", "own, last round")
    }
    test = [r for r in rows if (r["split"], r["model"]) == ("test", "fused")]
    assert roc_auc_score([r["label"] == "malignant" for r in test], [float(r["p_malignant"]) for r in test]) == (
        pytest.approx(found["test"]["fused"]["auc"])
    )
    assert {r["model_sha256"] for r in test} == {found["weights"]["fused"]}
    table = {r["path"]: r["patient"] for r in rows_of(state.parent / "images" / "metadata.csv")}
    assert all(table[r["image"]] == r["patient"] for r in rows)
    assert all(float(r["p_benign"]) + float(r["p_malignant"]) == pytest.approx(1) for r in rows)


def test_a_patient_is_one_word_in_the_scores_and_an_unknown_one_is_none(state: Path) -> None:
    """Who counts anew from the file gets the intervals that are shown: by patient, and by image where none is known."""
    table, out = state.parent / "images" / "metadata.csv", state.parent / "scores.csv"
    rows = rows_of(table)
    patients = {row["patient"]: f"{n}" for n, row in enumerate(rows)}
    for n, row in enumerate(rows):
        row["patient"] = "unknown" if n < 9 else patients[row["patient"]] + ".0" * (n % 2)
    table.write_text("\n".join([",".join(rows[0]), *(",".join(row.values()) for row in rows)]) + "\n")
    (state / "splits.json").unlink(missing_ok=True)
    assert run(state, "--scores", str(out)).exit_code == 0
    with Journal.read_only(Layout(state).journal) as journal:
        scores = evaluate.find_scores(journal, evaluate.find_evaluation(journal) or {})
    assert scores is not None
    known = {p for part in scores.values() for p in part["patients"] if p}
    words_ = {r["patient"] for r in rows_of(out)}
    assert "unknown" not in words_ and "" in words_ and len(words_ - {""}) == len(known)


def test_scores_are_written_of_the_stored_evaluation_which_stays_used_once(state: Path) -> None:
    found = evaluate.evaluate(state)
    Layout(state).fused(1).unlink()
    assert run(state, "--scores", str(state.parent / "s.csv")).exit_code == 0
    assert evaluate.evaluate(state) == found and found["evaluated"] == 1


@pytest.mark.parametrize("cell", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1"])
def test_a_cell_that_a_spreadsheet_would_run_is_text(cell: str) -> None:
    assert as_csv([(cell, f"a{cell}", "")]) == f"'{cell},a{cell},\n"


# ------------------------------------------------------------------ other rounds


def test_a_round_that_is_named_is_measured_and_counts_as_a_use(state: Path) -> None:
    digest = another_round(state, 2)
    best = evaluate.evaluate(state)
    found = evaluate.evaluate(state, round=2)
    assert (best["round"], found["round"], found["weights"]["fused"]) == (1, 2, digest)
    assert [(u["round"], u["images"], u["earlier_run"]) for u in found["used_before"]] == [
        (1, found["images"]["test"], False)
    ]
    text = words.evaluation_text(found, evaluate.statistics(state, found))
    assert "The test set has been used 2 times" in text
    assert f"{found['images']['test']} of these images, in this run, with the fused model of round 1" in text
    assert evaluate.evaluate(state) == best and evaluate.evaluate(state, round=2) == found


def test_where_the_best_model_is_lost_another_round_is_the_way_out(state: Path) -> None:
    another_round(state, 2)
    Layout(state).fused(1).unlink()
    with pytest.raises(LocalStateError) as caught:
        evaluate.evaluate(state)
    assert "`--round N` of `hsl-node evaluate`" in caught.value.remedy
    done = run(state, "--round", "2")
    assert done.exit_code == 0 and "fused model of round 2" in done.stdout
    with pytest.raises(UsageError, match="no fused model of round 3"):
        evaluate.evaluate(state, round=3)


# ------------------------------------------------------------------ the same test set, again


def test_a_test_set_that_an_earlier_run_used_is_said_to_be_used_with_the_day(state: Path) -> None:
    first = evaluate.evaluate(state)
    fused, config = Layout(state).fused(1).read_bytes(), Layout(state).federation_toml.read_bytes()
    enrol._set_aside(Layout(state))  # as `federation join --replace`
    Layout(state).federation_toml.write_bytes(config)
    Layout(state).fused(1).write_bytes(fused)
    with Journal.create(Layout(state).journal) as journal:
        journal.record_fused(1, sha256_of(Layout(state).fused(1)))
        journal.record_validation(1, 0.6, 0.7)
    set_phase(state, Phase.FINISHED)
    found = evaluate.evaluate(state)
    assert found["evaluated"] == 1 and found["test_set"] == first["test_set"]
    (use,) = found["used_before"]
    assert (use["images"], use["earlier_run"], use["times"]) == (first["images"]["test"], True, 1)
    text = words.evaluation_text(found, evaluate.statistics(state, found))
    assert "The test set has been used 2 times" in text
    assert f"in an earlier run, with the fused model of round 1, last on {words.day(first['at'])}" in text


def test_models_measured_on_another_test_set_are_not_compared(state: Path) -> None:
    evaluate.evaluate(state)
    table = state.parent / "images" / "metadata.csv"
    lines = table.read_text().splitlines()
    table.write_text("\n".join(lines[:-20]) + "\n")
    with pytest.raises(UsageError, match="the test set is another one than when the other models were measured"):
        evaluate.evaluate(state, asked=Wish(pairing="random"))
    again = evaluate.evaluate(state, again=True, asked=Wish(pairing="random"))
    assert {m["images"] for m in again["test"].values()} == {again["images"]["test"]}


def test_test_images_that_were_trained_on_are_refused_not_measured(state: Path) -> None:
    """The table's split is given after the run: of its test images some had been trained on."""
    evaluate.evaluate(state)
    table = state.parent / "images" / "metadata.csv"
    lines = table.read_text().splitlines()
    patients = sorted({line.split(",")[2] for line in lines[1:]})
    side = {patient: ("train", "val", "test")[n % 3] for n, patient in enumerate(patients)}
    given = [f"{line},{side[line.split(',')[2]]}" for line in lines[1:]]
    table.write_text("\n".join([f"{lines[0]},split", *given]) + "\n")
    with pytest.raises(DataError, match=r"it would move .* 22 images from train to test"):
        evaluate.evaluate(state, again=True)
    assert evaluate.evaluate(state)["evaluated"] == 1


# ------------------------------------------------------------------ images from elsewhere


def external(state: Path, keep: slice, header: str = "path,label,patient") -> Path:
    """A table of other images: those of the same pictures, moved in their brightest pixel, of other patients."""
    from PIL import Image

    folder = state.parent / "elsewhere"
    folder.mkdir()
    lines = [header]
    for n, row in enumerate(rows_of(state.parent / "images" / "metadata.csv")[keep]):
        with Image.open(state.parent / "images" / row["path"]) as image:
            changed = image.convert("L").point(lambda v: min(255, v + 1))
            changed.save(folder / f"{n}.png")
        lines.append(f"{n}.png,{row['label']},x{n // 2}")
    (folder / "table.csv").write_text("\n".join(lines) + "\n")
    return folder / "table.csv"


def test_an_external_set_is_measured_and_never_counted_as_the_test_set(state: Path) -> None:
    table = external(state, slice(40), "file,dx,who")
    columns = [part for key in ("path=file", "label=dx", "patient=who") for part in ("--column", key)]
    out = state.parent / "external.csv"
    done = run(state, "--data", str(table), *columns, "--scores", str(out))
    assert done.exit_code == 0, done.stdout + str(done.exception)
    assert "40 external images of 20 patients" in done.stdout and "external set" in done.stdout
    assert "split by" not in done.stdout  # these never were
    assert {r["split"] for r in rows_of(out)} == {"validation", "external"}
    assert sum(r["image"] == "7.png" for r in rows_of(out)) == 2  # fused and own
    with Journal.read_only(Layout(state).journal) as journal:
        assert evaluate.find_evaluation(journal) is None
        (name,) = evaluate.find_evaluations(journal)
    assert name.startswith("evaluation of set ")
    found = evaluate.evaluate(state)
    assert (found["evaluated"], found["used_before"]) == (1, [])
    wrong = run(state, "--data", str(table), "--column", "path=nothing").exception
    assert isinstance(wrong, DataError) and "name it with --column path=..." in wrong.remedy
    assert isinstance(run(state, "--column", "path=file").exception, UsageError)


def test_an_external_image_that_cannot_be_read_is_named(state: Path) -> None:
    table = external(state, slice(20))
    (table.parent / "3.png").write_text("no picture")
    with pytest.raises(DataError, match=r"1 of 20 images cannot be read\n3\.png: "):
        evaluate.evaluate_external(state, evaluate.source_of(state, table, {}))


def test_an_external_set_is_decided_by_the_threshold_that_this_model_gives_away(state: Path) -> None:
    table = evaluate.source_of(state, external(state, slice(20)), {})
    evaluate.evaluate(state, asked=evaluate.Wish(sensitivity=0.9))
    assert evaluate.evaluate_external(state, table)["sensitivity"] == 0.9
    asked = evaluate.Wish(sensitivity=0.8)
    assert evaluate.evaluate_external(state, table, asked=asked)["sensitivity"] == 0.8
    assert evaluate.evaluate(state)["sensitivity"] == 0.9


def test_own_images_and_patients_that_were_learned_from_are_left_out_of_an_external_set_and_counted(
    state: Path,
) -> None:
    """20 images from elsewhere, 12 of them of patients known here, beside all of this site's own, its test set too."""
    table, own = external(state, slice(20)), rows_of(state.parent / "images" / "metadata.csv")
    images = evaluate.evaluate(state)["images"]
    with Journal.read_only(Layout(state).journal) as journal:
        scores = evaluate.find_scores(journal, evaluate.find_evaluation(journal) or {})
    assert scores is not None
    tested = [row["patient"] for row in own if patient_keys(row["patient"])[0] in scores["test"]["patients"]]
    learned = [row["patient"] for row in own if row["patient"] not in tested]
    lines = table.read_text().splitlines()
    for n, patient in enumerate([tested[0]] * 4 + [learned[0]] * 8, 1):
        lines[n] = ",".join([*lines[n].split(",")[:2], patient])
    lines += [f"../images/{row['path']},{row['label']},{row['patient']}" for row in own]
    table.write_text("\n".join(lines) + "\n")
    found = evaluate.evaluate_external(state, evaluate.source_of(state, table, {}))
    left = len(own) + 8
    assert (found["external"]["left_out"], found["test"]["fused"]["images"]) == (left, 12)
    assert found["images"]["test"] == 12 and found["patients"]["test"] == 5
    text = words.evaluation_text(found, evaluate.statistics(state, found))
    assert f"Left out: {left} images of this site's own, or of patients that it trained or validated on." in text
    assert images["test"] > 0 and evaluate.evaluate(state)["evaluated"] == 1


@pytest.mark.parametrize("part", ["validation", "test"])
def test_an_external_set_of_nothing_but_own_images_is_refused(state: Path, part: str) -> None:
    out = state.parent / "scores.csv"
    run(state, "--scores", str(out))
    chosen = {r["image"] for r in rows_of(out) if r["split"] == part}
    own = state.parent / "images" / "metadata.csv"
    lines = own.read_text().splitlines()
    kept = [lines[0], *(line for line in lines[1:] if line.split(",")[0] in chosen)]
    (own.parent / "chosen.csv").write_text("\n".join(kept) + "\n")
    with pytest.raises(UsageError, match=f"all {len(chosen)} images there are this site's own"):
        evaluate.evaluate_external(state, evaluate.source_of(state, own.parent / "chosen.csv", {}))
