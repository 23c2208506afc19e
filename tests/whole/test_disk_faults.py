"""Disks that are full, fail or lose power: afterwards there is the old file or the new one, and all promises hold.

Threats 21 and 23. The faults: `faulty_disk.py`. Kills without a fault of the disk: `test_crash_points.py`.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import cluster as clusters
import pytest
from cluster import Cluster
from faulty_disk import FaultyDisk
from trainer_process import Process, state_of
from writers import Body, text_of

from hsl_node.errors import DiskFailed, HslError, LocalStateError
from hsl_node.federation.plan import Plan
from hsl_node.host import durable, files
from hsl_node.host.durable import Step


@pytest.mark.parametrize("operation", ["open", "write", "fsync", "rename"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_fails_at_any_call_leaves_the_old_file_and_no_temporary_one(
    writer: tuple[Path, Body, Callable[[Path], object], object],
    operation: str,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, new, look, expected = writer
    told: list[DiskFailed] = []
    monkeypatch.setattr(durable, "on_failure", told.append)
    before = look(folder)
    nth = 0
    while True:
        nth += 1
        disk = FaultyDisk(operation, nth, code)
        with monkeypatch.context() as patch:
            patch.setattr(durable, "disk", disk)
            try:
                new(folder)
            except (OSError, HslError) as exc:
                error = exc
        if not disk.fired:
            break
        if operation == "fsync" or code == errno.EIO:
            assert len(told) == 1 and told[0].exit_code == 15
            assert isinstance(error, LocalStateError), error
        else:
            assert told == []  # there may be room again
        told.clear()
        assert list(folder.glob("**/*.tmp")) == []
        assert look(folder) in (before, expected)  # the new one where only the folder's fsync failed
        (folder / "key").unlink(missing_ok=True)  # never made over another one
    assert nth > 1 or (operation == "rename" and look(folder) is True), (
        "the fault was never injected"
    )  # a key is linked
    assert look(folder) == expected


def test_short_writes_are_completed(
    writer: tuple[Path, Body, Callable[[Path], object], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, new, look, expected = writer
    disk = FaultyDisk("write", -1, most=1000)
    monkeypatch.setattr(durable, "disk", disk)
    new(folder)
    assert look(folder) == expected and disk.calls >= 1


@pytest.mark.parametrize("code", [errno.EIO, errno.EROFS])
def test_an_error_of_another_file_that_is_read_meanwhile_is_no_failure_of_this_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """Of a share, say: the daemon would end, and its operator look at the wrong disk."""
    told: list[LocalStateError] = []
    monkeypatch.setattr(durable, "on_failure", told.append)
    files.write_new(tmp_path / "x", "old")
    error = OSError(code, os.strerror(code))
    with pytest.raises(OSError) as raised, durable.replacing(tmp_path / "x", Step.FILE_RESULT) as file:
        file.write(b"new")
        raise error
    assert raised.value is error and told == []
    assert [p.name for p in tmp_path.iterdir()] == ["x"] and text_of(tmp_path / "x") == "old"


def test_a_disk_that_fails_while_another_error_is_on_its_way_is_told_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was written is flushed where the file is closed."""
    told: list[LocalStateError] = []
    monkeypatch.setattr(durable, "on_failure", told.append)
    monkeypatch.setattr(durable, "disk", FaultyDisk("write", 1, errno.EIO))
    with pytest.raises(DiskFailed), durable.replacing(tmp_path / "x", Step.FILE_RESULT) as file:
        file.write(b"new")
        raise OSError(errno.EIO, "of a share")
    assert len(told) == 1 and list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------ a disk that fails ends the process


_BREAK = """
import sys; sys.path.insert(0, {helpers!r})
from faulty_disk import FaultyDisk
from hsl_node.host import durable
durable.disk = FaultyDisk("fsync", {nth}, 5)
"""
HELPERS = str(Path(__file__).resolve().parents[1] / "helpers")
PLAN = Plan(method="fedavg", fusion="mean", rounds=2, epochs_per_round=2, plateau_rounds=100)


def test_a_daemon_whose_fsync_fails_exits_15_and_goes_on_after_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each start comes as far as one more fsync, so the failing one is another each time."""
    with Cluster(tmp_path, ("ash", "birch"), PLAN, trainer=["--bytes", "20000"]) as cluster:
        cluster.start("birch")
        for nth in (1, 2, 4, 6):
            with monkeypatch.context() as patch:
                patch.setattr(clusters, "_START", _BREAK.format(helpers=HELPERS, nth=nth) + clusters._START)
                assert cluster.start("ash").wait(60) == 15, cluster.output("ash")
            assert "go on from" in cluster.output("ash") or "goes on from its journal" in cluster.output("ash")
        cluster.start("ash")
        cluster.wait_finished()
        assert cluster.fused("ash") == cluster.fused("birch")


def test_a_daemon_whose_journal_fails_exits_15_though_only_the_trainer_had_something_to_say(tmp_path: Path) -> None:
    """The kernel lets no file grow beyond the journal's log: SQLite sees an I/O error in recording an epoch."""
    with Cluster(tmp_path, ("ash", "birch"), PLAN, trainer=["--bytes", "20000"]) as cluster:
        for name in cluster.names:
            cluster.hold(name)
        cluster.start("birch")
        process = cluster.start("ash")
        cluster.wait_until("ash", lambda s: s["phase"] == "train", "training")
        log = cluster.layout("ash").state / "journal.sqlite3-wal"
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (log.stat().st_size, resource.RLIM_INFINITY))
        cluster.release("ash")
        assert process.wait(60) == 15, cluster.output("ash")
        assert "the journal cannot be written: disk I/O error" in cluster.output("ash")
        cluster.release("birch")
        cluster.start("ash")
        cluster.wait_finished()
        assert cluster.fused("ash") == cluster.fused("birch")


_UNREADABLE = """
import sqlite3, sys
class Failing(sqlite3.Connection):
    def execute(self, query, *values):
        if sys.argv[1].endswith("/ash") and {part!r} in query:
            error = sqlite3.OperationalError("disk I/O error")
            error.sqlite_errorcode = sqlite3.SQLITE_IOERR_READ
            raise error
        return super().execute(query, *values)
connect = sqlite3.connect
sqlite3.connect = lambda *args, **more: connect(*args, **more, factory=Failing)
"""


@pytest.mark.parametrize(
    ("part", "where"),
    [
        ("FROM signed WHERE", "where a checkpoint is signed"),
        ("FROM manifests WHERE peer = ? ORDER", "where a peer asks for a list, whose connection takes every error"),
    ],
)
def test_threat_23_a_daemon_whose_disk_fails_where_its_journal_is_read_exits_15(
    tmp_path: Path, part: str, where: str
) -> None:
    with Cluster(tmp_path, ("ash", "birch"), PLAN, trainer=[], prelude=_UNREADABLE.format(part=part)) as cluster:
        cluster.start_all()
        assert cluster.processes["ash"].wait(clusters.WAIT_S) == 15, cluster.output("ash")
        said = cluster.output("ash")
        assert "the journal cannot be read: disk I/O error" in said and "Traceback" not in said
        cluster.prelude = ""
        cluster.start("ash")
        cluster.wait_finished()
        assert cluster.fused("ash") == cluster.fused("birch")


def test_a_trainer_whose_fsync_fails_says_so_and_leaves_with_15(tmp_path: Path) -> None:
    state = state_of(tmp_path)
    code = (
        _BREAK.format(helpers=HELPERS, nth=1) + "from hsl_node.train.worker import main; sys.exit(main(sys.argv[1:]))"
    )
    process = Process(state, [sys.executable, "-c", code, "--state", str(state)])
    try:
        process.send(json.dumps({"job": "init", "out": str(state / "fused" / "r000000.safetensors")}))
        assert process.until(lambda e: e["event"] == "error")[-1]["error"] == "DiskFailed"
        assert process.popen.wait(60) == 15
    finally:
        process.close()
