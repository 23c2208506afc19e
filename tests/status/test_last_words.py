"""Why a daemon ended is told where people look when its console is gone: the log, and `status`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cluster import WAIT_S, Cluster

from hsl_node.errors import (
    AlreadyRunning,
    ConfigError,
    DataError,
    DataUnavailable,
    DiskFailed,
    LocalStateError,
    NotInitialised,
)
from hsl_node.federation.config import AnchorCard
from hsl_node.federation.plan import Plan
from hsl_node.host import event_log
from hsl_node.host.layout import Layout
from hsl_node.node import launch
from hsl_node.status import last_words
from hsl_node.sync.store.journal import Journal

PLAN = Plan(method="fedavg", rounds=2, epochs_per_round=1)
NAMES = ("ash", "birch")


def shown(state: Path, *options: str) -> str:
    command = [sys.executable, "-m", "hsl_node", "--state", str(state), "status", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 3, done.stderr
    return done.stdout


def warnings(state: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(shown(state, "--json"))["warnings"]
    return found


def last_error(state: Path) -> dict[str, Any]:
    *_, last = event_log.tail(state, 10)
    assert (last["level"], last["event"]) == ("error", "ended")
    return last


def set_in_node_toml(state: Path, lines: str) -> None:
    with (state / "node.toml").open("a") as file:
        file.write(lines)


def waiting_for_birch(cluster: Cluster) -> None:
    """ash is in a phase in which no training is due."""
    cluster.start("ash")
    cluster.wait_until("ash", lambda s: s["waiting_for"] == ["birch"], "waiting for birch")


def test_a_clean_stop_is_shown_as_one_and_a_kill_as_an_end_without_a_word(tmp_path: Path) -> None:
    with Cluster(tmp_path, NAMES, PLAN) as cluster:
        state = cluster.layout("ash").state
        waiting_for_birch(cluster)
        assert cluster.stop("ash") == 0
        assert shown(state).startswith("not running  stopped ")
        assert json.loads(shown(state, "--json"))["ended"]["how"] == "stopped"
        assert not warnings(state)
        waiting_for_birch(cluster)
        assert cluster.status("ash")["ended"] is None
        cluster.kill("ash")
        (warning,) = warnings(state)
        assert warning["code"] == "ended" and "without a word" in warning["text"]
        assert "! the daemon ended without a word" in shown(state)


LAST_COMMIT = """
import sqlite3
from hsl_node.status import last_words
class Failing:
    def __init__(self, db): self._db = db
    def __getattr__(self, name): return getattr(self._db, name)
    def execute(self, query, *values):
        if query == "COMMIT":
            error = sqlite3.OperationalError("disk I/O error")
            error.sqlite_errorcode = sqlite3.SQLITE_IOERR_FSYNC
            raise error
        return self._db.execute(query, *values)
note = last_words.note
def noted(journal, error):
    if error is None:
        journal._db = Failing(journal._db)
    note(journal, error)
last_words.note = noted
"""


def test_threat_23_a_disk_that_fails_in_the_last_commit_of_a_clean_stop_makes_it_none(tmp_path: Path) -> None:
    with Cluster(tmp_path, NAMES, PLAN, trainer=[], prelude=LAST_COMMIT) as cluster:
        waiting_for_birch(cluster)
        assert cluster.stop("ash") == 15, cluster.output("ash")
        assert last_error(cluster.layout("ash").state)["reason"] == "the journal cannot be written: disk I/O error"


def test_a_data_path_that_is_gone_ends_the_start_though_no_training_is_due_and_is_told(tmp_path: Path) -> None:
    images = tmp_path / "images"
    with Cluster(tmp_path, NAMES, PLAN) as cluster:
        state = cluster.layout("ash").state
        waiting_for_birch(cluster)
        assert cluster.stop("ash") == 0
        before = len(event_log.tail(state, 1000))
        set_in_node_toml(state, f'\n[data]\npath = "{images}"\n')
        assert cluster.start("ash").wait(WAIT_S) == 15, "systemd starts it again, until the share is mounted"
        assert f"{images} cannot be read: No such file or directory" in cluster.output("ash")
        assert "started" not in [e["event"] for e in event_log.tail(state, 1000)[before:]]
        (warning,) = warnings(state)
        assert "data.path" in warning["text"] and "hsl-node --state" in warning["fix"] and warning["since"]
        assert "data.path" in last_error(state)["reason"] and "doctor" in last_error(state)["what_to_do"]
        assert str(images) not in json.dumps([warning, last_error(state)]), "invariant 9: no path in status and log"
        assert shown(state).startswith("not running  ended by an error ")
        images.mkdir()
        (images / "one.png").write_bytes(b"")
        cluster.start_all()
        cluster.wait_finished()


def test_a_share_that_goes_between_the_start_and_the_trainers_look_is_told_from_bad_images(tmp_path: Path) -> None:
    images = tmp_path / "images"
    with pytest.raises(DataUnavailable) as gone, launch._share_named(images):
        raise DataError("one.png cannot be read")
    images.mkdir()
    with pytest.raises(DataUnavailable, match="mounted") as empty, launch._share_named(images):
        raise DataError("one.png cannot be read")
    (images / "one.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"one\.png") as bad, launch._share_named(images):
        raise DataError("one.png cannot be read")
    assert [e.value.exit_code for e in (gone, empty, bad)] == [15, 15, 78]


def test_the_unit_starts_again_what_another_try_may_mend() -> None:
    unit = (Path(__file__).resolve().parents[2] / "systemd" / "hsl-node.service").read_text()
    (prevented,) = (line for line in unit.splitlines() if line.startswith("RestartPreventExitStatus="))
    stay_down = {int(code) for code in prevented.partition("=")[2].split()}
    assert stay_down == {NotInitialised.exit_code, AlreadyRunning.exit_code, ConfigError.exit_code}
    assert DataUnavailable.exit_code not in stay_down


def test_a_gpu_that_is_not_there_ends_the_start_though_no_training_is_due(tmp_path: Path) -> None:
    with Cluster(tmp_path, NAMES, PLAN) as cluster:
        state = cluster.layout("ash").state
        waiting_for_birch(cluster)
        assert cluster.stop("ash") == 0
        set_in_node_toml(state, '\n[train]\ndevice = "cuda:0"\n')
        assert cluster.start("ash").wait(WAIT_S) == 78
        assert "no GPU" in warnings(state)[0]["text"]


def test_what_ends_a_start_before_there_is_a_state_is_told_too(tmp_path: Path) -> None:
    anchor = AnchorCard(name="reference", fingerprint="a" * 64, images=10, image_size=32)
    with Cluster(tmp_path, NAMES, PLAN, anchor=anchor) as cluster:
        state = cluster.layout("ash").state
        assert cluster.start("ash").wait(WAIT_S) == 78
        assert "no anchor set" in last_error(state)["reason"]
        Journal.create(Layout(state).journal).close()
        assert cluster.start("ash").wait(WAIT_S) == 78
        assert "no anchor set" in warnings(state)[0]["text"]


def test_a_second_start_says_nothing_in_the_first_ones_name(tmp_path: Path) -> None:
    with Cluster(tmp_path, NAMES, PLAN) as cluster:
        waiting_for_birch(cluster)
        first = cluster.processes["ash"]
        assert cluster.start("ash").wait(WAIT_S) == 11
        assert "ended" not in [e["event"] for e in event_log.tail(cluster.layout("ash").state, 50)]
        cluster.kill("ash")
        cluster.processes["ash"] = first
        assert cluster.stop("ash") == 0


def test_a_daemon_that_was_killed_while_it_left_says_who_had_asked(tmp_path: Path) -> None:
    with Journal.create(tmp_path / "journal.sqlite3") as journal:
        last_words.note_running(journal)
        last_words.note_asked(journal, "SIGTERM")
        killed = last_words.find_ending(journal)
        assert killed is not None and killed.how == "killed"
        assert killed.text.startswith(
            "the daemon ended without a word, while it was leaving, asked by SIGTERM: killed,"
        )
        last_words.note(journal, None)
        stopped = last_words.find_ending(journal)
        assert stopped is not None and (stopped.how, stopped.text) == ("stopped", "asked by SIGTERM")


@pytest.mark.parametrize(
    ("error", "how"),
    [
        (None, "stopped"),
        (LocalStateError("set back", remedy="start it again"), "failed"),
        (DataError("/images/jane_doe.png: broken"), "failed"),
        (ValueError("/images/jane_doe.png"), "failed"),
        (DiskFailed("fsync failed"), "killed"),
    ],
)
def test_each_end_has_its_words_and_none_names_an_image(tmp_path: Path, error: Exception | None, how: str) -> None:
    """After a failed fsync nothing more is written, so the journal knows only that it had begun."""
    with Journal.create(tmp_path / "journal.sqlite3") as journal:
        assert last_words.find_ending(journal) is None
        last_words.note_running(journal)
        last_words.note(journal, error)
        found = last_words.find_ending(journal)
        assert found is not None and found.how == how
        assert (found.text != "") == (error is not None) and "jane_doe" not in repr(found)
