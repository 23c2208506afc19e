"""A power loss at any moment leaves the old file or the new one, and what was acknowledged is there.

The faults: `faulty_disk.py`. Kills without a fault of the disk: `test_crash_points.py`.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import learning
import numpy as np
import pytest
from faulty_disk import Recorder, Write
from federations import make_federation
from inbox_site import ASH, BIRCH, ROUND, Site
from trainer_process import state_of
from weights import weights
from writers import Body, text_of

from hsl_node.admin import enrol, keys
from hsl_node.errors import UsageError
from hsl_node.federation import identity
from hsl_node.federation.names import Digest, Kind
from hsl_node.federation.node_toml import DataConfig
from hsl_node.host import durable, files
from hsl_node.host.durable import Step
from hsl_node.host.layout import Layout
from hsl_node.node.peers.fetch import Fetch
from hsl_node.sync.inbox.receive import Arrival
from hsl_node.sync.store.journal import Journal
from hsl_node.sync.store.store import Store
from hsl_node.train import checkpoint, loop
from hsl_node.train.checkpoint import Best, RoundState, Validation, Worth
from hsl_node.train.data.dataset import open_dataset
from hsl_node.train.methods import method_of
from hsl_node.train.site import initial_weights
from hsl_node.weights.checkpoint_file import schema_of, write_weights
from hsl_node.weights.whole import sha256_of


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


@pytest.mark.sample(2)
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
    state = RoundState(
        run="run", round=1, base_sha256="0" * 64, worth=Worth(nothing, None), epoch=5,
        best=Best(5, nothing, "", 0, "", {}), finished=True, threads=1, device="cpu", precision="float32",
    )  # fmt: skip
    path, out = checkpoint.best_path(root / "trainer", 1, 5), root / "r1.safetensors"
    digest = sha256_of(path) if path.exists() else write_weights(path, weights(1.0))
    best = Best(5, nothing, digest, 1, digest, {})
    loop._write_best(frozenset(weights(1.0)), root / "trainer", replace(state, best=best), out, root / "own_r1")
    return out


def initial(root: Path) -> Path:
    out = root / "r0.safetensors"
    plan = learning.small_plan()
    initial_weights(root, plan, method_of(plan.method), out)
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
    path = Layout(root).keyring_toml
    if not path.exists():
        files.write_new(path, "", step=Step.KEYS_RING)
    with pytest.raises(UsageError), keys.told_again(root):
        raise UsageError("revoked already")
    return path


def fetched(root: Path) -> Path:
    out = root / "r2.safetensors"
    if not out.exists():
        write_weights(out, weights(2.0), Step.RECOVERY_PLACE)
    assert asyncio.run(Fetch(*cast(Any, (None, None, None)), 0).get(sha256_of(out), out, {}))
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
    disk = Recorder(root)
    with monkeypatch.context() as patch:
        patch.setattr(durable, "disk", disk)
        (arrival,) = site.scan()
        assert isinstance(arrival, Arrival) and arrival.data is not None
        patch.setattr(durable, "renamed", _dies_there)
        with pytest.raises(Killed):
            store.admit(arrival.data, ROUND, BIRCH)
    with monkeypatch.context() as patch:
        patch.setattr(durable, "disk", disk)
        (arrival,) = site.scan()
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
    with Journal.create(folder / "journal.sqlite3") as journal:
        assert journal._db.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
        state = journal.state()
        signed = [row["round"] for row in journal.rows("signed")]
        assert signed == list(range(1, (state or {"round": 0})["round"] + 1))  # of one transaction with the state
        return state


def committed(journal: Journal, round: int) -> None:
    with journal.transaction():
        journal.record_signed(round, Digest(f"{round:064x}"), b"document" * 500)
        journal.save_state({"round": round})


def test_a_power_loss_anywhere_in_the_write_ahead_log_leaves_a_committed_state(tmp_path: Path) -> None:
    """Cut at every frame and in mid-frame; and the rest of the file zeros or noise, as a disk may leave it."""
    path = tmp_path / "journal.sqlite3"
    with Journal.create(path) as journal:
        journal._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        main, wal = path.read_bytes(), path.with_name("journal.sqlite3-wal")
        ends = {0: 0}  # round -> length of the log when its commit had returned, fsynced
        for round in range(1, 7):
            committed(journal, round)
            ends[round] = wal.stat().st_size
        log = wal.read_bytes()
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
    with Journal.create(path) as journal:
        journal._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        before = path.read_bytes()
        for round in range(1, 7):
            committed(journal, round)
        log = path.with_name("journal.sqlite3-wal").read_bytes()
        journal._db.execute("PRAGMA wal_checkpoint(FULL)")
        after = path.read_bytes()
    page = struct.unpack(">I", log[8:12])[0]
    changed = [n for n in range(0, len(after), page) if before[n : n + page] != after[n : n + page]]
    assert len(changed) > 3
    for reached in range(len(changed) + 1):
        for order in (changed, changed[::-1]):
            main = bytearray(before.ljust(max(len(before), *(n + page for n in order[:reached]), 0), b"\0"))
            for n in order[:reached]:
                main[n : n + page] = after[n : n + page]
            assert opened(tmp_path / "reboot", bytes(main), log) == {"round": 6}
