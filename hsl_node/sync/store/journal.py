"""The journal: what this node knows and has promised, in SQLite. Survives kill -9 at any point.

Whoever writes holds the state directory's lock (`store.py`): the daemon, or a command while none runs. The exception is
`evaluate`, which adds its result beside a daemon, in one transaction that reads again what it rests on. `hsl-node
status`, `report` and `round history` only read, also while the daemon is down.
"""

from __future__ import annotations

import errno
import json
import os
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

from hsl_node.errors import LocalStateError, NotInitialised
from hsl_node.federation.names import Digest, Peer, Round
from hsl_node.host import durable, permissions
from hsl_node.host.durable import Step, disk_failed, passing
from hsl_node.sync.candidates import KINDS, Candidate, ModelKind, candidates, find_best
from hsl_node.sync.store.journal_file import (
    MALFORMED,
    NO_BACKUP,
    broken,
    code_of,
    connected,
    is_empty,
    on_a_read_only_disk,
)

VERSION = 3
NOTES_MAX = 5000  # a hostile peer may be refused for ever; the newest tell enough
_TABLES = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);              -- version, instance, paused, ...
CREATE TABLE state (one INTEGER PRIMARY KEY CHECK (one = 1), json TEXT NOT NULL);           -- round.State
CREATE TABLE signed (round INTEGER PRIMARY KEY, sha256 TEXT NOT NULL, document BLOB NOT NULL);       -- my manifests
CREATE TABLE manifests (round INTEGER, peer TEXT, sha256 TEXT NOT NULL, document BLOB NOT NULL, content TEXT NOT NULL,
                        at REAL NOT NULL, PRIMARY KEY (round, peer));       -- verified ones of everybody, mine too
CREATE TABLE receipts (round INTEGER, receiver TEXT, accepted INTEGER NOT NULL, code TEXT NOT NULL, text TEXT NOT NULL,
                       document BLOB NOT NULL, at REAL NOT NULL, PRIMARY KEY (round, receiver));
CREATE TABLE fused (round INTEGER PRIMARY KEY, sha256 TEXT NOT NULL, at REAL NOT NULL, score REAL, loss REAL,
                    recalibrated_score REAL, recalibrated_loss REAL,        -- this site's validation of it
                    validated INTEGER NOT NULL DEFAULT 0);
CREATE TABLE own (round INTEGER PRIMARY KEY, sha256 TEXT NOT NULL, score REAL, loss REAL,   -- all tensors of the epoch
                  at REAL NOT NULL);                                        -- that was sent, and its validation
CREATE TABLE epochs (round INTEGER, epoch INTEGER, content TEXT NOT NULL, at REAL NOT NULL, PRIMARY KEY (round, epoch));
CREATE TABLE phases (round INTEGER, phase TEXT, started REAL NOT NULL, ended REAL, PRIMARY KEY (round, phase));
CREATE TABLE transfers (round INTEGER, peer TEXT, direction TEXT, bytes INTEGER, resent INTEGER, retries INTEGER,
                        started REAL, ended REAL, PRIMARY KEY (round, peer, direction));
CREATE TABLE notes (at REAL NOT NULL, level TEXT NOT NULL, code TEXT NOT NULL, text TEXT NOT NULL);
CREATE TABLE results (name TEXT PRIMARY KEY, content TEXT NOT NULL, at REAL NOT NULL);     -- evaluations, influence
"""


@dataclass(frozen=True, slots=True)
class Told:
    """What a report tells of one manifest."""

    round: Round
    peer: Peer
    base: str
    bytes: int
    score: float | None
    samples: int
    software: str


class Journal:
    """Opened with `create`, `beside` or `read_only`, as a context. Wall-clock times (`at`) are only for display."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._db = connection
        self._db.row_factory = sqlite3.Row
        self._phase: tuple[float, float] | None = None  # the one that this process began: wall clock, monotonic

    @classmethod
    def create(cls, path: Path) -> Journal:
        """Open for writing; make it where it is absent."""
        try:
            db = connected(path)
            path.chmod(0o600)
            db.execute("PRAGMA journal_mode = WAL")
            if is_empty(db):
                with passing(Step.START_JOURNAL):
                    db.executescript(f"BEGIN; {_TABLES} INSERT INTO meta VALUES ('version', '{VERSION}'); COMMIT;")
            return cls(db)._of_our_version(path)
        except sqlite3.Error as exc:
            raise broken(path, exc) from exc

    @classmethod
    def read_only(cls, path: Path) -> Journal:
        """Raises: NotInitialised, LocalStateError."""
        return cls._existing(path, "ro")

    @classmethod
    def beside(cls, path: Path) -> Journal:
        """For a command that writes while the daemon may run, in one `transaction`. Raises: as `read_only`."""
        return cls._existing(path, "rw")

    @classmethod
    def _existing(cls, path: Path, mode: str) -> Journal:
        never = NotInitialised(f"no journal at {path}", remedy="the node has not been started here yet")
        if not path.exists():
            raise never
        try:
            uri = f"{path.absolute().as_uri()}?mode={mode}"  # quoted: a folder may be called 100%, a?b or a#b
            read_only = mode == "ro" and permissions.is_read_only(path.parent)
            db = on_a_read_only_disk(path, uri) if read_only else connected(uri, uri=True)
            if is_empty(db):  # its first start is making it, or was killed there and will make it
                db.close()
                raise never
            return cls(db)._of_our_version(path)
        except sqlite3.Error as exc:
            raise broken(path, exc) from exc

    def _of_our_version(self, path: Path) -> Journal:
        found = self._db.execute("SELECT value FROM meta WHERE key = 'version'").fetchone()  # `broken` names the file
        if found is None or found["value"] != str(VERSION):
            version = found and found["value"]
            raise LocalStateError(
                f"{path} was written by another hsl-node (journal version {version}, here {VERSION})",
                remedy="finish the run with the version that began it; a new run needs a new state directory",
            )
        return self

    def require_sound(self, path: Path) -> None:
        """Every page is read. Raises: LocalStateError."""
        try:
            problem = str(self._db.execute("PRAGMA quick_check(1)").fetchone()[0])
        except sqlite3.Error as exc:
            raise broken(path, exc) from exc
        if problem != "ok":
            raise broken(path, sqlite3.DatabaseError(problem))

    def copy(self, target: Path) -> None:
        """Into one file, as of one moment.

        Raises:
            OSError: ENOSPC: no room for the copy.
            DiskFailed, LocalStateError: of either.
        """
        try:
            with closing(sqlite3.connect(target)) as theirs:
                self._db.backup(theirs)
                theirs.execute("PRAGMA journal_mode = DELETE")  # without a write-ahead log beside it
        except sqlite3.Error as exc:
            if code_of(exc) == sqlite3.SQLITE_FULL:  # only the copy is written
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target)) from exc
            raise _failed("copied", exc) from exc

    def close(self) -> None:
        self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @contextmanager
    def transaction(self, step: Step = Step.JOURNAL_NOTE) -> Iterator[None]:
        """All or nothing, durable on leaving.

        Raises:
            LocalStateError: the disk is full; nothing of it happened.
            DiskFailed: the disk fails; only a restart tells whether it happened.

        Every reading raises the same: LocalStateError where the file is malformed.
        """
        try:
            self._db.execute("BEGIN IMMEDIATE")
            yield
            with passing(step):
                self._db.execute("COMMIT")
        except BaseException as exc:
            if self._db.in_transaction:  # after some errors SQLite has rolled back by itself
                with suppress(sqlite3.Error):
                    self._db.execute("ROLLBACK")
            if isinstance(exc, sqlite3.Error):
                raise _failed("written", exc) from exc
            raise

    # -------------------------------------------------------------- the state and what was promised

    def state(self) -> dict[str, Any] | None:
        row = self._one("SELECT json FROM state")
        return json.loads(row["json"]) if row else None

    def save_state(self, content: dict[str, Any]) -> None:
        self._write("REPLACE INTO state VALUES (1, ?)", (json.dumps(content),))

    def meta(self, key: str) -> str | None:
        row = self._one("SELECT value FROM meta WHERE key = ?", key)
        return str(row["value"]) if row else None

    def set_meta(self, key: str, value: str) -> None:
        self._write("REPLACE INTO meta VALUES (?, ?)", (key, value))

    def signed(self, round: Round) -> tuple[Digest, bytes] | None:
        """My signed manifest of a round: (sha256 it names, document)."""
        row = self._one("SELECT sha256, document FROM signed WHERE round = ?", round)
        return (Digest(row["sha256"]), row["document"]) if row else None

    def record_signed(self, round: Round, sha256: Digest, document: bytes) -> None:
        """Remember what I signed. A second, different manifest for a round would be equivocation.

        The same content signed again keeps the first signature.

        Raises:
            LocalStateError: something else was signed for this round before, be it another sample count only. Round
                0, the opening statement, may be corrected: nothing was trained on it.
        """
        before = self.signed(round)
        same = before is not None and before[1].partition(b"\n")[0] == document.partition(b"\n")[0]
        if before and not same and round > 0:
            raise LocalStateError(
                f"round {round} was signed with checkpoint {before[0][:12]} before; refusing to sign {sha256[:12]}"
                + (" with another manifest" if before[0] == sha256 else ""),
                remedy="the trainer did not reproduce its checkpoint; another hospital may have the signed one: "
                "`hsl-node recover --from-peers`, then start again",
            )
        if not same:
            self._write("REPLACE INTO signed VALUES (?, ?, ?)", (round, sha256, document))

    def manifest(self, round: Round, peer: Peer) -> dict[str, Any] | None:
        """A verified manifest: `sha256`, signed `document`, `content` (decoded)."""
        row = self._one("SELECT * FROM manifests WHERE round = ? AND peer = ?", round, peer)
        return _decoded(row) if row else None

    def record_manifest(self, round: Round, peer: Peer, sha256: str, document: bytes, content: dict[str, Any]) -> None:
        self._write(
            "REPLACE INTO manifests VALUES (?, ?, ?, ?, ?, ?)",
            (round, peer, sha256, document, json.dumps(content), time.time()),
        )

    def offered(self, everything_of: tuple[Peer, ...], since: Round, newest: int) -> list[dict[str, Any]]:
        """Manifests that a peer may ask for: `newest` ones of some peers, of everybody those since a round."""
        rows = [
            row
            for peer in everything_of
            for row in self._rows("SELECT * FROM manifests WHERE peer = ? ORDER BY round DESC LIMIT ?", peer, newest)
        ]
        marks = ",".join("?" * len(everything_of))
        rows += self._rows(f"SELECT * FROM manifests WHERE round >= ? AND peer NOT IN ({marks})", since, *everything_of)
        return [dict(row) for row in rows]

    def fused_digests(self, rounds: Sequence[Round]) -> dict[Round, Digest]:
        marks = ",".join("?" * len(rounds))
        found = self._rows(f"SELECT round, sha256 FROM fused WHERE round IN ({marks})", *rounds)
        return {row["round"]: Digest(row["sha256"]) for row in found}

    def forget_manifest(self, round: Round, peer: Peer) -> None:
        self._write("DELETE FROM manifests WHERE round = ? AND peer = ?", (round, peer))

    def last_manifest(self, peer: Peer) -> dict[str, Any] | None:
        """The manifest of this peer's highest round: see `manifest`."""
        row = self._one("SELECT * FROM manifests WHERE peer = ? ORDER BY round DESC LIMIT 1", peer)
        return _decoded(row) if row else None

    def documents(self, since: Round, me: Peer) -> list[dict[str, Any]]:
        """Verified manifests: those since a round, and older ones of mine that `signed` lacks (`by_hand.py`)."""
        rows = self._rows(
            "SELECT document, content FROM manifests "
            "WHERE round >= ? OR (peer = ? AND round NOT IN (SELECT round FROM signed)) ORDER BY round, peer",
            since,
            me,
        )
        return [_decoded(row) for row in rows]

    def last_signed(self) -> Round | None:
        """The highest round that carries my signature, as far as this journal knows."""
        row = self._one("SELECT max(round) AS round FROM signed")
        return row["round"] if row else None

    def record_receipt(self, round: Round, receiver: Peer, accepted: bool, code: str, text: str, doc: bytes) -> None:
        self._write(
            "REPLACE INTO receipts VALUES (?, ?, ?, ?, ?, ?, ?)",
            (round, receiver, accepted, code, text, doc, time.time()),
        )

    def receipt(self, round: Round, receiver: Peer) -> bytes:
        """The signed receipt of a peer; empty where there is none."""
        row = self._one("SELECT document FROM receipts WHERE round = ? AND receiver = ?", round, receiver)
        return bytes(row["document"]) if row else b""

    def last_receipts(self) -> dict[Peer, sqlite3.Row]:
        """The newest receipt of each peer: `round`, `accepted`, `code`."""
        rows = self._rows("SELECT receiver, round, accepted, code, max(rowid) FROM receipts GROUP BY receiver")
        return {Peer(row["receiver"]): row for row in rows}

    # -------------------------------------------------------------- what happened, for people and reports

    def record_fused(self, round: Round, sha256: Digest) -> None:
        self._write(
            "INSERT INTO fused (round, sha256, at) VALUES (?, ?, ?) "
            "ON CONFLICT (round) DO UPDATE SET sha256 = excluded.sha256",
            (round, sha256, time.time()),
        )

    def record_validation(
        self,
        round: Round,
        score: float | None,
        loss: float | None,
        recalibrated: tuple[float | None, float | None] = (None, None),
    ) -> None:
        """Of the fused model here; `recalibrated`: score and loss with its BatchNorm statistics taken anew."""
        self._write(
            "UPDATE fused SET score = ?, loss = ?, recalibrated_score = ?, recalibrated_loss = ?, validated = 1 "
            "WHERE round = ?",
            (score, loss, *recalibrated, round),
        )

    def record_own(self, round: Round, sha256: str, score: float | None, loss: float | None) -> None:
        """The file with all tensors of the epoch that this node sends in this round."""
        self._write("REPLACE INTO own VALUES (?, ?, ?, ?, ?)", (round, sha256, score, loss, time.time()))

    def own_digests(self) -> dict[Round, Digest]:
        """Of every own file that was ever written; few of them are kept."""
        return {row["round"]: Digest(row["sha256"]) for row in self._rows("SELECT round, sha256 FROM own")}

    def record_epoch(self, round: Round, epoch: int, content: dict[str, Any]) -> None:
        self._write("REPLACE INTO epochs VALUES (?, ?, ?, ?)", (round, epoch, json.dumps(content), time.time()))

    def record_phase(self, round: Round, phase: str) -> None:
        """This phase begins now; the one before ends. Saying it again after a restart changes nothing.

        It lasts as long as it lasts, also where the clock is set meanwhile; across a restart nobody knows better than
        the clock, and it lasts no less than 0.
        """
        now, moment = time.time(), time.monotonic()
        ended = now if self._phase is None else self._phase[0] + moment - self._phase[1]
        self._write(
            "UPDATE phases SET ended = max(started, ?) WHERE ended IS NULL AND NOT (round = ? AND phase = ?)",
            (ended, round, phase),
        )
        if self._one("SELECT 1 FROM phases WHERE round = ? AND phase = ?", round, phase) is None:
            self._write("INSERT INTO phases VALUES (?, ?, ?, NULL)", (round, phase, now))
            self._phase = now, moment

    def record_transfer(
        self, round: Round, peer: Peer, direction: str, size: int, resent: int, retries: int, seconds: float
    ) -> None:
        now = time.time()
        self._write(
            "REPLACE INTO transfers VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (round, peer, direction, size, resent, retries, now - seconds, now),
        )

    def note(self, level: str, code: str, text: str) -> None:
        """A line for the operator's history: refusals, warnings, halts."""
        self._write("INSERT INTO notes VALUES (?, ?, ?, ?)", (time.time(), level, code, text))
        self._write("DELETE FROM notes WHERE rowid <= (SELECT max(rowid) FROM notes) - ?", (NOTES_MAX,))

    def record_result(self, name: str, content: dict[str, Any]) -> None:
        self._write("REPLACE INTO results VALUES (?, ?, ?)", (name, json.dumps(content), time.time()))

    def result(self, name: str) -> dict[str, Any] | None:
        row = self._one("SELECT content FROM results WHERE name = ?", name)
        return json.loads(row["content"]) if row else None

    def result_names(self, prefix: str) -> list[str]:
        return [row["name"] for row in self._rows("SELECT name FROM results") if row["name"].startswith(prefix)]

    def record_influence(self, round: Round, content: dict[str, Any]) -> None:
        self.record_result(f"influence {round}", content)

    def influence(self, round: Round) -> dict[str, Any] | None:
        """What a fusion's inputs were like: `peers`, name -> figures (influence.py); `unusual` and, of the numbers of
        images (absent in older journals), `images`, `share`: name -> why.

        None: not fused, or by an earlier version.
        """
        return self.result(f"influence {round}")

    def rows(self, table: str, round: Round | None = None) -> list[dict[str, Any]]:
        """The rows of one table in order, JSON columns decoded; for reports. `round`: those of this one.

        All manifests are much: of each round the names of all peers, for each of them.
        """
        which, values = ("", ()) if round is None else ("WHERE round = ?", (round,))
        rows = [_decoded(row) for row in self._rows(f"SELECT * FROM {table} {which} ORDER BY rowid", *values)]
        for row in rows:
            row.pop("document", None)
        return rows

    def signed_rounds(self) -> list[Round]:
        """Those of which a signed document is kept, in order."""
        tables = " UNION ".join(f"SELECT round FROM {table}" for table in ("manifests", "signed", "receipts"))
        return [row["round"] for row in self._rows(f"{tables} ORDER BY round")]

    def manifests_of(self, round: Round) -> list[dict[str, Any]]:
        """As `manifest`, of everybody, with `peer`, in the order in which they were written."""
        return [_decoded(row) for row in self._rows("SELECT * FROM manifests WHERE round = ? ORDER BY rowid", round)]

    def receipts_of(self, round: Round) -> list[sqlite3.Row]:
        """Everybody's: `receiver`, `accepted`, signed `document`."""
        return self._rows("SELECT * FROM receipts WHERE round = ? ORDER BY rowid", round)

    def told(self) -> Iterator[Told]:
        """Of every manifest what it says but for its inputs, which are much; by rounds, one read at a time."""
        paths = ", ".join(f"'$.{field.name}'" for field in fields(Told)[2:])
        for number in self._rows("SELECT DISTINCT round FROM manifests ORDER BY round"):
            query = f"SELECT round, peer, json_extract(content, {paths}) AS said FROM manifests WHERE round = ?"
            for row in self._rows(query, number["round"]):
                yield Told(row["round"], row["peer"], *json.loads(row["said"]))

    def each(self, table: str) -> Iterator[dict[str, Any]]:
        """As `rows`, by rounds, and no more than one round at a time."""
        for row in self._rows(f"SELECT DISTINCT round FROM {table} ORDER BY round"):
            yield from self.rows(table, row["round"])

    def scores_of(self, peer: Peer) -> dict[Round, float | None]:
        """Validation score of each checkpoint that this peer signed, in order of round; statements have none."""
        rows = self._rows(
            "SELECT round, json_extract(content, '$.score', '$.bytes') AS found FROM manifests WHERE peer = ? "
            "ORDER BY round",
            peer,
        )
        found = {row["round"]: json.loads(row["found"]) for row in rows}  # the very digits that were signed
        return {round: score for round, (score, size) in found.items() if size > 0}

    def last_written(self) -> float | None:
        """When something of a round was recorded last."""
        tables = ("manifests", "epochs", "fused")
        found = [self._one(f"SELECT at FROM {table} ORDER BY rowid DESC LIMIT 1") for table in tables]
        return max((row["at"] for row in found if row), default=None)

    def candidates(self) -> list[Candidate]:
        """Not a fused model that was validated beside older private tensors, as its own were lost with a disk: nobody
        can open it again."""
        own, fused = self.rows("own"), self.rows("fused")
        there = {row["round"] for row in own}
        return candidates(own, [row for row in fused if row["round"] in there or self.meta("private") != "1"])

    def best_model(self, *kinds: ModelKind) -> Candidate | None:
        """The best of these kinds, or of all."""
        return find_best([one for one in self.candidates() if one.kind in (kinds or KINDS)])

    def rounds_fused(self) -> int:
        """How many rounds the run has had: fewer than planned where it ended early."""
        row = self._one("SELECT max(round) AS found FROM fused")
        return row["found"] or 0 if row else 0

    def last_unvalidated(self) -> Round | None:
        """The last fused model, while this site's validation of it is still to come: it may turn out the best."""
        row = self._one("SELECT round, validated FROM fused WHERE round > 0 ORDER BY round DESC LIMIT 1")
        return row["round"] if row and not row["validated"] else None

    def _write(self, query: str, values: tuple[Any, ...]) -> None:
        """Within the transaction, or as one of its own."""
        if self._db.in_transaction:
            self._db.execute(query, values)
        else:
            with self.transaction():
                self._db.execute(query, values)

    def _one(self, query: str, *values: Any) -> sqlite3.Row | None:
        """Of a query that gives one row at most."""
        return next(iter(self._rows(query, *values)), None)

    def _rows(self, query: str, *values: Any) -> list[sqlite3.Row]:
        """Whatever is read of an open journal comes through here. Raises: DiskFailed, LocalStateError."""
        try:
            return self._db.execute(query, values).fetchall()
        except sqlite3.ProgrammingError:  # a bug of ours: another thread, say
            raise
        except sqlite3.Error as exc:
            raise _failed("read", exc) from exc


def _decoded(row: sqlite3.Row) -> dict[str, Any]:
    found = dict(row)
    if "content" in found:
        found["content"] = json.loads(found["content"])
    return found


def _failed(done: str, exc: sqlite3.Error) -> LocalStateError:
    """The error to raise. Where the disk fails or the file is malformed the process has been told: who catches it can
    neither go on with that journal.
    """
    text, code = f"the journal cannot be {done}: {exc}", code_of(exc)
    if code == sqlite3.SQLITE_IOERR:
        return disk_failed(text)
    if code in MALFORMED:
        remedy = "check the disk, then restore a backup: a restored node asks its peers for what came after it; "
        remedy += NO_BACKUP
        error = LocalStateError(text, remedy=remedy)
        durable.on_failure(error)
        return error
    return LocalStateError(text, remedy="check the disk; the node goes on from its journal after a restart")
