"""Real daemons whose trainer stops, whose clock jumps or whose disk is full: they say so, go on, and lose nothing."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from asyncssh.sftp import SFTPError
from cluster import WAIT_S, Cluster, final_digests
from hostile import Hostile
from small_disk import disk_of

from hsl_node.errors import NotRunning
from hsl_node.federation import identity
from hsl_node.federation.names import Kind, Peer
from hsl_node.federation.plan import Plan
from hsl_node.host.layout import Layout
from hsl_node.node.alarms import Alarms
from hsl_node.node.pulse import Pulse
from hsl_node.node.training import Training
from hsl_node.sync.round import Phase
from hsl_node.sync.store.journal import Journal
from hsl_node.sync.store.room import Quota

PLAN = Plan(method="fedavg", fusion="mean", rounds=3, epochs_per_round=2, plateau_rounds=100)
NAMES = ("ash", "birch")
TEN_YEARS_S = 10 * 365 * 86_400
SKEWED_CLOCK = """
import os, sys, time
_true = time.time
def _skewed():
    with open(os.path.join(sys.argv[1], "clock_offset")) as file:
        return _true() + float(file.read())
time.time = _skewed
"""
IMPATIENT = """
from hsl_node.host.pace import Pace
from hsl_node.node import fusing, pulse, trainer, training
fusing.NO_ROOM_RETRY_S = training.ROOM_LOOK_S = pulse.PULSE_S = 0.2
trainer.BACKOFF = Pace(0.2, 0.2)
"""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    with Cluster(tmp_path_factory.mktemp("undisturbed"), NAMES, PLAN) as cluster:
        cluster.start_all()
        cluster.wait_finished()
        return final_digests(cluster)


# ------------------------------------------------------------------ the trainer


def test_threat_29_a_stopped_trainer_makes_the_node_degraded_and_a_killed_one_is_started_again(
    tmp_path: Path, undisturbed: dict[int, str]
) -> None:
    prelude = "from hsl_node.node import trainer; trainer.SILENT_S = 1.0"
    with Cluster(tmp_path, NAMES, PLAN, prelude=prelude) as cluster:
        cluster.hold("ash")
        cluster.start_all()
        status = cluster.wait_until("ash", lambda s: s["state"] == "training" and s["epoch"], "in mid-epoch")
        os.kill(status["trainer"]["pid"], signal.SIGSTOP)
        status = cluster.wait_until("ash", lambda s: s["state"] == "degraded", "degraded")
        (warning,) = [w for w in status["warnings"] if w["code"] == "trainer"]
        assert "no sign of life" in warning["text"]
        os.kill(status["trainer"]["pid"], signal.SIGCONT)
        cluster.wait_until("ash", lambda s: s["state"] == "training", "training again")
        cluster.hold("ash", 2)
        status = cluster.wait_until("ash", lambda s: s["round"] == 2 and s["state"] == "training", "round 2")
        assert status["trainer"]["restarts"] == 0
        os.kill(status["trainer"]["pid"], signal.SIGKILL)
        cluster.wait_until("ash", lambda s: s["trainer"]["restarts"] == 1, "the trainer started again")
        cluster.release("ash")
        cluster.wait_finished()
        assert final_digests(cluster) == undisturbed


def test_threat_29_a_killed_daemons_stopped_trainer_holds_up_the_next_one_and_does_not_end_the_daemon(
    tmp_path: Path, undisturbed: dict[int, str]
) -> None:
    """Its lock is held until somebody ends it; exit code 11, which systemd does not restart, would be for good."""
    with Cluster(tmp_path, NAMES, PLAN, trainer=["--lock-wait-s", "0.1"], prelude=IMPATIENT) as cluster:
        cluster.start("ash")  # alone: it waits for birch, with its trainer at hand
        pid = cluster.wait_until("ash", lambda s: s["phase"] == "agree", "up")["trainer"]["pid"]
        os.kill(pid, signal.SIGSTOP)
        try:
            cluster.kill("ash")
            cluster.start_all()
            status = cluster.wait_until("ash", lambda s: s["trainer"]["restarts"] > 1, "the trainer tried again")
            assert "another process trains" in status["trainer"]["last_error"]
        finally:
            os.kill(pid, signal.SIGKILL)
        cluster.wait_finished()
        assert final_digests(cluster) == undisturbed


@pytest.mark.parametrize("trainer", ["silent", "restarting", "working"])
def test_threat_29_systemds_status_line_tells_of_a_trainer_that_hangs(trainer: str) -> None:
    state = SimpleNamespace(phase=Phase.TRAIN, round=3, rounds=20, have={}, missing=(), me="ash")
    stands_in: Any = SimpleNamespace(status=lambda: {"state": trainer})
    nothing: Any = None
    line = Pulse(nothing, Alarms(), stands_in, lambda: cast(Any, state), lambda: 0)._headline()
    assert line.endswith("train, round 3 of 20")
    assert (f"degraded: the trainer is {trainer}" in line) == (trainer != "working")


def test_images_that_are_decoded_are_no_longer_shown_as_being_decoded(tmp_path: Path) -> None:
    """A node may wait for days for its peers after that."""
    with Journal.create(tmp_path / "journal.sqlite3") as journal:
        here: Any = SimpleNamespace(journal=journal, layout=Layout(tmp_path), federation=SimpleNamespace(plan=Plan()))
        training = Training(here, Alarms(), None)
        training._heard({"event": "busy", "what": "decoding images", "done": 1, "total": 60})
        assert training.busy is not None
        training._heard({"event": "initialised", "images": {"train": 36}, "versions": {"torch": "2"}, "device": "cpu"})
        assert training.busy is None


def test_threat_29_the_node_is_called_degraded_within_a_minute() -> None:
    from hsl_node.node import trainer

    assert trainer.SILENT_S < 60


# ------------------------------------------------------------------ the clock


def test_threat_24_clocks_ten_years_off_that_jump_in_mid_round_change_nothing(
    tmp_path: Path, undisturbed: dict[int, str]
) -> None:
    with Cluster(tmp_path, NAMES, PLAN, prelude=SKEWED_CLOCK) as cluster:

        def set_clock(name: str, offset_s: float) -> None:
            path = cluster.layout(name).state / "clock_offset"
            path.with_suffix(".new").write_text(str(offset_s))
            path.with_suffix(".new").replace(path)

        set_clock("ash", TEN_YEARS_S)
        set_clock("birch", -TEN_YEARS_S)
        cluster.hold("ash")
        cluster.hold("birch", 2)
        cluster.start_all()
        status = cluster.wait_until("ash", lambda s: s["round"] == 1 and s["state"] == "training", "round 1")
        assert status["started"] > time.time() + TEN_YEARS_S / 2
        set_clock("ash", -TEN_YEARS_S)
        set_clock("birch", TEN_YEARS_S)
        cluster.release("ash")
        status = cluster.wait_until("birch", lambda s: s["round"] == 2 and s["state"] == "training", "round 2")
        assert status["since"] > time.time() + TEN_YEARS_S / 2
        set_clock("birch", 0)
        cluster.release("birch")
        cluster.wait_finished()
        assert final_digests(cluster) == undisturbed


# ------------------------------------------------------------------ the disk


class Ward:
    """Runs a cluster as systemd would: whoever leaves with the exit code of a failed disk is started again."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.exits = 0

    def until(self, name: str, wanted: Callable[[dict], object], what: str) -> dict:  # type: ignore[type-arg]
        end = time.monotonic() + WAIT_S
        status: dict = {}  # type: ignore[type-arg]
        while time.monotonic() < end:
            self.tend()
            with suppress(NotRunning):
                status = self.cluster.status(name)
                if wanted(status):
                    return status
            time.sleep(0.05)
        raise AssertionError(f"{name} never came to: {what}; it says {status}\n{self.cluster.output(name)}")

    def tend(self) -> None:
        for name, process in list(self.cluster.processes.items()):
            if (code := process.poll()) is not None:
                assert code == 15, self.cluster.output(name)
                self.exits += 1
                self.cluster.start(name)

    def told(self, name: str) -> None:
        """Wait until the node says that its disk is full: as a warning, or by its exit code."""
        before, end = self.exits, time.monotonic() + WAIT_S
        while time.monotonic() < end:
            self.tend()
            if self.exits > before:
                return
            with suppress(NotRunning):
                if any(w["code"] in ("room", "disk") for w in self.cluster.status(name)["warnings"]):
                    return
            time.sleep(0.05)
        raise AssertionError(f"{name} never said that its disk is full\n{self.cluster.output(name)}")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Little more than what the inbox keeps in reserve."""
    with disk_of(tmp_path / "ash", 320) as folder:
        yield folder


def fill(folder: Path) -> Path:
    """Leave not a byte."""
    ballast = folder / "ballast"
    with open(ballast, "wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(2**20)):
            pass
    disk = os.statvfs(folder)
    assert disk.f_bavail == 0
    return ballast


@pytest.mark.sample(3, "full disks")
@pytest.mark.parametrize("step", ["before the first round", "in training", "waiting for a peer"])
def test_threat_21_a_full_disk_is_told_and_the_node_goes_on_once_there_is_room(
    small_disk: Path, tmp_path: Path, undisturbed: dict[int, str], step: str
) -> None:
    with Cluster(tmp_path, NAMES, PLAN, prelude=IMPATIENT) as cluster:
        ward = Ward(cluster)
        held = "birch" if step == "waiting for a peer" else "ash"
        cluster.hold(held)
        cluster.start("ash")
        if step == "before the first round":
            ward.until("ash", lambda s: s["phase"] == "agree", "waiting for birch's statement")
        else:
            cluster.start("birch")
            if step == "in training":
                ward.until("ash", lambda s: s["round"] == 1 and s["state"] == "training", "training")
        if step == "waiting for a peer":
            ward.until("ash", lambda s: s["waiting_for"] == ["birch"], "waiting for birch")
        ballast = fill(small_disk)
        ward.told("ash")
        cluster.release(held)
        if step == "before the first round":
            cluster.start("birch")
            ward.until("birch", lambda s: s["peers"][0]["sent"]["retries"] > 0, "birch was not taken in")
        elif step == "in training":
            ward.until("ash", lambda s: s["trainer"]["restarts"] > 0 or ward.exits > 0, "it could not write")
        else:
            ward.until("birch", lambda s: s["peers"][0]["sent"]["retries"] > 0, "birch was not taken in")
        assert cluster.status("birch")["round"] <= 2
        ballast.unlink()
        for name in NAMES:
            ward.until(name, lambda s: s["state"] == "finished", "finished")
        ward.until("ash", lambda s: not any(w["code"] in ("room", "disk") for w in s["warnings"]), "settled")
        assert final_digests(cluster) == undisturbed


@pytest.mark.sample(3, "full disks")
def test_threat_21_a_start_on_a_full_disk_ends_with_the_exit_code_of_the_disk(
    small_disk: Path, tmp_path: Path, undisturbed: dict[int, str]
) -> None:
    with Cluster(tmp_path, NAMES, PLAN, prelude=IMPATIENT) as cluster:
        ballast = fill(small_disk)
        state = str(cluster.layout("ash").state)
        command = [sys.executable, "-m", "hsl_node.cli", "--state", state, "start"]
        first = subprocess.run(command, capture_output=True, text=True, timeout=60)  # its words need room elsewhere
        assert first.returncode == 15, first.stderr
        assert "disk" in first.stderr
        ballast.unlink()
        cluster.start_all()
        cluster.wait_finished()
        assert final_digests(cluster) == undisturbed


@pytest.mark.sample(3, "full disks")
def test_threat_21_one_peers_parts_fill_the_disk_to_the_reserve_and_no_further_and_it_is_named(
    small_disk: Path, tmp_path: Path, undisturbed: dict[int, str]
) -> None:
    """With birch's key: sixteen empty parts where there is room for little more than one, then all are filled."""
    with Cluster(tmp_path, NAMES, PLAN, prelude=IMPATIENT) as cluster:
        cluster.start_all()
        cluster.wait_finished()
        size = cluster.layout("ash").outbox(3).stat().st_size
        birch = Hostile(
            Peer("birch"),
            identity.load(cluster.layout("birch").key),
            cluster.federation,
            cluster.ports["ash"],
            identity.load(cluster.layout("ash").key).key.convert_to_public(),
        )
        cluster.kill("birch")
        leave(small_disk, Quota.reserve_bytes + 2 * size)
        asyncio.run(hoard(birch, size))
        assert shutil.disk_usage(small_disk).free > Quota.reserve_bytes - size  # the node's own log and journal go on
        status = cluster.wait_until("ash", lambda s: any(w["code"] == "room" for w in s["warnings"]), "told")
        (warning,) = [w for w in status["warnings"] if w["code"] == "room"]
        assert "most of what waits in the inbox is of birch" in warning["text"]
        assert final_digests(cluster) == undisturbed


async def hoard(birch: Hostile, size: int) -> None:
    async with birch.sftp() as one, birch.sftp() as other:
        files = []
        for i in range(Quota.files):
            name = birch.manifest({"round": 4, "sha256": f"{i:064x}"}).name.of(Kind.DATA).as_part()
            with suppress(SFTPError):
                files.append(await (one, other)[i % 2].open(f"parts/{name}", "xb"))
        assert len(files) > 2  # the honest birch may have left a file of its own
        refused = 0
        for file in files:
            for at in range(0, size, 32 * 1024):
                try:
                    await file.write(bytes(min(32 * 1024, size - at)), at)
                except SFTPError:
                    refused += 1
        assert refused


def leave(folder: Path, room: int) -> None:
    """Fill the disk but for so many bytes."""
    with open(folder / "ballast", "wb", buffering=0) as ballast:
        os.posix_fallocate(ballast.fileno(), 0, shutil.disk_usage(folder).free - room)


@pytest.mark.sample(3, "full disks")
def test_threat_21_a_disk_full_of_one_peers_parts_holds_up_no_start(
    small_disk: Path, tmp_path: Path, undisturbed: dict[int, str]
) -> None:
    """They go, and the log says whose they were; what others left unfinished stays."""
    with Cluster(tmp_path, NAMES, PLAN, prelude=IMPATIENT) as cluster:
        cluster.hold("ash")
        cluster.start_all()
        cluster.wait_until("ash", lambda s: s["round"] == 1 and s["state"] == "training", "training")
        cluster.kill("ash")
        fill(cluster.layout("ash").homes / "birch" / "parts")
        cluster.release("ash")
        cluster.start("ash")
        cluster.wait_finished()
        assert final_digests(cluster) == undisturbed
        (line,) = [e for e in events(cluster.layout("ash").state) if "dropped" in e["event"]]
        assert (line["peer"], line["level"]) == ("birch", "warning") and line["bytes"] > 2**24


def events(state: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in Layout(state).event_log.read_text().splitlines()]


@pytest.mark.sample(3, "full disks")
def test_threat_21_a_limit_on_file_sizes_is_survived_like_a_full_disk(
    tmp_path: Path, undisturbed: dict[int, str]
) -> None:
    with Cluster(tmp_path, NAMES, PLAN, prelude=IMPATIENT) as cluster:
        ward = Ward(cluster)
        cluster.hold("ash")
        cluster.start_all()
        ward.until("ash", lambda s: s["round"] == 1 and s["state"] == "training", "training")
        process = cluster.processes["ash"]
        _, hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        cluster.release("ash")
        # Its journal is larger than that too: whichever ash writes first, that or birch's checkpoint of 200 kB.
        met = lambda s: ward.exits > 0 or s["peers"][0]["sent"]["retries"] > 0  # noqa: E731
        ward.until("birch", met, "nothing met the limit")
        with suppress(ProcessLookupError):  # it may have left by itself
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (hard, hard))
        for name in NAMES:
            ward.until(name, lambda s: s["state"] == "finished", "finished")
        assert final_digests(cluster) == undisturbed
