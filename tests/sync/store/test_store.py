"""The state directory: one daemon holds it, files appear whole, nothing a peer can still ask for is deleted."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hsl_node.errors import AlreadyRunning, LocalStateError
from hsl_node.federation.names import Peer
from hsl_node.host.layout import Layout
from hsl_node.node.alarms import Alarms
from hsl_node.node.training import Training
from hsl_node.sync.store import room
from hsl_node.sync.store import store as store_module
from hsl_node.sync.store.holdings import held
from hsl_node.sync.store.journal import Journal
from hsl_node.sync.store.room import Quota
from hsl_node.sync.store.store import EVIDENCE_MAX_FILES, Store

RESERVE = 256 * 2**20  # of the disk, which the inbox never gives away
ASH, BIRCH, CEDAR = Peer("ash"), Peer("birch"), Peer("cedar")


@pytest.fixture
def store(tmp_path):
    opened = Store(Layout(tmp_path / "state"))
    yield opened
    opened.close()


HOLD = """
import sys
from pathlib import Path
from hsl_node.sync.store.store import Layout, Store
try:
    store = Store(Layout(Path(sys.argv[1])))
except Exception as exc:
    print(type(exc).__name__, exc.exit_code, exc)
else:
    print("holding", flush=True)
    sys.stdin.read()
"""


def second_process(state: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, str(state)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


# ------------------------------------------------------------------ one daemon at a time


def test_threat_26_a_second_process_on_the_same_state_is_refused_and_told_who_holds_it(store):
    with second_process(store.layout.state) as other:
        said, _ = other.communicate(timeout=60)
    assert said.startswith("AlreadyRunning 11 ")
    assert f"process {os.getpid()}" in said
    store.journal.save_state({"round": 1})  # the first is unharmed


def test_threat_26_a_killed_daemon_holds_nothing(tmp_path):
    with second_process(tmp_path / "state") as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "holding\n"
        with pytest.raises(AlreadyRunning, match=f"process {other.pid}"):
            Store(Layout(tmp_path / "state"))
        other.kill()
        other.wait(timeout=60)
        Store(Layout(tmp_path / "state")).close()


def test_a_child_process_does_not_hold_the_state_after_the_daemon_has_gone(tmp_path):
    """The trainer may outlive a killed daemon for a moment."""
    store = Store(Layout(tmp_path / "state"))
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        store.close()
        Store(Layout(tmp_path / "state")).close()
        child.communicate(b"\n", timeout=60)


def test_a_closed_store_can_be_opened_again(store):
    store.close()
    Store(store.layout).close()


def test_a_journal_that_cannot_be_opened_leaves_no_lock_behind(tmp_path):
    layout = Layout(tmp_path / "state")
    layout.make()
    layout.journal.write_bytes(b"garbage" * 1000)
    with pytest.raises(LocalStateError) as failure:
        Store(layout)
    layout.journal.unlink()
    Store(layout).close()  # while `failure` still holds the traceback, and with it the half-made store
    assert "journal" in str(failure.value)


def test_a_file_system_without_locks_is_not_taken_for_a_running_daemon(tmp_path, monkeypatch):
    def no_locks(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(store_module.fcntl, "flock", no_locks)
    with pytest.raises(LocalStateError, match="No locks available"):
        Store(Layout(tmp_path / "state"))


# ------------------------------------------------------------------ layout


def test_the_state_directory_is_private(store):
    state = store.layout.state
    folders = {path for path in (state, *state.rglob("*")) if path.is_dir()}
    assert {state / "keys", state / "run", state / "quarantine" / "homes"} <= folders
    assert {path.stat().st_mode & 0o777 for path in folders} == {0o700}


def test_a_full_set_lies_in_outbox_and_inbox(store):
    paths = {p: store.layout.checkpoint(12, p, ASH) for p in (ASH, BIRCH)}
    assert paths[ASH] == store.layout.state / "outbox" / "r000012.safetensors"
    assert paths[BIRCH] == store.layout.state / "inbox" / "r000012" / "birch.safetensors"


# ------------------------------------------------------------------ files


def claimed(store: Store, content: bytes) -> Path:
    path = store.layout.claimed / "x"
    path.write_bytes(content)
    return path


def test_a_verified_checkpoint_moves_into_its_rounds_folder(store):
    data = claimed(store, b"weights")
    store.admit(data, 3, BIRCH)
    assert store.layout.inbox(3, BIRCH).read_bytes() == b"weights"
    assert not data.exists()


def test_a_checkpoint_admitted_again_after_a_crash_replaces_itself(store):
    for _ in range(2):
        store.admit(claimed(store, b"weights"), 3, BIRCH)
    assert store.layout.inbox(3, BIRCH).read_bytes() == b"weights"


def test_threat_11_evidence_is_what_was_kept_last(store):
    """One document alone proves nothing: what lies there of a pair that a kill cut short goes."""
    first = store.keep_evidence("r000003_birch.manifest", b"first")
    assert first.read_bytes() == b"first"
    assert store.keep_evidence("r000003_birch.manifest", b"second") == first
    assert first.read_bytes() == b"second"


def test_threat_23_evidence_appears_only_when_it_is_safe_on_the_disk(store, monkeypatch):
    """A torn file under its name would keep the whole one out for ever."""

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", crash)
        with pytest.raises(KeyboardInterrupt):
            store.keep_evidence("proof", b"document")
    assert not (store.layout.state / "evidence" / "proof").exists()
    assert store.keep_evidence("proof", b"document").read_bytes() == b"document"


def test_threat_11_evidence_cannot_fill_the_disk(store):
    for i in range(EVIDENCE_MAX_FILES + 5):
        (store.layout.state / "evidence" / f"old{i}").touch()
    assert not store.keep_evidence("one-more", b"x").exists()


# ------------------------------------------------------------------ deleting


def fill(store: Store, rounds: range) -> None:
    for round in rounds:
        for path in (store.layout.outbox(round), store.layout.fused(round), store.layout.inbox(round, BIRCH)):
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(b"x")


def rounds_in(store: Store, folder: str) -> list[int]:
    return sorted(int(p.name[1:7]) for p in (store.layout.state / folder).iterdir())


def test_pruning_keeps_what_a_peer_one_round_behind_can_still_ask_for(store):
    """In round 5 a peer may still need my checkpoint of round 4; the base of round 5 is the fusion of round 4."""
    fill(store, range(7))
    store.prune(5, frozenset({0, 2}))
    assert rounds_in(store, "outbox") == [4, 5, 6]
    assert rounds_in(store, "inbox") == [4, 5, 6]
    assert rounds_in(store, "fused") == [0, 2, 3, 4, 5, 6]


def test_pruning_twice_or_with_nothing_there_changes_nothing(store):
    store.prune(5, frozenset())
    fill(store, range(3, 6))
    store.prune(5, frozenset())
    store.prune(5, frozenset())
    assert rounds_in(store, "outbox") == [4, 5]


def test_pruning_leaves_files_that_are_not_ours(store):
    names = ["README", "x000001.safetensors", "r²³¹²³¹", "r1.safetensors", "notes-000001"]
    for name in names:
        (store.layout.state / "fused" / name).touch()
        (store.layout.state / "inbox" / name).touch()
    store.prune(50, frozenset())
    assert sorted(p.name for p in (store.layout.state / "fused").iterdir()) == sorted(names)
    assert sorted(p.name for p in (store.layout.state / "inbox").iterdir()) == sorted(names)


def test_checkpoints_stay_of_the_rounds_whose_fused_model_a_method_makes_of_them(store):
    fill(store, range(7))
    store.prune(6, frozenset({2}), keep_sets=frozenset({2}))
    assert rounds_in(store, "outbox") == rounds_in(store, "inbox") == [2, 5, 6]


def test_own_files_stay_of_the_two_last_rounds_and_where_they_are_asked_for(store):
    for round in range(1, 7):
        store.layout.own(round).write_bytes(b"x")
    best = store.layout.trainer / "best_r000001_e0002.safetensors"
    best.touch()
    store.prune(6, frozenset(), frozenset({2}))
    assert sorted(store.layout.own_files()) == [2, 4, 5, 6]
    assert best.exists(), "the trainer's own to delete"


def test_the_last_own_file_stays_however_old_a_backup_it_came_with(store):
    """A restored node fuses the round that it had sent, before it trains: from this file."""
    for round in (3, 4):
        store.layout.own(round).write_bytes(b"x")
    store.prune(9, frozenset())
    assert sorted(store.layout.own_files()) == [4]


def test_manifests_stay_when_their_checkpoints_go(store):
    store.journal.record_manifest(1, BIRCH, "a" * 64, b"document", {})
    fill(store, range(3))
    store.prune(9, frozenset())
    assert store.journal.manifest(1, BIRCH) is not None


# ------------------------------------------------------------------ room


def test_threat_21_a_round_starts_only_with_room_for_two_rounds_of_everybody(store, monkeypatch):
    """3 peers: two rounds of 3 checkpoints, a fusion and an own file each = 10 x 1 GB, beside the reserve of 268 MB."""
    free = 10_000_000_000 + 256 * 2**20
    monkeypatch.setattr(store_module.shutil, "disk_usage", lambda _: type("Usage", (), {"free": free}))
    store.require_room(1_000_000_000, 3, RESERVE)
    free -= 1
    with pytest.raises(LocalStateError, match=r"10\.3 GB free; two rounds of 3 peers need 10\.3 GB"):
        store.require_room(1_000_000_000, 3, RESERVE)


def test_what_is_stored_already_counts_as_room(store):
    store.admit(claimed(store, b"x" * 1000), 1, BIRCH)
    store.layout.outbox(1).write_bytes(b"x" * 1000)
    # Two rounds of 2 peers, a fusion and an own file each = 8, two are here.
    assert store.room(1000, 2, RESERVE).round == RESERVE + 6000
    store.layout.own(1).write_bytes(b"x" * 1500)  # with tensors that are not sent
    assert store.room(1000, 2, RESERVE).round == RESERVE + 5500  # 6 and two own files of 1500, 3500 are here
    for round in (2, 3):
        store.layout.own(round).write_bytes(b"x" * 1500)
    assert store.room(1000, 2, RESERVE).round == RESERVE + 4000  # of own files two are of these rounds


def test_a_round_needs_no_less_than_the_inbox_does_to_take_a_checkpoint_in(store):
    """Also where all that two rounds store is here already: below that, what a peer sends is refused."""
    for peer in (ASH, BIRCH, CEDAR):
        store.admit(claimed(store, b"x" * 4000), 1, peer)
    found = store.room(1000, 2, RESERVE)
    assert found.round == found.arrival == RESERVE + 1000


def test_lacking_room_is_told_in_units_that_fit(store, monkeypatch):
    monkeypatch.setattr(store_module.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 3_900_000}))
    with pytest.raises(LocalStateError, match=r"has 3\.9 MB free; two rounds of 3 peers need 268 MB\n") as told:
        store.require_room(1000, 3, RESERVE)
    assert "free some space" in told.value.remedy


def test_what_another_programs_inbox_gives_away_is_no_reserve_of_ours(store, monkeypatch):
    monkeypatch.setattr(store_module.shutil, "disk_usage", lambda _: SimpleNamespace(free=10_000))
    store.require_room(1000, 3, room.reserve_of("directory"))
    with pytest.raises(LocalStateError):
        store.require_room(1000, 3, room.reserve_of("embedded"))


def test_the_alarm_about_room_ends_with_the_wait_for_it(store, monkeypatch):
    """Space was freed, or training was paused meanwhile: nobody lacks room any more."""
    monkeypatch.setattr("hsl_node.node.training.ROOM_LOOK_S", 0.0)
    free = [0, 10**12]
    monkeypatch.setattr(store_module.shutil, "disk_usage", lambda _: type("Usage", (), {"free": free[0]}))
    federation = SimpleNamespace(peers=(ASH, BIRCH))
    here: Any = SimpleNamespace(store=store, layout=store.layout, federation=federation, reserve_bytes=RESERVE)
    alarms = Alarms()

    async def waits(until: Callable[[asyncio.Task[None]], object]) -> None:
        waiting = asyncio.create_task(Training(here, alarms, None)._wait_for_room(1000))
        await asyncio.sleep(0)  # it runs as far as it can
        assert "disk" in alarms
        until(waiting)
        await asyncio.gather(waiting, return_exceptions=True)
        assert "disk" not in alarms

    asyncio.run(waits(lambda task: task.cancel()))
    asyncio.run(waits(lambda task: free.pop(0)))


def test_a_rounds_folder_deleted_while_room_is_measured_counts_nothing(store, monkeypatch):
    """A daemon ended by it: `prune`, in another thread, had taken the folder away after it was listed."""
    for number in (1, 2):
        (store.layout.inbox_folder / f"r{number:06d}").mkdir(parents=True)
    scandir = os.scandir

    def pruned_meanwhile(folder: Path) -> Any:
        if folder.name == "r000001":
            folder.rmdir()
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", pruned_meanwhile)
    assert store.room(1000, 2, RESERVE).round == RESERVE + 8000


def test_checkpoint_deleted_while_room_is_measured_counts_nothing(store):
    """Status is asked for while old rounds are pruned in another thread: a name is listed, its file gone."""
    folder = store.layout.inbox(1, Peer("birch")).parent
    folder.mkdir()
    (folder / "birch.safetensors").symlink_to("gone")
    assert store.room(1000, 2, RESERVE).round == RESERVE + 8000


def lay(layout: Layout, peer: Peer, folder: str, *sizes: int) -> None:
    where = layout.homes / peer / folder
    where.mkdir(parents=True, exist_ok=True)
    for i, size in enumerate(sizes):
        (where / f"{i}.part").write_bytes(b"x" * size)


def test_threat_21_a_start_on_a_full_disk_drops_unfinished_files_of_the_biggest_holder_first_and_names_it(
    tmp_path, monkeypatch, caplog
):
    """10 MB are missing: cedar has 20 MB of parts, birch 8, dogwood 4 and a delivery of 40, which stays."""
    layout, mega = Layout(tmp_path / "state"), 10**6
    layout.make()
    lay(layout, CEDAR, "parts", 15 * mega, 5 * mega)
    lay(layout, BIRCH, "parts", 8 * mega)
    lay(layout, Peer("dogwood"), "parts", 4 * mega)
    lay(layout, Peer("dogwood"), "inbox", 40 * mega)
    before = held(layout.homes)
    assert max(before, key=before.get) == "dogwood"

    def disk_usage(path):
        gone = sum(before.values()) - sum(held(layout.homes).values())
        return SimpleNamespace(free=Quota.reserve_bytes - 10 * mega + gone)

    monkeypatch.setattr("hsl_node.sync.store.holdings.shutil.disk_usage", disk_usage)
    Store(layout).close()
    assert held(layout.homes) == {p: n for p, n in before.items() if p != CEDAR}
    (line,) = [r for r in caplog.records if "dropped" in r.message]
    assert (line.peer, line.files, line.bytes) == ("cedar", 2, before[CEDAR])


def test_a_start_with_room_keeps_every_unfinished_file(tmp_path, monkeypatch):
    layout = Layout(tmp_path / "state")
    layout.make()
    lay(layout, CEDAR, "parts", 10**6)
    roomy = SimpleNamespace(free=Quota.reserve_bytes)
    monkeypatch.setattr("hsl_node.sync.store.holdings.shutil.disk_usage", lambda path: roomy)
    Store(layout).close()
    assert set(held(layout.homes)) == {CEDAR}


# ------------------------------------------------------------------ readers


def test_status_reads_the_journal_while_the_daemon_writes_it(store):
    store.journal.save_state({"round": 1})
    reader = Journal.read_only(store.layout.journal)
    with store.journal.transaction():
        store.journal.save_state({"round": 2})
        assert reader.state() == {"round": 1}
    assert reader.state() == {"round": 2}
