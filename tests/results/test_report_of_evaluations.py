"""What the report says of test figures: bold for the better model, words where fusing did not help, nothing that is
not there; and how far a run has come."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federations import FederationOf, Members
from trained_state import evaluation, make_state

from hsl_node.demo import demo
from hsl_node.federation.names import Digest
from hsl_node.federation.plan import Plan
from hsl_node.host.layout import Layout
from hsl_node.results import evaluate, report
from hsl_node.results.facts import agreement, read
from hsl_node.sync.store.journal import Journal
from hsl_node.train.tasks.metrics import measure

GOOD, POOR = 1.5, 0.0  # how much a model's scores tell of the label


@pytest.fixture(scope="module")
def members(federation_of: FederationOf) -> Members:
    return federation_of(3, plan=Plan(method="fedavg", rounds=60, classes=("no", "yes")))


def state_with(
    root: Path,
    members: Members,
    *,
    classes: Sequence[str] = ("no", "yes"),
    images: int = 120,
    name: str = evaluate.EVALUATION,
    changes: dict[str, Any] | None = None,
    **models: float,
) -> Path:
    """A node after two rounds with an evaluation as it is recorded: each model's scores tell so much of the label."""
    rng, labels = np.random.default_rng(1), np.arange(images) % len(classes)
    draws = {kind: rng.normal(size=(images, len(classes))) for kind in sorted(models)}
    logits = {kind: draw + models[kind] * np.eye(len(classes))[labels] for kind, draw in draws.items()}
    chances = {kind: np.exp(x) / np.exp(x).sum(axis=1, keepdims=True) for kind, x in logits.items()}
    found = {k: (p[:, 1] if len(classes) == 2 else p).astype(np.float32) for k, p in chances.items()}
    part = {
        "ids": [f"{n:064x}" for n in range(images)],
        "patients": [f"p{n}" for n in range(images)],
        "labels": labels.tolist(),
        "probabilities": {kind: values.tolist() for kind, values in found.items()},
        "log_odds": {kind: np.log(values / (1 - values)).tolist() for kind, values in found.items()},
    }
    record = {
        **evaluation(0.9, None, classes=tuple(classes)),  # type: ignore[arg-type]
        "name": name,
        "images": {"train": 30, "validation": 5, "test": images},
        "patients": {"train": 20, "validation": 4, "test": images},
        "without_patient": 0,
        "by_study": 0,
        "weights": {"fused": "2" * 64, "local": "3" * 64, "alone": "a" * 64},
        "test": {kind: asdict(measure(labels, values)) for kind, values in found.items()},
        "thresholds": {k: {"value": 0.25, "rule": "largest Youden's J"} for k, p in found.items() if p.ndim == 1},
        "machine": {"threads": 4, "device": "cpu", "precision": "bfloat16", "processor": "Abacus 3000"},
        "used_before": [],
        **(changes or {}),
    }
    state = make_state(root, members, "ash")
    with Journal.create(Layout(state).journal) as journal:
        journal.record_result(name, record)
        journal.record_result(evaluate.scores_name(name), {"validation": {**part}, "test": part})
    return state


def page_of(*states: Path) -> str:
    return report.build(states, states[0].parent / "report.html").read_text(encoding="utf-8")


def words_of(page: str) -> str:
    """Without marks and pictures."""
    page = re.sub(r"<(style|svg).*?</\1>", " ", page, flags=re.S)
    return " ".join(re.sub(r"<[^>]*>", " ", page).replace("&#39;", "'").split())


def bold(page: str) -> list[str]:
    return [
        words_of(row).split(" 0.")[0].replace("ash 30 120 ", "")
        for row in re.findall(r'<tr class="main">.*?</tr>', page, re.S)
    ]


# ------------------------------------------------------------------ which model is better


@pytest.mark.parametrize(
    ("models", "expected"),
    [
        ({"fused": GOOD, "alone": POOR}, ["fused, round 2"]),
        ({"fused": POOR, "alone": GOOD}, ["trained alone"]),
        ({"fused": GOOD, "alone": GOOD}, []),
        ({"fused": GOOD, "alone": POOR, "local": GOOD}, []),
        ({"fused": GOOD}, []),
    ],
    ids=["fused", "alone", "a tie", "a tie of two of three", "nothing to compare with"],
)
def test_the_better_model_is_bold_whoever_it_is_and_of_a_tie_none(
    tmp_path: Path, members: Members, models: dict[str, float], expected: list[str]
) -> None:
    assert bold(page_of(state_with(tmp_path, members, **models))) == expected


def test_the_report_says_in_words_where_fusing_did_not_help(tmp_path: Path, members: Members) -> None:
    text = words_of(page_of(state_with(tmp_path, members, fused=POOR, alone=GOOD, local=POOR)))
    found = re.search(
        r"At this hospital the fused model is not better but worse than the one trained alone: "
        r"AUC (−0\.\d{3}) \(95 % interval −0\.\d{3} to −0\.\d{3}, p < 0\.01\)\.",
        text.replace("&lt;", "<"),
    )
    assert found is not None
    assert "At this hospital the fused model is not shown to be better than its own of the last round: AUC" in text
    assert "120 test images of 120 patients (train 30 of 20, validation 5 of 4), split by patient." in text
    assert "95 % intervals: bootstrap (1000 resamples) over 120 patients." in text
    assert "* fused: from 0.250 on; largest Youden's J" in text


def test_too_few_images_get_words_instead_of_a_difference(tmp_path: Path, members: Members) -> None:
    page = page_of(state_with(tmp_path, members, images=6, fused=GOOD, alone=POOR))
    text = words_of(page)
    assert bold(page) == []
    assert "whether the fused model is better than the one trained alone cannot be said: too few to say" in text
    assert "3 of no, 3 of yes; at least 10 of each class are needed" in text
    assert "+0." not in text and "−0." not in text
    assert "Calibration" not in text, "no picture, no explanation of one"


def test_several_classes_have_a_row_each(tmp_path: Path, federation_of: FederationOf) -> None:
    members = federation_of(2, plan=Plan(method="fedavg", rounds=2, classes=("a", "b", "c")))
    text = words_of(page_of(state_with(tmp_path, members, classes=("a", "b", "c"), fused=GOOD, alone=POOR)))
    assert "Each class against the rest" in text
    assert re.search(r"b 40 fused 0\.\d{3} \(0\.\d{3} to 0\.\d{3}\)", text)
    assert "sensitivity*" not in text, "a threshold is of two classes"


def test_another_round_and_an_external_set_stand_beside_the_final_model(tmp_path: Path, members: Members) -> None:
    state_with(tmp_path, members, fused=GOOD)
    round_ = f"{evaluate.EVALUATION} of round 1"
    changes = {"round": 1, "rounds": {"fused": 1}, "weights": {"fused": "1" * 64}}
    state_with(tmp_path, members, fused=POOR, name=round_, changes=changes)
    elsewhere = {"external": {"left_out": 7}}
    state = state_with(tmp_path, members, fused=GOOD, name=f"{evaluate.EVALUATION} of set x", changes=elsewhere)
    facts = read(state)
    assert facts.evaluation is not None and facts.evaluation["round"] == 2
    assert facts.measured[0].record["name"] == evaluate.EVALUATION
    text = words_of(page_of(state))
    assert "fused, round 1" in text and "fused, round 2" in text
    assert "120 external images" in text and "Left out: 7 images" in text


def test_a_test_set_that_was_used_before_is_said_to_be(tmp_path: Path, members: Members) -> None:
    use = {"at": 0.0, "kind": "fused", "round": 5, "times": 2, "images": 118, "earlier_run": True}
    text = words_of(page_of(state_with(tmp_path, members, fused=GOOD, changes={"used_before": [use]})))
    assert "The test set has been used 3 times: the figures lean towards it." in text
    assert (
        "Before: 118 of these images, in an earlier run, with the fused model of round 5, last on 1970-01-01, 2 times."
        in text
    )


# ------------------------------------------------------------------ nothing that is not there


def test_no_legend_for_a_model_that_was_not_measured_and_a_hint_how_to_get_it(tmp_path: Path, members: Members) -> None:
    text = words_of(page_of(state_with(tmp_path / "a", members, fused=GOOD, local=GOOD)))
    assert "trained alone" not in text.replace("beside a model trained alone: hsl-node evaluate --alone", "")
    assert "Whether taking part was worth it shows beside a model trained alone: hsl-node evaluate --alone" in text
    text = words_of(page_of(state_with(tmp_path / "b", members, fused=GOOD, alone=GOOD)))
    assert "own model, last round" not in text and "evaluate --alone" not in text


def test_what_is_said_so_far_is_not_said_to_be_the_same_everywhere(tmp_path: Path, members: Members) -> None:
    """Before the closing statements two of three hospitals have told what the last fusion gave them."""
    state = make_state(tmp_path, members, "ash")
    with Journal.create(Layout(state).journal) as journal:
        journal._write("DELETE FROM manifests WHERE round = 3 AND peer = 'cedar'", ())
    page = page_of(state)
    assert "2 of 3 said so far: the same" in page and "identical so far" in page
    assert re.findall(r'class="text ([^"]*)">(?:all 3|2 of 3)', page) == ["good", ""]
    assert '<b class="">identical so far' in page


def test_the_axis_runs_to_the_rounds_trained_and_the_plan_is_said(tmp_path: Path, members: Members) -> None:
    page = page_of(make_state(tmp_path, members, "ash"))
    assert "2 of 60 planned rounds." in page
    svg = re.findall(r"<svg.*?</svg>", page, re.S)[0]
    ticks = re.findall(r">(\d+)</text>", svg)
    assert max(map(int, ticks)) <= 2


def test_a_machine_is_told_with_processor_threads_and_precision_and_the_method_with_whom_to_cite(
    tmp_path: Path, members: Members
) -> None:
    text = words_of(page_of(state_with(tmp_path, members, fused=GOOD)))
    assert "Abacus 3000 (cpu), 4 threads, bfloat16" in text
    assert "binary cross-entropy; classes are not weighted" in text
    assert (
        "in training at random mirrored left and right" in text
        and "the epoch with the best validation AUC goes into the fusion" in text
    )
    assert "60 / 10 / 30 % train, validation, test" in text
    assert "McMahan, B. et al." in text


def test_the_same_journal_gives_the_same_page(
    tmp_path: Path, members: Members, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = state_with(tmp_path, members, fused=GOOD, alone=POOR)
    monkeypatch.setattr("hsl_node.results.report.time.strftime", lambda form, *at: "today")
    assert page_of(state) == page_of(state)


def test_a_long_run_shows_its_newest_rounds_in_the_timeline(
    tmp_path: Path, members: Members, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "BARS_MAX", 6)  # of three phases each: two rounds
    state = make_state(tmp_path, members, "ash", fused=tuple(str(n) * 64 for n in range(1, 6)))
    page = page_of(state)
    assert "From round 4 on." in page and "since round 4 began" in page


# ------------------------------------------------------------------ the demo's table


def test_the_demos_table_has_intervals_or_says_too_few(tmp_path: Path, members: Members) -> None:
    many = read(state_with(tmp_path / "a", members, fused=GOOD, alone=POOR))
    few = read(state_with(tmp_path / "b", members, images=6, fused=GOOD, alone=POOR))
    text = demo.closing([many, few], agreement([many]), tmp_path / "r.html", 1.0)
    rows = [line for line in text.splitlines() if line.startswith("ash ")]
    assert re.search(r"\+0\.\d{3} \(\+0\.\d{3} to \+0\.\d{3}\)$", rows[0])
    assert rows[1].endswith("too few to say")


def test_a_hospital_whose_final_model_is_not_measured_has_no_row_in_the_demos_table(
    tmp_path: Path, members: Members
) -> None:
    node = read(make_state(tmp_path, members, "ash"))
    assert node.evaluation is None and node.measured == ()
    assert Digest("2" * 64) == node.fused[-1]["sha256"]
    assert "ash " not in demo.closing([node], agreement([node]), tmp_path / "r.html", 1.0).split("All 1")[0]
