"""Disks that are full, fail or lose power: afterwards there is the old file or the new one, and all promises hold.

Threats 21 and 23. The faults: `faulty_disk.py`. Kills without a fault of the disk: `test_crash_points.py`.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import resource
import shutil
import struct
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cluster as clusters
import learning
import numpy as np
import pytest
import torch
from cluster import Cluster
from faulty_disk import FaultyDisk, Recorder, Write
from federations import make_federation
from inbox_site import ASH, BIRCH, ROUND, Site
from trainer_process import Process, state_of
from weights import weights

from hsl_node.admin import enrol, keys
from hsl_node.errors import DiskFailed, HslError, LocalStateError, UsageError
from hsl_node.federation import identity, keyring
from hsl_node.federation.names import Digest, Kind, Peer
from hsl_node.federation.node_toml import DataConfig
from hsl_node.federation.plan import Plan
from hsl_node.host import durable, files
from hsl_node.host.durable import Step
from hsl_node.node.peers.links import Asking
from hsl_node.sync.inbox.receive import Arrival
from hsl_node.sync.store.journal import Journal
from hsl_node.sync.store.layout import Layout
from hsl_node.sync.store.store import Store
from hsl_node.train import checkpoint, loop
from hsl_node.train.checkpoint import Best, RoundState, Saved, Validation
from hsl_node.train.data.dataset import open_dataset
from hsl_node.train.data.ledger import Ledger, read_ledger, write_ledger
from hsl_node.train.methods import METHODS
from hsl_node.train.site import initial_weights
from hsl_node.weights.checkpoint_file import read_weights, schema_of, sha256_of, write_weights
from hsl_node.weights.fuse_files import fuse_files

Body = Callable[[Path], None]

# ------------------------------------------------------------------ what is written: (before, again, is it whole?)


def fused(folder: Path, value: float = 3.0) -> None:
    paths = {Peer(p): folder / f"{p}.safetensors" for p in ("ash", "birch")}
    if not all(p.exists() for p in paths.values()):
        for path in paths.values():
            write_weights(path, weights(1.0))
    fuse_files("mean", paths, dict.fromkeys(paths, 1), schema_of(weights()), folder / "fused.safetensors")


def saved(folder: Path, epoch: int) -> None:
    """As the training loop does: the best weights, then the epoch checkpoint that names them."""
    nothing = Validation(None, None)
    state = RoundState("run", 1, "0" * 64, nothing, epoch, 0, Best(epoch, nothing, "", 0), False, 1, "cpu", "float32")
    digest = write_weights(checkpoint.best_path(folder, state), weights(float(epoch)), Step.TRAINER_BEST)
    state = replace(state, best=Best(epoch, nothing, digest, 1))
    checkpoint.save(folder, Saved(state, {"w": torch.full((5000,), float(epoch))}, {}))


def saved_epoch(folder: Path) -> int:
    """The epoch that a restarted trainer goes on from; its model and best weights are those of that epoch."""
    found = checkpoint.load(folder)
    if found is None:
        return 0
    assert found.state.best is not None
    assert torch.equal(found.model["w"], torch.full((5000,), float(found.state.epoch)))
    assert sha256_of(checkpoint.best_path(folder, found.state)) == found.state.best.sha256
    return found.state.epoch


def text_of(path: Path) -> str:
    return path.read_text() if path.exists() else ""


# name: (makes the old, makes the new, what is there: "" or 0 nothing, else it was whole)
WRITERS: dict[str, tuple[Body, Body, Callable[[Path], object]]] = {
    "weights": (
        lambda f: (write_weights(f / "x", weights(1.0)), None)[1],
        lambda f: (write_weights(f / "x", weights(2.0)), None)[1],
        lambda f: read_weights(f / "x")["a.weight"].mean() if (f / "x").exists() else 0,
    ),
    "fusion": (
        lambda f: [write_weights(f / f"{p}.safetensors", weights(1.0)) for p in ("ash", "birch")] and None,
        fused,
        lambda f: read_weights(f / "fused.safetensors")["a.weight"].mean() if (f / "fused.safetensors").exists() else 0,
    ),
    "epoch checkpoint": (lambda f: saved(f, 1), lambda f: saved(f, 2), saved_epoch),
    "settings": (
        lambda f: files.write_new(f / "node.toml", "old" * 999),
        lambda f: files.write_new(f / "node.toml", "new" * 999, replace=True),
        lambda f: text_of(f / "node.toml"),
    ),
    "key": (
        lambda f: None,
        lambda f: (identity.generate(f / "key"), None)[1],
        lambda f: bool(identity.load(f / "key")) if (f / "key").exists() else 0,
    ),
    "ledger": (
        lambda f: write_ledger(f / "splits.json", Ledger({"page": {"old": 1}})),
        lambda f: write_ledger(f / "splits.json", Ledger({"page": {"new": 1}})),
        lambda f: str(read_ledger(f / "splits.json").pages),
    ),
}


@pytest.fixture(params=sorted(WRITERS))
def writer(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Body, Callable[[Path], object], object]:
    """A folder with the old file, how the new one is written, how to look, and what an undisturbed write gives."""
    old, new, look = WRITERS[request.param]
    for name in ("folder", "undisturbed"):
        (tmp_path / name).mkdir(mode=0o700)
        old(tmp_path / name)
    new(tmp_path / "undisturbed")
    assert look(tmp_path / "folder") != look(tmp_path / "undisturbed")
    return tmp_path / "folder", new, look, look(tmp_path / "undisturbed")


# ------------------------------------------------------------------ full, in error, short


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


# ------------------------------------------------------------------ power loss


def test_after_a_power_loss_at_any_moment_there_is_the_old_file_or_the_new_one(
    writer: tuple[Path, Body, Callable[[Path], object], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, new, look, expected = writer
    before = look(folder)
    disk = Recorder(folder)
    with monkeypatch.context() as patch:
        patch.setattr(durable, "disk", disk)
        new(folder)
        disk.mark("returned")
    found = []
    for after, marks in disk.after_power_loss(tmp_path / "reboots"):
        for path in after.iterdir():
            path.chmod(0o600)
        found.append(look(after))
        assert found[-1] == expected if "returned" in marks else found[-1] in (before, expected)
        shutil.rmtree(after)
    disk.close()
    assert before in found and expected in found and len(found) > 10


def test_the_model_finds_a_missing_fsync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else all of the above would hold of nothing."""
    for forgotten in ("file", "folder"):
        folder = tmp_path / forgotten
        folder.mkdir()
        files.write_new(folder / "x", "old")
        disk = Recorder(folder)
        with monkeypatch.context() as patch:
            patch.setattr(durable, "disk", disk)
            patch.setattr(durable, "sync" if forgotten == "file" else "sync_folder", lambda *_: None)
            files.write_new(folder / "x", "new", replace=True)
            disk.mark("returned")
        found = {
            (text_of(after / "x"), "returned" in marks)
            for after, marks in disk.after_power_loss(tmp_path / f"r{forgotten}")
        }
        disk.close()
        assert ("", True) in found if forgotten == "file" else ("old", True) in found


@pytest.mark.parametrize("foreign", [False, True])
@pytest.mark.parametrize("synced", [False, True])
def test_what_was_acknowledged_survives_a_power_loss_at_any_moment_of_the_intake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, foreign: bool, synced: bool
) -> None:
    """Claim, check, admit, journal, receipt. `synced`: had the sender's bytes reached the disk when it renamed them?"""
    root = tmp_path / "state"
    store = Store(Layout(root))
    site = Site(root, make_federation(3), schema_of(weights()), foreign)
    for folder in ("parts", "inbox", "receipts"):
        (site.homes / BIRCH / folder).mkdir(parents=True, exist_ok=True)
    data = site.good_data()
    (root / "made.safetensors").unlink()
    manifest = site.manifest(data)
    name = site.deliver(data, manifest)
    (site.claimed / BIRCH).mkdir(parents=True)
    disk = Recorder(root)
    inbox_file = site.inbox / str(name.of(Kind.DATA))
    if not synced:
        inode = os.stat(inbox_file).st_ino
        disk.files[inode] = b""
        disk.log.append(Write(inode, 0, data))
    with monkeypatch.context() as patch:
        patch.setattr(durable, "disk", disk)
        (arrival,) = site.scan()
        assert isinstance(arrival, Arrival) and arrival.data is not None
        store.admit(arrival.data, ROUND, BIRCH)
        disk.mark("journal")  # SQLite's own fsync stands here: the claim is remembered
        site.answer(manifest)
        disk.mark("answered")
    store.close()
    seen = set()
    receipt = f"quarantine/homes/birch/receipts/{name.of(Kind.RECEIPT)}"
    for after, marks in disk.after_power_loss(tmp_path / "reboots", samples=3):
        admitted = Layout(after).inbox(ROUND, BIRCH)
        there = admitted.exists() and admitted.read_bytes() == data
        assert there or not admitted.exists(), "a torn checkpoint lies where only checked ones do"
        assert there or not (marks & {"journal", "answered"} or (after / receipt).exists())
        assert (after / receipt).exists() or "answered" not in marks
        assert (after / receipt).exists() or (after / "quarantine/homes/birch/inbox" / str(name)).exists()
        if (after / receipt).exists():
            assert identity.verify(
                (after / receipt).read_bytes(), site.members.identities[ASH].public, "hsl-receipt@v1"
            )
        seen.add((there, (after / receipt).exists()))
        shutil.rmtree(after)
    disk.close()
    assert seen == {(False, False), (True, False), (True, True)}


# ------------------------------------------------------------------ killed first, then the power goes


class Killed(BaseException):
    """kill -9 between a rename and the fsync of its folder: a file is there that a power loss still takes away."""


def _dies_there(step: Step) -> None:
    raise Killed


def best_to_outbox(root: Path) -> Path:
    (root / "trainer").mkdir(exist_ok=True)
    nothing = Validation(None, None)
    state = RoundState("run", 1, "0" * 64, nothing, 5, 0, Best(5, nothing, "", 0), True, 1, "cpu", "float32")
    path, out = checkpoint.best_path(root / "trainer", state), root / "r1.safetensors"
    digest = sha256_of(path) if path.exists() else write_weights(path, weights(1.0))
    loop._write_best(root / "trainer", replace(state, best=Best(5, nothing, digest, 1)), out)
    return out


def initial(root: Path) -> Path:
    out = root / "r0.safetensors"
    plan = learning.small_plan()
    initial_weights(root, plan, METHODS[plan.method], out)
    return out


def ledger(root: Path) -> Path:
    plan = learning.small_plan()
    open_dataset(
        DataConfig(path=root.parent / "images"), plan, cache=root.parent / "cache", ledger=root / "splits.json"
    )
    return root / "splits.json"


def evidence(root: Path) -> Path:
    return Store.keep_evidence(SimpleNamespace(layout=Layout(root)), "proof.manifest", b"signed")  # type: ignore[arg-type]


def ring(root: Path) -> Path:
    """A revocation; given again it says that this is done already, and what it says is so."""
    path = keyring.path_of(root)
    if not path.exists():
        files.write_new(path, "", step=Step.KEYS_RING)
    with pytest.raises(UsageError), keys.told_again(root):
        raise UsageError("revoked already")
    return path


def fetched(root: Path) -> Path:
    out = root / "r2.safetensors"
    if not out.exists():
        write_weights(out, weights(2.0), Step.RECOVERY_PLACE)
    assert asyncio.run(Asking(SimpleNamespace()).get(sha256_of(out), out, {}))  # type: ignore[arg-type]
    return out


def own_key(root: Path) -> Path:
    """Of an `init` that was cut short, and is completed."""
    enrol.init(root, name="ash", address="127.0.0.1:9001", listen=None, data=None)
    return Layout(root).key


@pytest.mark.parametrize("take", [best_to_outbox, initial, ledger, evidence, ring, fetched, own_key])
def test_threat_23_a_file_taken_as_a_killed_process_left_it_survives_a_power_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, take: Callable[[Path], Path]
) -> None:
    """Its successor finds it, and need not write it: it is as durable as one that was written all the same."""
    root = tmp_path / "state"
    (root / "evidence").mkdir(parents=True)
    state_of(tmp_path)  # images
    Layout(root).make()
    if take is ledger:
        take(root).unlink()  # what is cached is there
    if take is own_key:
        (root / "node.toml").unlink()  # `init` has not come so far
    if take is best_to_outbox:
        take(root).unlink()
    disk = Recorder(root)
    with monkeypatch.context() as patch:
        patch.setattr(durable, "disk", disk)
        patch.setattr(durable, "renamed", _dies_there)
        with pytest.raises(Killed):
            take(root)
    with monkeypatch.context() as patch:
        patch.setattr(durable, "disk", disk)
        path = take(root)
        disk.mark("taken")
    content, lost = path.read_bytes(), 0
    for after, marks in disk.after_power_loss(tmp_path / "reboots", samples=2):
        there = after / path.relative_to(root)
        if "taken" in marks:
            assert there.exists() and there.read_bytes() == content
        lost += not there.exists()
        shutil.rmtree(after)
    disk.close()
    assert lost, "it was never in danger"


def test_threat_23_a_checkpoint_admitted_just_before_a_kill_is_durable_before_its_receipt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the rename into inbox/ and the fsync; the next process finds it there and answers."""
    root = tmp_path / "state"
    store = Store(Layout(root))
    site = Site(root, make_federation(3), schema_of(weights()), False)
    for folder in ("parts", "inbox", "receipts"):
        (site.homes / BIRCH / folder).mkdir(parents=True, exist_ok=True)
    data = site.good_data()
    manifest = site.manifest(data)
    site.deliver(data, manifest)
    (site.claimed / BIRCH).mkdir(parents=True)
    disk, admitted = Recorder(root), store.layout.inbox(ROUND, BIRCH)
    with monkeypatch.context() as patch:
        patch.setattr(durable, "disk", disk)
        (arrival,) = site.scan()
        assert isinstance(arrival, Arrival) and arrival.data is not None
        patch.setattr(durable, "renamed", _dies_there)
        with pytest.raises(Killed):
            store.admit(arrival.data, ROUND, BIRCH)
    with monkeypatch.context() as patch:
        patch.setattr(durable, "disk", disk)
        (arrival,) = site.scan(kept=lambda manifest: admitted)
        assert isinstance(arrival, Arrival) and arrival.data is None, "it was admitted already"
        site.answer(manifest)
        disk.mark("answered")
    store.close()
    lost = 0
    for after, marks in disk.after_power_loss(tmp_path / "reboots", samples=3):
        there = Layout(after).inbox(ROUND, BIRCH)
        assert "answered" not in marks or there.read_bytes() == data
        lost += not there.exists()
        shutil.rmtree(after)
    disk.close()
    assert lost, "it was never in danger"


# ------------------------------------------------------------------ the journal


def frames_of(wal: bytes) -> list[int]:
    """Where the frames of a write-ahead log end: a header of 32 bytes, then 24 and a page each."""
    page = struct.unpack(">I", wal[8:12])[0]
    return list(range(32, len(wal) + 1, 24 + page))


def opened(folder: Path, main: bytes, wal: bytes) -> dict[str, Any] | None:
    """The state that a restart finds. Raises what makes a journal unusable."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "journal.sqlite3").write_bytes(main)
    (folder / "journal.sqlite3-wal").write_bytes(wal)
    journal = Journal.create(folder / "journal.sqlite3")
    try:
        assert journal._db.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
        state = journal.state()
        signed = [row["round"] for row in journal.rows("signed")]
        assert signed == list(range(1, (state or {"round": 0})["round"] + 1))  # of one transaction with the state
        return state
    finally:
        journal.close()


def committed(journal: Journal, round: int) -> None:
    with journal.transaction():
        journal.record_signed(round, Digest(f"{round:064x}"), b"document" * 500)
        journal.save_state({"round": round})


def test_a_power_loss_anywhere_in_the_write_ahead_log_leaves_a_committed_state(tmp_path: Path) -> None:
    """Cut at every frame and in mid-frame; and the rest of the file zeros or noise, as a disk may leave it."""
    path = tmp_path / "journal.sqlite3"
    journal = Journal.create(path)
    journal._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    main, wal = path.read_bytes(), path.with_name("journal.sqlite3-wal")
    ends = {0: 0}  # round -> length of the log when its commit had returned, fsynced
    for round in range(1, 7):
        committed(journal, round)
        ends[round] = wal.stat().st_size
    log = wal.read_bytes()
    journal.close()
    frames = frames_of(log)
    assert len(frames) > len(ends) and frames[-1] == ends[6] == len(log)
    cuts = sorted({*frames, *(f + n for f in frames[:-1] for n in (1, 23, 24, 700)), 0, 31})
    found = set()
    for cut in cuts:
        expected = max(round for round, end in ends.items() if end <= cut)
        for rest in (b"", bytes(5000), np.random.default_rng(cut).bytes(5000)):
            state = opened(tmp_path / "reboot", main, log[:cut] + rest)
            assert (state or {"round": 0})["round"] == expected, cut
        found.add(expected)
    assert found == set(ends)


def test_a_power_loss_while_the_log_is_moved_into_the_database_loses_nothing(tmp_path: Path) -> None:
    """A checkpoint overwrites pages in any order; the log stays until all of them are durable."""
    path = tmp_path / "journal.sqlite3"
    journal = Journal.create(path)
    journal._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    before = path.read_bytes()
    for round in range(1, 7):
        committed(journal, round)
    log = path.with_name("journal.sqlite3-wal").read_bytes()
    journal._db.execute("PRAGMA wal_checkpoint(FULL)")
    after = path.read_bytes()
    journal.close()
    page = struct.unpack(">I", log[8:12])[0]
    changed = [n for n in range(0, len(after), page) if before[n : n + page] != after[n : n + page]]
    assert len(changed) > 3
    for reached in range(len(changed) + 1):
        for order in (changed, changed[::-1]):
            main = bytearray(before.ljust(max(len(before), *(n + page for n in order[:reached]), 0), b"\0"))
            for n in order[:reached]:
                main[n : n + page] = after[n : n + page]
            assert opened(tmp_path / "reboot", bytes(main), log) == {"round": 6}


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
