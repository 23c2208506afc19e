"""The journal: what was committed survives, what was not never happened, and nothing is signed twice."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hsl_node.errors import LocalStateError, NotInitialised
from hsl_node.federation.names import Digest, Peer
from hsl_node.sync.candidates import Candidate
from hsl_node.sync.store.journal import Journal

ASH, BIRCH = Peer("ash"), Peer("birch")
SHA, OTHER = Digest("a" * 64), Digest("b" * 64)


@pytest.fixture
def journal(tmp_path):
    with Journal.create(tmp_path / "journal.sqlite3") as opened:
        yield opened


# ------------------------------------------------------------------ crashes


def run_and_kill(folder: Path, body: str) -> None:
    """A real process that is killed by SIGKILL where `body` says so."""
    code = (
        "import os, signal\nfrom pathlib import Path\nfrom hsl_node.sync.store.journal import Journal\n"
        f"journal = Journal.create(Path({str(folder / 'journal.sqlite3')!r}))\n{body}\n"
    )
    done = subprocess.run([sys.executable, "-c", code], timeout=60, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_threat_22_a_kill_inside_a_transaction_leaves_what_was_there_before(tmp_path):
    run_and_kill(
        tmp_path,
        "journal.save_state({'round': 1})\n"
        "with journal.transaction():\n"
        "    journal.save_state({'round': 2})\n"
        f"    journal.record_signed(2, {SHA!r}, b'document')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)",
    )
    journal = Journal.create(tmp_path / "journal.sqlite3")
    assert journal.state() == {"round": 1}
    assert journal.signed(2) is None


def test_threat_22_a_kill_right_after_a_transaction_loses_nothing(tmp_path):
    run_and_kill(
        tmp_path,
        "with journal.transaction():\n"
        "    journal.save_state({'round': 2})\n"
        f"    journal.record_signed(2, {SHA!r}, b'document')\n"
        "os.kill(os.getpid(), signal.SIGKILL)",
    )
    journal = Journal.create(tmp_path / "journal.sqlite3")
    assert journal.state() == {"round": 2}
    assert journal.signed(2) == (SHA, b"document")


def test_an_exception_inside_a_transaction_undoes_all_of_it(journal):
    with pytest.raises(ZeroDivisionError), journal.transaction():
        journal.save_state({"round": 1})
        journal.set_meta("x", "y")
        raise ZeroDivisionError
    assert (journal.state(), journal.meta("x")) == (None, None)
    with journal.transaction():
        journal.save_state({"round": 2})
    assert journal.state() == {"round": 2}


def test_a_commit_that_fails_undoes_all_of_it_and_the_journal_goes_on(tmp_path):
    """A full disk, here by SQLite's own limit on pages."""
    journal = Journal.create(tmp_path / "journal.sqlite3")
    pages = journal._db.execute("PRAGMA page_count").fetchone()[0]
    journal._db.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(LocalStateError, match="full"), journal.transaction():
        journal.set_meta("a", "1")
        for i in range(100):
            journal.note("info", "filler", "x" * 10_000 + str(i))
    journal._db.execute(f"PRAGMA max_page_count = {pages + 1000}")
    with journal.transaction():
        journal.set_meta("b", "2")
    assert (journal.meta("a"), journal.meta("b")) == (None, "2")


def test_threat_23_every_commit_reaches_the_disk_before_what_relies_on_it(journal):
    """WAL with synchronous = FULL (2)."""
    assert journal._db.execute("PRAGMA synchronous").fetchone()[0] == 2
    assert journal._db.execute("PRAGMA journal_mode").fetchone()[0] == "wal"


# ------------------------------------------------------------------ signatures


def test_threat_12_a_second_different_signature_for_a_round_is_refused(journal):
    journal.record_signed(3, SHA, b"first")
    with pytest.raises(LocalStateError, match="round 3 was signed"):
        journal.record_signed(3, OTHER, b"second")
    assert journal.signed(3) == (SHA, b"first")


def test_another_manifest_of_the_same_checkpoint_is_refused_too(journal):
    """Other samples or another plateau flag are equivocation, as another checkpoint is."""
    journal.record_signed(3, SHA, b'{"samples":1}\nsignature')
    with pytest.raises(LocalStateError, match="with another manifest"):
        journal.record_signed(3, SHA, b'{"samples":2}\nsignature')
    assert journal.signed(3) == (SHA, b'{"samples":1}\nsignature')


def test_the_same_manifest_signed_again_keeps_its_first_signature(journal):
    journal.record_signed(3, SHA, b'{"samples":1}\nsignature')
    journal.record_signed(3, SHA, b'{"samples":1}\nanother signature')
    assert journal.signed(3) == (SHA, b'{"samples":1}\nsignature')


def test_threat_12_the_refusal_outlives_the_process(tmp_path):
    Journal.create(tmp_path / "j").record_signed(3, SHA, b"first")
    with pytest.raises(LocalStateError):
        Journal.create(tmp_path / "j").record_signed(3, OTHER, b"second")


def test_the_opening_statement_may_be_corrected(journal):
    """Round 0: nothing was trained on it yet."""
    journal.record_signed(0, SHA, b"first")
    journal.record_signed(0, OTHER, b"second")
    assert journal.signed(0) == (OTHER, b"second")


# ------------------------------------------------------------------ opening


def test_the_journal_is_private(tmp_path):
    before = os.umask(0)
    try:
        Journal.create(tmp_path / "j").save_state({})
    finally:
        os.umask(before)
    assert [f"{p.name} {p.stat().st_mode & 0o777:o}" for p in sorted(tmp_path.iterdir())] == [
        "j 600",
        "j-shm 600",
        "j-wal 600",
    ]


def test_a_reader_sees_commits_while_the_writer_goes_on_and_cannot_write(tmp_path):
    writer = Journal.create(tmp_path / "j")
    writer.save_state({"round": 1})
    reader = Journal.read_only(tmp_path / "j")
    assert reader.state() == {"round": 1}
    with writer.transaction():
        writer.save_state({"round": 2})
        assert reader.state() == {"round": 1}
    assert reader.state() == {"round": 2}
    with pytest.raises(LocalStateError, match="readonly"):
        reader.set_meta("x", "y")


def test_a_reader_opens_the_journal_of_a_stopped_or_killed_daemon(tmp_path):
    run_and_kill(tmp_path, "journal.save_state({'round': 7})\nos.kill(os.getpid(), signal.SIGKILL)")
    with Journal.read_only(tmp_path / "journal.sqlite3") as reader:
        assert reader.state() == {"round": 7}
    Journal.create(tmp_path / "journal.sqlite3").close()  # the last writer leaves: no -wal stays
    assert Journal.read_only(tmp_path / "journal.sqlite3").state() == {"round": 7}


@pytest.mark.parametrize("folder", ["a b", "100%", "a?b", "a#b", "ä&x=1", "a%20b"])
def test_a_reader_finds_the_journal_in_any_folder(tmp_path, folder):
    (tmp_path / folder).mkdir()
    Journal.create(tmp_path / folder / "j").save_state({"round": 1})
    assert Journal.read_only(tmp_path / folder / "j").state() == {"round": 1}


def test_a_reader_follows_a_relative_path(tmp_path, monkeypatch):
    Journal.create(tmp_path / "j").save_state({"round": 1})
    monkeypatch.chdir(tmp_path)
    assert Journal.read_only(Path("j")).state() == {"round": 1}


def test_a_reader_never_makes_a_journal(tmp_path):
    with pytest.raises(NotInitialised):
        Journal.read_only(tmp_path / "j")
    assert list(tmp_path.iterdir()) == []


def test_a_journal_whose_first_start_was_killed_is_none_yet(tmp_path):
    db = sqlite3.connect(tmp_path / "j")
    db.execute("PRAGMA journal_mode = WAL")  # as `create` does before it makes the tables
    db.close()
    assert (tmp_path / "j").stat().st_size > 0
    with pytest.raises(NotInitialised):
        Journal.read_only(tmp_path / "j")
    Journal.create(tmp_path / "j").save_state({"round": 1})
    assert Journal.read_only(tmp_path / "j").state() == {"round": 1}


@pytest.mark.parametrize("opener", [Journal.create, Journal.read_only])
@pytest.mark.parametrize("content", ["garbage", "another database", "another version"])
def test_what_is_no_journal_of_ours_is_named(tmp_path, opener, content):
    path = tmp_path / "j"
    if content == "garbage":
        path.write_bytes(b"this is no database" * 100)
    elif content == "another database":
        sqlite3.connect(path).execute("CREATE TABLE t (x)").connection.close()
    else:
        with Journal.create(path) as journal:
            journal.set_meta("version", "99")
    with pytest.raises(LocalStateError, match=str(path)):
        opener(path)


# ------------------------------------------------------------------ what it remembers


def test_state_and_meta_are_replaced_not_added(journal):
    assert journal.state() is None
    journal.save_state({"round": 1})
    journal.save_state({"round": 2, "text": "zwölf"})
    assert journal.state() == {"round": 2, "text": "zwölf"}
    journal.set_meta("paused", "1")
    journal.set_meta("paused", "0")
    assert journal.meta("paused") == "0"


def test_a_manifest_is_kept_with_its_signed_document(journal):
    journal.record_manifest(2, ASH, SHA, b"line\nsignature", {"score": 0.7})
    found = journal.manifest(2, ASH)
    assert (found["sha256"], found["document"], found["content"]) == (SHA, b"line\nsignature", {"score": 0.7})
    assert journal.manifest(2, BIRCH) is None


def test_the_scores_of_one_peer_are_those_of_its_checkpoints_digit_by_digit_in_order_of_round(journal):
    """The plateau flag of a manifest follows from them: a restart must find the same numbers."""
    thirds = [n / 3 / 2**n for n in range(1, 60)]
    for round, score, size in ((0, None, 0), (2, 0.8, 9), (1, 0.7, 9), (3, None, 9), (4, None, 0)):
        journal.record_manifest(round, ASH, SHA, b"", {"score": score, "bytes": size})
    for round, score in enumerate(thirds, start=1):
        journal.record_manifest(round, BIRCH, SHA, b"", {"score": score, "bytes": 9})
    assert list(journal.scores_of(ASH).items()) == [(1, 0.7), (2, 0.8), (3, None)]
    assert list(journal.scores_of(BIRCH).values()) == thirds


def test_the_scores_of_many_rounds_are_read_without_the_names_of_all_peers_in_each(journal):
    inputs = {f"p{n}": f"{n:064x}" for n in range(64)}
    with journal.transaction():
        for round in range(1, 201):
            journal.record_manifest(round, ASH, SHA, b"", {"score": 0.5, "bytes": 9, "inputs": inputs})
    tracemalloc.start()
    try:
        assert len(journal.scores_of(ASH)) == 200
        assert tracemalloc.get_traced_memory()[1] < 200_000  # with them: 200 x 10 kB
    finally:
        tracemalloc.stop()


def test_the_last_manifest_of_a_peer_is_that_of_its_highest_round_whenever_it_was_written(journal):
    for round in (2, 3, 1):  # as after a recovery
        journal.record_manifest(round, ASH, SHA, b"%d" % round, {})
    assert journal.last_manifest(ASH)["document"] == b"3"
    assert journal.last_manifest(BIRCH) is None


def test_rows_of_one_round_and_of_each_round(journal):
    for round, peer in ((2, ASH), (1, BIRCH), (1, ASH)):
        journal.record_manifest(round, peer, SHA, b"", {})
    assert [(r["round"], r["peer"]) for r in journal.rows("manifests", 1)] == [(1, BIRCH), (1, ASH)]
    assert [(r["round"], r["peer"]) for r in journal.each("manifests")] == [(1, BIRCH), (1, ASH), (2, ASH)]


def test_threat_20_of_refusals_without_end_the_newest_notes_are_kept(journal, monkeypatch):
    monkeypatch.setattr("hsl_node.sync.store.journal.NOTES_MAX", 20)
    for number in range(100):
        journal.note("warning", "refused size", f"birch: {number}")
    assert [n["text"] for n in journal.rows("notes")] == [f"birch: {n}" for n in range(80, 100)]


def test_the_last_receipt_of_each_peer_is_the_one_that_was_written_last(journal):
    for round, receiver, accepted, code in (
        (1, ASH, True, "accepted"),
        (1, BIRCH, True, "accepted"),
        (2, ASH, False, "size"),
    ):
        journal.record_receipt(round, receiver, accepted, code, "", b"")
    journal.record_receipt(2, ASH, True, "accepted", "", b"")  # answered anew
    found = {peer: (row["round"], row["accepted"], row["code"]) for peer, row in journal.last_receipts().items()}
    assert found == {ASH: (2, 1, "accepted"), BIRCH: (1, 1, "accepted")}


def which(found: Candidate | None) -> tuple[str, int, str]:
    assert found is not None
    return found.kind, found.round, found.sha256


@pytest.mark.parametrize(
    ("validated", "best"),
    [
        ({}, None),
        ({1: (0.7, 0.5)}, 1),
        ({1: (0.7, 0.5), 2: (0.9, 0.9), 3: (0.8, 0.1)}, 2),  # the highest AUC, whatever the loss
        ({1: (0.9, 0.5), 2: (0.9, 0.4)}, 2),  # the same AUC: the lower loss
        ({1: (0.9, 0.5), 2: (0.9, 0.5)}, 1),  # a tie: the earlier
        ({1: (None, 0.5), 2: (None, 0.3)}, 2),  # undefined score: the lowest loss
        ({1: (0.1, 9.0), 2: (None, 0.1)}, 1),  # a defined score goes before an undefined one
        ({1: (-7.0, 9.0), 2: (-6.0, 9.0)}, 2),  # more is better, below 0 too
        ({1: (None, None), 2: (None, None)}, 2),  # nothing is known: the latest
        ({0: (0.99, 0.1), 1: (0.5, 0.9)}, 1),  # the initial weights are no result
    ],
)
def test_the_best_fused_model_is_the_one_with_the_highest_validation_score(journal, validated, best):
    for round in range(4):
        journal.record_fused(round, Digest(str(round) * 64))
    for round, (score, loss) in validated.items():
        journal.record_validation(round, score, loss)
    found = journal.best_model("fused")
    assert (found and which(found)) == (best and ("fused", best, str(best) * 64))


@pytest.mark.parametrize(
    ("own", "fused", "again", "best"),
    [
        ((0.7, 0.5), (0.8, 0.5), (0.9, 0.5), ("recalibrated", 2, "f")),
        ((0.7, 0.5), (0.8, 0.5), (0.6, 0.5), ("fused", 2, "f")),
        ((0.9, 0.5), (0.8, 0.5), (0.7, 0.5), ("own", 2, "e")),
        ((0.9, 0.5), (0.9, 0.4), (0.9, 0.3), ("recalibrated", 2, "f")),  # the same score: the lower loss
        ((0.9, 0.5), (0.9, 0.5), (0.9, 0.5), ("own", 2, "e")),  # a tie: what was there first
        ((None, 0.5), (0.1, 9.0), (None, 0.4), ("fused", 2, "f")),
        ((0.5, 0.5), (0.6, 0.5), (None, None), ("fused", 2, "f")),  # it was not recalibrated
        ((None, None), (None, None), (None, None), ("fused", 2, "f")),  # nothing is known: the latest
    ],
)
def test_the_hospitals_model_is_the_best_of_own_fused_and_recalibrated(journal, own, fused, again, best):
    journal.record_own(2, "e" * 64, *own)
    journal.record_fused(2, Digest("f" * 64))
    journal.record_validation(2, *fused, again)
    kind, round, letter = best
    assert which(journal.best_model()) == (kind, round, letter * 64)
    assert which(journal.best_model("own")) == ("own", 2, "e" * 64)


def test_the_hospitals_model_is_the_best_over_all_rounds(journal):
    for round, own, fused in ((1, 0.6, 0.9), (2, 0.8, 0.7), (3, 0.8, 0.85)):
        journal.record_own(round, f"{round}" * 64, own, 0.5)
        journal.record_fused(round, Digest(f"{round + 3}" * 64))
        journal.record_validation(round, fused, 0.5)
    journal.record_fused(4, Digest("9" * 64))  # not validated yet
    assert which(journal.best_model()) == ("fused", 1, "4" * 64)
    assert which(journal.best_model("own")) == ("own", 2, "2" * 64)
    assert journal.best_model("recalibrated") is None
    assert journal.own_digests() == {1: "1" * 64, 2: "2" * 64, 3: "3" * 64}


def test_fusing_again_after_a_crash_keeps_the_validation(journal):
    journal.record_fused(1, SHA)
    journal.record_validation(1, 0.7, 0.5)
    journal.record_fused(1, SHA)
    assert which(journal.best_model()) == ("fused", 1, SHA)


def test_one_phase_is_open_at_a_time_and_saying_it_again_changes_nothing(journal):
    for round, phase in ((0, "agree"), (1, "train"), (1, "train"), (1, "collect")):
        journal.record_phase(round, phase)
    rows = journal.rows("phases")
    assert [(r["round"], r["phase"], r["ended"] is None) for r in rows] == [
        (0, "agree", False),
        (1, "train", False),
        (1, "collect", True),
    ]
    assert all(r["ended"] is None or r["started"] <= r["ended"] for r in rows)


def test_rows_come_decoded_and_without_signatures(journal):
    journal.record_manifest(1, ASH, SHA, b"document", {"score": 0.5})
    journal.record_epoch(1, 2, {"loss": 0.25})
    journal.record_receipt(1, BIRCH, True, "accepted", "", b"document")
    journal.record_transfer(1, BIRCH, "sent", 100, 0, 1, 2.5)
    journal.record_result("test", {"score": 0.5})
    assert journal.rows("manifests")[0]["content"] == {"score": 0.5}
    assert "document" not in journal.rows("manifests")[0]
    assert journal.rows("epochs")[0]["content"] == {"loss": 0.25}
    assert journal.rows("receipts")[0]["receiver"] == "birch"
    assert journal.rows("transfers")[0]["ended"] - journal.rows("transfers")[0]["started"] == pytest.approx(2.5)
    assert journal.result("test") == {"score": 0.5}
    assert journal.result("absent") is None


def test_a_journal_answers_only_the_thread_that_opened_it(journal: Journal) -> None:
    """Whatever runs beside the event loop gets what it needs as arguments: a transaction is nobody else's to see."""
    with ThreadPoolExecutor(1) as thread, pytest.raises(sqlite3.ProgrammingError, match="thread"):
        thread.submit(journal.meta, "torch").result()
    assert journal.meta("torch") is None
