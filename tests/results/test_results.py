"""evaluate on a real state directory: scored once, and exactly the model that is named."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from federations import FederationOf
from finished_run import PLAN, finished_run, set_phase
from typer.testing import CliRunner

from hsl_node.admin import enrol
from hsl_node.commands.app import app
from hsl_node.errors import FederationMismatch, LocalStateError, UsageError
from hsl_node.federation.names import Digest
from hsl_node.host.layout import Layout
from hsl_node.results import evaluate, export, measuring, models, words
from hsl_node.results.evaluate import Wish
from hsl_node.sync.round import Phase
from hsl_node.sync.store.journal import Journal
from hsl_node.train.alone import find_alone
from hsl_node.train.methods import method_of
from hsl_node.train.site import initial_weights
from hsl_node.weights.whole import sha256_of


@pytest.fixture
def state(tmp_path: Path, federation_of: FederationOf) -> Path:
    return finished_run(tmp_path, federation_of)


def text_of(state: Path, record: dict[str, Any], asked: float | None = None) -> str:
    return words.evaluation_text(record, evaluate.statistics(state, record), asked=asked)


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
    assert found["weights"] == {"fused": sha256_of(layout.fused(1)), "local": sha256_of(layout.own(1))}
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
    assert "has been used 2 times" in text_of(state, again)
    assert "times" not in text_of(state, first)


def test_a_stored_result_is_said_to_be_stored_and_from_when(state: Path) -> None:
    first = evaluate.evaluate(state)
    before, after = first["at"] - 1, first["at"] + 1
    day = time.strftime("%Y-%m-%d %H:%M", time.localtime(first["at"]))
    assert f"The stored result of {day}" in text_of(state, first, asked=after)
    assert "stored" not in text_of(state, first, asked=before)
    shown = CliRunner().invoke(app, ["--state", str(state), "evaluate"])
    assert shown.exit_code == 0 and f"The stored result of {day}" in shown.stdout


def test_what_a_record_lacks_is_added_without_scoring_the_rest_again(state: Path) -> None:
    """The fused model's file is gone: only the model trained alone can have been scored now."""
    first = evaluate.evaluate(state)
    Layout(state).fused(1).unlink()
    found = evaluate.evaluate(state, asked=Wish(alone=True))
    assert found["evaluated"] == 1
    assert found["test"]["fused"] == first["test"]["fused"]
    assert found["weights"]["alone"] == sha256_of(state / "trainer" / "alone.safetensors")
    assert "trained alone" in text_of(state, found)
    assert evaluate.evaluate(state, again=False) == found


def test_the_model_alone_trains_as_long_as_the_run_did_not_as_long_as_planned(
    tmp_path: Path, federation_of: FederationOf
) -> None:
    """Planned were four rounds, and after one the run ended on a plateau."""
    state = finished_run(tmp_path, federation_of, PLAN.model_copy(update={"rounds": 4}))
    events: list[dict[str, Any]] = []
    evaluate.evaluate(state, asked=Wish(alone=True), report=events.append)
    alone = find_alone(state)
    assert alone is not None and alone.epochs == PLAN.epochs_per_round
    assert [e["epoch"] for e in events if e["event"] == "epoch"] == list(range(1, PLAN.epochs_per_round + 1))


def test_unfinished_run_leaves_the_test_set_untouched(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_phase(state, Phase.TRAIN)
    with monkeypatch.context() as before_any, pytest.raises(UsageError, match="not over") as early:
        before_any.setattr(Journal, "best_model", lambda journal, *kinds: None)
        evaluate.evaluate(state)
    assert "--again" not in early.value.remedy, "there is no model that it could measure"
    with pytest.raises(UsageError, match="not over"):
        evaluate.evaluate(state)
    found = evaluate.evaluate(state, again=True)
    assert not found["final"]
    assert "before the run was over" in text_of(state, found)


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


def test_round_that_is_not_kept_names_those_that_are(state: Path) -> None:
    with pytest.raises(UsageError, match="no fused model of round 7") as caught:
        models.find_model(state, 7)
    assert "rounds kept here: 1" in str(caught.value)


@pytest.mark.parametrize("phase", [Phase.FINISHED, Phase.HALTED])
def test_while_the_last_fused_model_is_to_be_validated_none_is_the_final_one(state: Path, phase: Phase) -> None:
    """It may be the best: else an earlier one would be measured, and the test set used again for the last."""
    digest, _ = initial_weights(
        state, PLAN.model_copy(update={"seed": 3}), method_of(PLAN.method), Layout(state).fused(2)
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
    """As a run before may have left it: neither by evaluate, nor on the card of an export."""
    with Journal.create(Layout(state).journal) as journal:
        alien = {
            "evaluated": 3,
            "final": True,
            "kind": "fused",
            "round": 1,
            "weights": {"fused": "c" * 64, "local": "d" * 64},
        }
        journal.record_result(evaluate.EVALUATION, {**alien, "test": {"fused": {"auc": 1}, "local": {"auc": 1}}})
    export.export(state, tmp_path / "model")
    assert json.loads((tmp_path / "model" / "model.json").read_text())["test"] is None
    found = evaluate.evaluate(state)
    assert (found["evaluated"], found["weights"]["fused"]) == (1, sha256_of(Layout(state).fused(1)))
    assert found == recorded(state)


def test_two_evaluations_at_once_are_two_and_both_sets_of_figures_stay(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meanwhile(monkeypatch, lambda: evaluate.evaluate(state, asked=Wish(pairing="random")))
    found = evaluate.evaluate(state)
    assert found == recorded(state)
    assert (found["evaluated"], set(found["test"])) == (2, {"fused", "local", "fused_random"})
    assert found["weights"].keys() == found["auc_validation"].keys() == found["test"].keys()


def test_what_is_added_while_another_measures_again_is_no_use_of_the_test_set_more(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate.evaluate(state)
    meanwhile(monkeypatch, lambda: evaluate.evaluate(state, again=True))
    found = evaluate.evaluate(state, asked=Wish(pairing="random"))
    assert (found["evaluated"], set(found["test"])) == (2, {"fused", "local", "fused_random"})


def test_what_was_measured_before_the_end_is_measured_anew_after_it(state: Path) -> None:
    """The final model is another one by then; until the end the stored record is shown."""
    set_phase(state, Phase.TRAIN)
    first = evaluate.evaluate(state, again=True)
    digest, _ = initial_weights(
        state, PLAN.model_copy(update={"seed": 3}), method_of(PLAN.method), Layout(state).fused(2)
    )
    with Journal.create(Layout(state).journal) as journal:
        journal.record_fused(2, digest)
        journal.record_validation(2, 0.9, 0.7)
    assert evaluate.evaluate(state) == first
    set_phase(state, Phase.FINISHED)
    found = evaluate.evaluate(state)
    assert (found["evaluated"], found["final"], found["weights"]["fused"]) == (2, True, digest)
