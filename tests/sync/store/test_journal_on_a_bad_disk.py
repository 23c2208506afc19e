"""A journal that cannot be opened, read or copied: it is named, with its cure."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from small_disk import disk_of

from hsl_node.admin import backup
from hsl_node.errors import DiskFailed, LocalStateError, NotInitialised
from hsl_node.federation.names import Digest, Peer
from hsl_node.host import durable
from hsl_node.host.layout import Layout
from hsl_node.sync.store.journal import Journal

ASH = Peer("ash")
SHA = Digest("a" * 64)


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    with disk_of(tmp_path / "disk", 2) as folder:
        yield folder


@pytest.mark.parametrize("before", [True, False])
def test_threat_21_a_journal_that_a_full_disk_keeps_closed_asks_for_space_first(tiny_disk: Path, before: bool) -> None:
    path, ballast = tiny_disk / "journal.sqlite3", tiny_disk / "ballast"
    if before:
        Journal.create(path).close()
    with open(ballast, "wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(4096)):
            pass
    with pytest.raises(LocalStateError, match=r"its disk is full \(0 B free\)") as full:
        Journal.create(path)
    assert full.value.remedy.startswith("free some space") and "backup" not in full.value.remedy
    ballast.unlink()
    Journal.create(path).close()


def test_a_journal_that_is_none_any_more_still_asks_for_a_backup(tmp_path: Path) -> None:
    (tmp_path / "journal.sqlite3").write_bytes(b"x" * 8192)
    with pytest.raises(LocalStateError, match="cannot be opened") as broken:
        Journal.create(tmp_path / "journal.sqlite3")
    assert "backup" in broken.value.remedy and "full" not in broken.value.message
    assert "without a backup" in broken.value.remedy and "`hsl-node recover --from-peers`" in broken.value.remedy


def test_a_damaged_journal_names_the_way_out_for_who_has_no_backup(tmp_path: Path) -> None:
    """In its midst, so that it opens: `doctor` reads every page, the daemon those that it needs."""
    path = tmp_path / "journal.sqlite3"
    with Journal.create(path) as journal, journal.transaction():
        for _ in range(2000):
            journal.note("info", "filler", "x" * 100)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle:] = b"\xff" * (len(content) - middle)
    path.write_bytes(content)
    with Journal.read_only(path) as journal:
        for reading in (lambda: journal.require_sound(path), lambda: journal.rows("notes")):
            with pytest.raises(LocalStateError) as damaged:
                reading()
            for part in (
                "keys/",
                "federation.toml",
                "keyring.toml",
                "splits.json",
                "anchor set",
                "recover --from-peers`",
            ):
                assert part in damaged.value.remedy


def test_a_backup_into_a_folder_too_small_for_the_journal_names_that_folder(tmp_path: Path, tiny_disk: Path) -> None:
    """SQLite says "full" and not of which disk; nobody should go and look at the node's own."""
    (tmp_path / "ash").mkdir()
    (tmp_path / "ash" / "node.toml").write_text('name = "ash"\naddress = "ash:1"\nlisten = "0.0.0.0:1"\n')
    with Journal.create(tmp_path / "ash" / "journal.sqlite3") as journal:
        journal.set_meta("much", "x" * 4_000_000)
        with pytest.raises(LocalStateError, match="No space left on device") as full:
            backup.backup(tmp_path / "ash", tiny_disk / "ash.tar")
        assert str(tiny_disk / "ash.tar") in full.value.message and "make room in that folder" in full.value.remedy
        assert "the node itself goes on" in full.value.remedy and list(tiny_disk.iterdir()) == []
        assert journal.meta("much")


# ------------------------------------------------------------------ why it cannot be read any more

READINGS: dict[str, Callable[[Journal], object]] = {
    "state": Journal.state,
    "meta": lambda j: j.meta("x"),
    "signed": lambda j: j.signed(1),
    "manifest": lambda j: j.manifest(1, ASH),
    "offered": lambda j: j.offered((ASH,), 0, 9),
    "offered of nobody": lambda j: j.offered((), 0, 9),
    "fused_digests": lambda j: j.fused_digests([1]),
    "documents": lambda j: j.documents(0, ASH),
    "last_signed": Journal.last_signed,
    "receipt": lambda j: j.receipt(1, ASH),
    "last_receipts": Journal.last_receipts,
    "result": lambda j: j.result("x"),
    "influence": lambda j: j.influence(1),
    "rows": lambda j: j.rows("notes"),
    "scores_of": lambda j: j.scores_of(ASH),
    "last_manifest": lambda j: j.last_manifest(ASH),
    "last_written": Journal.last_written,
    "rows of a round": lambda j: j.rows("manifests", 1),
    "each": lambda j: list(j.each("manifests")),
    "best_model": Journal.best_model,
    "signed_rounds": Journal.signed_rounds,
    "manifests_of": lambda j: j.manifests_of(1),
    "receipts_of": lambda j: j.receipts_of(1),
    "told": lambda j: list(j.told()),
}


class Failing(sqlite3.Connection):
    """A disk that gives an input/output error wherever rows are read, once `failing`."""

    failing = False

    def execute(self, query: str, *values: object) -> sqlite3.Cursor:  # type: ignore[override]
        if self.failing and query.startswith("SELECT"):
            error = sqlite3.OperationalError("disk I/O error")
            error.sqlite_errorcode = sqlite3.SQLITE_IOERR_READ
            raise error
        return super().execute(query, *values)  # type: ignore[arg-type]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[LocalStateError]:
    """What the process is told, whoever catches the error."""
    errors: list[LocalStateError] = []
    monkeypatch.setattr(durable, "on_failure", errors.append)
    return errors


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("within", ["a transaction", "none"])
def test_threat_23_a_disk_that_fails_where_the_journal_is_read_ends_the_process_as_one_that_fails_a_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: list[LocalStateError], reading: str, within: str
) -> None:
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *args, **more: connect(*args, **more, factory=Failing))
    journal = Journal.create(tmp_path / "j")
    journal.set_meta("x", "before")
    READINGS[reading](journal)
    journal._db.failing = True  # type: ignore[attr-defined]
    with pytest.raises(DiskFailed, match="the journal cannot be read: disk I/O error") as failed:
        if within == "none":
            READINGS[reading](journal)
        with journal.transaction():
            journal.set_meta("x", "after")
            READINGS[reading](journal)
    assert told == [failed.value]
    journal._db.failing = False  # type: ignore[attr-defined]
    assert journal.meta("x") == "before" and not journal._db.in_transaction


def malformed(path: Path) -> None:
    """One page of it, that of a table which nothing reads at the start."""
    with Journal.create(path) as journal:
        for round in range(5):
            journal.record_manifest(round, ASH, SHA, b"document", {"score": 0.5, "bytes": 0})
        journal.record_phase(1, "train")
        journal.save_state({"me": "ash", "round": 1, "phase": "train", "peers": ["ash"], "have": {}})
        query = "SELECT rootpage FROM sqlite_master WHERE name = 'manifests'"
        page, size = journal._db.execute(query).fetchone()[0], journal._db.execute("PRAGMA page_size").fetchone()[0]
    with open(path, "r+b") as file:
        file.seek((page - 1) * size)
        file.write(b"\xa5" * size)


def test_a_malformed_journal_is_named_with_its_cure_and_ends_the_process(
    tmp_path: Path, told: list[LocalStateError]
) -> None:
    malformed(tmp_path / "j")
    for opener in (Journal.create, Journal.read_only):
        journal = opener(tmp_path / "j")
        with pytest.raises(
            LocalStateError, match="the journal cannot be read: database disk image is malformed"
        ) as broken:
            journal.documents(0, ASH)
        assert "restore a backup" in broken.value.remedy
        assert told.pop() is broken.value and not told
        journal.close()


def test_a_command_that_reads_a_malformed_journal_says_so_in_one_line(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "ash")
    layout.make()
    (layout.state / "node.toml").write_text('name = "ash"\naddress = "127.0.0.1:1"\n')
    malformed(layout.journal)
    for words in (["status"], ["status", "--json"], ["round", "history"]):
        command = [sys.executable, "-m", "hsl_node", "--state", str(layout.state), *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        error, remedy = done.stderr.splitlines()
        assert (done.returncode, done.stdout) == (15, "")
        assert error.startswith("Error: the journal cannot be read: ") and remedy.startswith(
            "What to do: check the disk"
        )


def test_a_journal_that_cannot_be_copied_is_named(tmp_path: Path) -> None:
    path = tmp_path / "j"
    Journal.create(path).close()
    with Journal.read_only(path) as journal, pytest.raises(LocalStateError, match="the journal cannot be copied"):
        journal.copy(tmp_path / "absent" / "copy")


def test_a_command_beside_the_daemon_writes_and_never_makes_a_journal(tmp_path: Path) -> None:
    with pytest.raises(NotInitialised):
        Journal.beside(tmp_path / "j")
    assert list(tmp_path.iterdir()) == []
    daemon = Journal.create(tmp_path / "j")
    beside = Journal.beside(tmp_path / "j")
    with beside.transaction():
        beside.record_result("x", {"auc": 0.5})
    assert daemon.result("x") == {"auc": 0.5}
    assert beside._db.execute("PRAGMA synchronous").fetchone()[0] == 2
