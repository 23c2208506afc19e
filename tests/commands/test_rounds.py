"""`round history` and `round show`, read from a journal."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from command_line import made, run

from hsl_node.errors import UsageError
from hsl_node.federation.canonical import canonical_json
from hsl_node.federation.names import Digest, Peer
from hsl_node.host.layout import Layout
from hsl_node.status import history
from hsl_node.sync.store.store import Store


def test_round_history_and_show_read_the_journal(tmp_path: Path) -> None:
    state = made(tmp_path / "ash")
    journal = (store := Store(Layout(state))).journal
    journal.save_state({"me": "ash", "round": 1})
    content = {"said": {}, "bytes": 5_000_000, "samples": 10, "software": "x\x1b[31m\x9b2J"}
    for peer, score, said in (("ash", 0.75, {"steps": 96.0}), ("birch", None, {})):
        journal.record_manifest(1, Peer(peer), "d" * 64, b"", {**content, "score": score, "said": said})
    journal.record_phase(0, "agree")
    for phase in ("train", "collect", "fuse"):
        journal.record_phase(1, phase)
    for epoch, terms in ((1, {"primary": 0.5, "proximal": 0.25}), (2, {"primary": 0.4, "later": 0.125})):
        journal.record_epoch(1, epoch, {"epoch": epoch, "score": 0.71, "validation_loss": 0.6, "terms": terms})
    journal.record_receipt(1, Peer("birch"), True, "accepted", "", b"")
    journal.record_transfer(1, Peer("birch"), "sent", 5_000_000, 1_000_000, 2, 4.0)
    journal.record_fused(1, Digest("f" * 64))
    journal.record_validation(1, 0.9, 0.1, (0.95, 0.1))
    store.close()
    (line,) = run("--state", state, "round", "history").stdout.splitlines()[1:]
    assert line.split()[0] == "1" and line.split()[-9:] == [
        "6.0",
        "MB",
        "5.0",
        "MB",
        "0.750",
        "0.900",
        "0.950",
        "f" * 12,
        "-",
    ]
    shown = run("--state", state, "round", "show", "1").stdout
    birch = next(line for line in shown.splitlines() if line.startswith("birch "))
    signed = hashlib.sha256(canonical_json({**content, "score": None}) + b"\n").hexdigest()[:12]
    assert birch.split() == ["birch", "d" * 12, signed, "-", "10", "-", "-", "accepted", "5.0", "MB", "4.0", "s", "2"]
    lines = [line.split() for line in shown.splitlines()]
    at = lines.index(["says", "steps"])
    assert lines[at + 1 : at + 3] == [["ash", "96"], ["birch", "-"]]
    assert " ".join(lines[-3]) == "epoch primary loss proximal loss later loss validation loss AUC seconds"
    assert lines[-2] == ["1", "0.5", "0.25", "-", "0.6", "0.71", "-"]
    assert lines[-1] == ["2", "0.4", "-", "0.125", "0.6", "0.71", "-"]
    assert "AUC        own model 0.750, fused 0.900, recalibrated 0.950 (validation, this site)" in shown
    assert shown.replace("\n", "").isprintable() and "0.71" in shown
    plain = run("--state", state, "round", "show", "1", "--json").stdout
    assert json.loads(plain)["score_fused"] == 0.9
    assert plain.isascii() and json.loads(plain)["peers"][0]["software"] == content["software"]
    assert isinstance(run("--state", state, "round", "show", "2").exception, UsageError)
    assert [r["round"] for r in history.rounds(state)] == [1]


def test_round_history_says_which_rounds_were_lost() -> None:
    """Rounds 1 and 2 went with a disk, round 4 between a backup and its restoration."""
    one = {"began": 0.0, "sha256": None, "score_name": "AUC", "sent_bytes": 0, "received_bytes": 0}
    one |= dict.fromkeys(("score_own", "score_fused", "score_recalibrated"))
    rounds = [{**one, "round": n, "seconds": dict.fromkeys(history.PHASES), "terms": {}, "unusual": {}} for n in (3, 5)]
    assert history.text(rounds).splitlines()[-1].startswith("not in this journal: rounds 1 to 2, 4, lost")
    assert "not in this journal" not in history.text([{**rounds[0], "round": 1}])


def test_a_clock_that_is_set_in_mid_run_makes_no_round_negative_or_91_days_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three months ahead at the start; NTP sets it back in the training of round 1, and ahead by an hour in round 2."""
    state = made(tmp_path / "ash")
    journal = (store := Store(Layout(state))).journal
    journal.save_state({"me": "ash", "round": 2})
    monotonic, wall = 1000.0, 1.8e9 + 91 * 86400.0
    monkeypatch.setattr("hsl_node.sync.store.journal.time.monotonic", lambda: monotonic)
    monkeypatch.setattr("hsl_node.sync.store.journal.time.time", lambda: wall)
    for round, phase, lasts, is_set in (
        (1, "train", 100.0, -91 * 86400.0), (1, "collect", 50.0, 0.0), (1, "fuse", 2.0, 0.0),
        (2, "train", 80.0, 3600.0), (2, "collect", 1.0, 0.0),
    ):  # fmt: skip
        journal.record_phase(round, phase)
        monotonic, wall = monotonic + lasts, wall + lasts + is_set
    journal.record_phase(2, "fuse")
    rows = history.steady(journal.rows("phases"))
    store.close()
    first, second = history.rounds(state)
    assert [first["seconds"][p] for p in history.PHASES] == [100.0, 50.0, 2.0]
    assert [second["seconds"][p] for p in history.PHASES] == [80.0, 1.0, None]
    assert second["began"] - first["began"] == 152.0, "both by the clock as it was last"
    assert rows[-1]["started"] - rows[0]["started"] == 233.0, "the report's timeline"
    assert rows[-1]["started"] == wall


def test_what_an_earlier_version_wrote_while_the_clock_was_set_back_lasts_no_less_than_nothing() -> None:
    rows = [{"round": 1, "phase": "train", "started": 9000.0, "ended": 100.0},
            {"round": 1, "phase": "collect", "started": 100.0, "ended": None}]  # fmt: skip
    assert [(r["started"], r["ended"]) for r in history.steady(rows)] == [(100.0, 100.0), (100.0, None)]
