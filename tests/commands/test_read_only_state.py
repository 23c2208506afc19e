"""A state directory on a file system that is mounted read-only, as after an error of the disk: then one looks."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import made
from federations import FederationOf
from trained_state import make_state

from hsl_node.host.layout import Layout

READ_ONLY = ["unshare", "--mount", "sh", "-c", 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"']
READING = (
    "status", "status --json", "verify", "verify --export {out}/audit", "report --out {out}/report.html",
    "round history", "round show 1", "logs", "support-bundle --out {out}/bundle.tar.gz", "backup {out}/ash.tar",
    "federation show", "peer list", "card",
)  # fmt: skip
WRITING = ("start", "peer revoke birch", "key rotate", "recover --from-peers", "federation join {here}/trees.toml")
LEFT = ("as an open node leaves it", "closed", "with a log of changes")


@pytest.fixture
def state(tmp_path: Path, federation_of: FederationOf) -> Path:
    members = federation_of(2)
    state = make_state(tmp_path, members, "ash")
    made(tmp_path / "other")
    shutil.copytree(tmp_path / "other" / "keys", state / "keys", dirs_exist_ok=True)
    shutil.copy(state / "federation.toml", tmp_path / "trees.toml")
    Layout(state).event_log.write_text('{"event": "checkpoint verified"}\n')
    (tmp_path / "out").mkdir()
    return state


def leave(state: Path, how: str) -> None:
    """What SQLite left beside the journal when the disk became read-only."""
    journal = Layout(state).journal
    wal, shm = (journal.with_name(journal.name + end) for end in ("-wal", "-shm"))
    wal.unlink(missing_ok=True)
    shm.unlink(missing_ok=True)
    if how == "closed":
        return
    db = sqlite3.connect(journal, isolation_level=None)
    db.execute("INSERT INTO notes VALUES (1, 'warning', 'last', 'only in the log of changes')")
    log, index = wal.read_bytes(), shm.read_bytes()
    db.close()
    assert log
    wal.write_bytes(log)
    if how != LEFT[2]:
        shm.write_bytes(index)


def read_only(state: Path, words: str) -> subprocess.CompletedProcess[str]:
    if os.geteuid() != 0 or subprocess.run([*READ_ONLY, str(state), "true"], capture_output=True).returncode:
        pytest.skip("needs root, and unshare --mount")
    arguments = words.format(out=state.parent / "out", here=state.parent).split()
    command = [*READ_ONLY, str(state), sys.executable, "-m", "hsl_node", "--state", str(state), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.sample(6)
@pytest.mark.parametrize("how", LEFT)
@pytest.mark.parametrize("words", READING)
def test_a_command_that_reads_works_there(state: Path, words: str, how: str) -> None:
    leave(state, how)
    done = read_only(state, words)
    expected = {"status": 3, "verify": 14}.get(words.split()[0], 0)  # no daemon; documents that are none
    assert done.returncode == expected, done.stderr
    assert "read-only" not in done.stderr and "chmod" not in done.stderr
    if words == "status" and how != "closed":
        assert "only in the log of changes" in done.stdout


@pytest.mark.parametrize("words", WRITING)
def test_one_that_writes_says_why_it_cannot_and_what_works_meanwhile(two: tuple[Path, Path], words: str) -> None:
    done = read_only(two[0], words)
    assert done.returncode not in (0, 1) and "Traceback" not in done.stderr, done.stderr
    assert "its file system is mounted read-only" in done.stderr and "chmod" not in done.stderr
    assert "`dmesg` says why" in done.stderr


def test_doctor_names_it_as_the_thing_to_mend(state: Path) -> None:
    done = read_only(state, "doctor")
    assert "its file system is mounted read-only" in done.stdout and "chmod" not in done.stdout
    assert "backup --to FOLDER" in " ".join(done.stdout.split())
