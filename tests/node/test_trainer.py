"""The trainer process as the daemon sees it: small scripts stand in for it and misbehave."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from hostile import until

from hsl_node.errors import ConfigError
from hsl_node.host.layout import Layout
from hsl_node.host.pace import Pace
from hsl_node.node import trainer as module
from hsl_node.node.trainer import TROUBLED, Trainer
from hsl_node.train.lock import hold_lock

JOB = {"job": "train", "round": 1, "base": "b", "base_sha256": "0", "out": "o"}
HONEST = """
import json, sys
for line in sys.stdin:
    job = json.loads(line)
    event = {"init": "initialised", "train": "trained"}[job["job"]]
    print(json.dumps({"event": event, "round": job.get("round")}), flush=True)
"""
DIES_ONCE = f"""
import pathlib, sys
mark = pathlib.Path(sys.argv[1])
if not mark.exists():
    mark.touch()
    sys.exit(3)
{HONEST}
"""
# Holds the trainer's lock, and waits for nobody's. The first of its kind says its pid and then hangs.
HANGS_ONCE = f"""
import os, pathlib, signal, sys, time
from hsl_node.errors import AlreadyRunning
from hsl_node.train.lock import hold_lock
mark = pathlib.Path(sys.argv[1])
try:
    lock = hold_lock(mark.parent / "trainer", wait_s=0)
except AlreadyRunning as exc:
    import json
    print(json.dumps({{"event": "error", "error": "AlreadyRunning", "message": exc.message}}), flush=True)
    sys.exit(exc.exit_code)
if not mark.exists():
    if DEAF:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    mark.with_suffix(".new").write_text(str(os.getpid()))
    mark.with_suffix(".new").rename(mark)
    time.sleep(600)
{HONEST}
"""
REFUSES = """
import json, sys
error = {"event": "error", "error": "DataError", "message": "no images", "remedy": "add some"}
for line in sys.stdin:
    print(json.dumps(error), flush=True)
"""


def trainer_of(tmp_path: Path, script: str, events: list[dict[str, Any]] | None = None) -> Trainer:
    (tmp_path / "log").mkdir(exist_ok=True)
    command = [sys.executable, "-c", script, str(tmp_path / "mark")]
    return Trainer(tmp_path, (events if events is not None else []).append, command)


def test_a_job_gives_its_closing_event(tmp_path: Path) -> None:
    async def story() -> None:
        trainer = trainer_of(tmp_path, HONEST)
        assert await trainer.run(JOB) == {"event": "trained", "round": 1}
        assert trainer.status()["state"] == "idle"
        await trainer.stop()

    asyncio.run(story())


def test_threat_29_a_trainer_that_dies_is_started_again_and_the_job_sent_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BACKOFF", Pace(0.01, 0.01))

    async def story() -> None:
        trainer = trainer_of(tmp_path, DIES_ONCE)
        assert (await trainer.run(JOB))["event"] == "trained"
        assert trainer.restarts == 1
        await trainer.stop()

    asyncio.run(story())


def test_threat_29_a_trainer_that_dies_for_ever_is_shown_as_restarting_with_the_reason(tmp_path: Path) -> None:
    """The back-off is long here, so what status shows is the state in between."""

    async def story() -> None:
        trainer = trainer_of(tmp_path, "import sys; sys.exit(9)")
        job = asyncio.create_task(trainer.run(JOB))
        await _restarted(trainer)
        status = trainer.status()
        assert status["state"] == "restarting"
        assert "exit status 9" in status["last_error"]
        job.cancel()
        await asyncio.gather(job, return_exceptions=True)

    asyncio.run(story())


def test_the_trainers_log_keeps_the_newest_of_a_trainer_that_dies_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOG_MAX_BYTES", 1000)
    log = tmp_path / "log" / "trainer.log"
    log.parent.mkdir()

    async def story() -> None:
        trainer = trainer_of(tmp_path, HONEST)
        await trainer.run(JOB)
        await trainer.stop()

    for number in range(8):
        with log.open("a") as file:
            file.write(f"{number} " + "x" * 399 + "\n")
        asyncio.run(story())
    assert [p.name for p in log.parent.iterdir()] == ["trainer.log"]
    lines = log.read_text().splitlines()
    assert len(lines) <= 3 and lines[-1].startswith("7 ")


def test_what_trying_again_cannot_mend_comes_back_as_the_trainers_own_error(tmp_path: Path) -> None:
    async def story() -> None:
        trainer = trainer_of(tmp_path, REFUSES)
        with pytest.raises(ConfigError, match="no images") as caught:
            await trainer.run(JOB)
        assert caught.value.remedy == "add some"
        assert trainer.restarts == 0
        await trainer.stop()

    asyncio.run(story())


INITIALISES_AND_HANGS = """
import json, sys, time
print(json.dumps({"event": "initialised", "round": None}), flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("limit", ["SILENT_S", "KILL_SILENT_S"])
def test_threat_29_a_silent_trainer_is_called_silent_and_later_restarted(
    limit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One limit is short at a time, so that what it leads to is there to be seen for as long as that takes."""
    monkeypatch.setattr(module, limit, 0.2)

    async def story() -> None:
        trainer = trainer_of(tmp_path, INITIALISES_AND_HANGS)
        job = asyncio.create_task(trainer.run(JOB))
        if limit == "SILENT_S":
            await until(lambda: trainer.status()["state"] == "silent")
            await until(lambda: "the trainer is silent" in caplog.messages)
            assert trainer.restarts == 0
        else:
            await _restarted(trainer)
            assert "no sign of life" in trainer.last_error
        job.cancel()
        await asyncio.gather(job, return_exceptions=True)

    asyncio.run(story())


@pytest.mark.parametrize("times", ["once", "again and again"])
@pytest.mark.parametrize("how", ["deaf", "stopped"])
@pytest.mark.parametrize("what", ["a job", "stop"])
def test_threat_29_a_cancelled_trainer_is_gone_before_the_cancellation_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, how: str, times: str
) -> None:
    """One that ignores SIGTERM, and one that is stopped. Its successor finds the lock free, so nothing is restarted."""
    monkeypatch.setattr(module, "STOP_S", 0.2)

    async def story() -> None:
        trainer = trainer_of(tmp_path, f"DEAF = {how == 'deaf'}{HANGS_ONCE}")
        job = asyncio.create_task(trainer.run(JOB))
        pid = await _hanging(tmp_path / "mark", stop=how == "stopped")
        await until(lambda: trainer.status()["pid"] == pid)  # it may hang before we have been told that it runs
        try:
            ending = job if what == "a job" else asyncio.create_task(trainer.stop())
            if what == "stop":
                await asyncio.sleep(0)  # it has sent its signal, and waits
            ending.cancel()
            while not ending.done():
                await asyncio.sleep(0)
                if times != "once":
                    ending.cancel()
            assert ending.cancelled()
            assert not alive(pid)
            if what == "a job":
                assert (await trainer.run(JOB))["event"] == "trained"
                assert trainer.restarts == 0
        finally:
            if alive(pid):
                os.kill(pid, signal.SIGKILL)
        job.cancel()
        await asyncio.gather(job, return_exceptions=True)
        await trainer.stop()

    asyncio.run(story())


def test_threat_29_a_lock_that_a_dying_predecessor_holds_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The daemon was killed, its trainer hangs in a driver: the next daemon's trainer finds the folder taken."""
    monkeypatch.setattr(module, "BACKOFF", Pace(0.01, 0.01))
    (tmp_path / "mark").touch()

    async def story() -> None:
        trainer = trainer_of(tmp_path, HANGS_ONCE)
        with hold_lock(tmp_path / "trainer"):
            job = asyncio.create_task(trainer.run(JOB))
            while trainer.restarts < 2 and not job.done():  # noqa: ASYNC110 (watched from outside, as status does)
                await asyncio.sleep(0.01)
            assert not job.done()
            assert "another process trains in" in trainer.last_error
        assert (await job)["event"] == "trained"
        await trainer.stop()

    asyncio.run(story())


def test_threat_29_a_trainer_that_closes_its_output_and_stays_is_restarted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "KILL_SILENT_S", 0.5)

    async def story() -> None:
        trainer = trainer_of(tmp_path, "import os, time; os.close(1); time.sleep(600)")
        job = asyncio.create_task(trainer.run(JOB))
        await _restarted(trainer)
        assert "no sign of life" in trainer.last_error
        job.cancel()
        await asyncio.gather(job, return_exceptions=True)

    asyncio.run(story())


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def _hanging(mark: Path, *, stop: bool) -> int:
    """The process that left its pid in `mark`; where it is to be stopped, only when it is."""
    while not mark.exists():  # noqa: ASYNC110 (another process makes it)
        await asyncio.sleep(0.01)
    pid = int(mark.read_text())
    if stop:
        os.kill(pid, signal.SIGSTOP)
        while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    return pid


async def _restarted(trainer: Trainer) -> None:
    await until(lambda: trainer.restarts > 0)


def test_a_trainer_at_its_first_start_is_starting_and_has_not_died(tmp_path: Path) -> None:
    """It was called dead, `0 so far`, and the node degraded."""

    async def story() -> None:
        trainer = Trainer(tmp_path, lambda event: None, command=[sys.executable, "-c", "import time; time.sleep(60)"])
        Layout(tmp_path).make()
        states: list[str] = []
        async with trainer._one_job:
            states.append(trainer.status()["state"])  # a job is given, the process is not there yet
        await trainer._start()
        states.append(trainer.status()["state"])
        await trainer.stop()
        assert states == ["starting", "starting"] and not {*states} & {*TROUBLED}

    asyncio.run(story())
