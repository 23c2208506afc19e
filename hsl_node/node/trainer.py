"""The trainer process as the daemon sees it: one job at a time, events as JSON lines, restart with back-off.

The daemon imports no torch. The trainer (`python -m hsl_node.train.worker`) does, in a process of its own: a crash of
the GPU driver ends that process, not the node.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from hsl_node import errors
from hsl_node.errors import AlreadyRunning, Altered, HslError, LocalStateError, TrainerError
from hsl_node.federation.names import Digest
from hsl_node.host.layout import Layout
from hsl_node.host.pace import Pace

log = logging.getLogger(__name__)

Event = dict[str, Any]

SILENT_S = 45.0  # a batch takes seconds; without any event for this long the node is called degraded
KILL_SILENT_S = 15 * 60.0  # not slow any more but hung (a stopped process, a dead GPU): restart it from its last epoch
TROUBLED = ("silent", "restarting")  # states of the trainer in which the node is called degraded
STOP_S = 10.0  # it only has to leave: its files are whole whenever it ends
BACKOFF = Pace(first_s=1.0, longest_s=300.0, growth=3.0)  # for ever: a machine without memory may get some back
LOG_MAX_BYTES = 10 * 1024 * 1024
LINE_MAX_BYTES = 4 * 1024 * 1024


class Trainer:
    """Started by the first job, restarted whenever it dies; a job that was cut off is sent again."""

    def __init__(self, state: Path, on_event: Callable[[Event], None], command: list[str] | None = None) -> None:
        self._command = command or [sys.executable, "-m", "hsl_node.train.worker", "--state", str(state)]
        self._init_job = {"job": "init", "out": str(Layout(state).fused(0))}
        self._log_path = Layout(state).trainer_log
        self._on_event = on_event
        self._process: asyncio.subprocess.Process | None = None
        self._one_job = asyncio.Lock()
        self._last_event = time.monotonic()
        self.initialised: Event | None = None
        self.initial: Digest | None = None  # of the initial weights, where it is known: any others are made anew
        self.restarts = 0
        self.last_error = ""

    async def run(self, job: dict[str, Any]) -> Event:
        """Do one job and give its closing event (`initialised`, `trained` or `validated`).

        Raises:
            HslError: the trainer says that the job can't be done (data, configuration): trying again is no help.
        """
        async with self._one_job:
            return await self._persist(job)

    async def _persist(self, job: dict[str, Any]) -> Event:
        attempt = 0
        while True:
            try:
                if self._process is None:
                    await self._start()
                    known = {} if self.initial is None else {"sha256": self.initial}
                    self.initialised = await self._do(self._init_job | known)
                return self.initialised or {} if job["job"] == "init" else await self._do(job)
            except Altered:
                raise  # no attempt finds other bytes there
            except (TrainerError, LocalStateError, AlreadyRunning, OSError) as exc:
                # AlreadyRunning: the trainer of a daemon that was killed is not gone yet and holds the folder's lock.
                await self._end(signal.SIGKILL)
                attempt += 1
                delay = BACKOFF.after(attempt)
                self.restarts += 1
                self.last_error = str(exc)
                log.warning(
                    "trainer failed, starting it again",
                    extra={"reason": str(exc), "in_s": delay, "restart": attempt},
                )
                await asyncio.sleep(delay)
            except asyncio.CancelledError:
                await self._end(signal.SIGTERM)
                raise

    async def stop(self) -> None:
        await self._end(signal.SIGTERM)

    def status(self) -> dict[str, Any]:
        silent_s, working = time.monotonic() - self._last_event, self._one_job.locked()
        if self._process is None:
            state = "idle" if not working else "restarting" if self.restarts else "starting"
        elif working and silent_s > SILENT_S:
            state = "silent"
        elif self.initialised is None:
            state = "starting"
        else:
            state = "working" if working else "idle"
        return {
            "pid": self._process.pid if self._process else None,
            "state": state,
            "restarts": self.restarts,
            "last_event_s": round(silent_s, 1),
            "last_error": self.last_error,
        }

    async def _start(self) -> None:
        self.initialised = None
        self._last_event = time.monotonic()
        self._shorten_log()
        log_file = os.open(self._log_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            self._process = await asyncio.create_subprocess_exec(
                *self._command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=log_file,
                limit=LINE_MAX_BYTES,
                start_new_session=True,  # Ctrl-C reaches the daemon alone, which ends the trainer in order
            )
        finally:
            os.close(log_file)
        log.info("trainer started", extra={"pid": self._process.pid})

    def _shorten_log(self) -> None:
        """A trainer that dies for a year says the same every five minutes: the newest half tells enough."""
        with contextlib.suppress(OSError):
            if self._log_path.stat().st_size > LOG_MAX_BYTES:
                self._log_path.write_bytes(self._log_path.read_bytes()[-LOG_MAX_BYTES // 2 :])

    async def _do(self, job: dict[str, Any]) -> Event:
        closing = {"init": "initialised", "train": "trained", "validate": "validated"}[job["job"]]
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            raise TrainerError("the trainer is not running")
        self._last_event = time.monotonic()  # idle until now, however long: that was no silence
        process.stdin.write(json.dumps(job).encode() + b"\n")
        with contextlib.suppress(ConnectionError):  # it has ended: how is said where its output ends
            await process.stdin.drain()
        while True:
            event = await self._next(process.stdout)
            if event.get("event") == "error":
                raise _error_of(event)
            self._on_event(event)
            if event.get("event") == closing and event.get("round") == job.get("round"):
                self.last_error = ""
                return event

    async def _next(self, stdout: asyncio.StreamReader) -> Event:
        told = {"pid": self._process and self._process.pid, "restarted_after_min": f"{KILL_SILENT_S / 60:.0f}"}
        silent = partial(log.warning, "the trainer is silent", extra=told)
        late = asyncio.get_running_loop().call_later(SILENT_S, silent)
        try:
            async with asyncio.timeout(KILL_SILENT_S):
                line = await stdout.readline()
                code = await self._process.wait() if not line and self._process else None
        except TimeoutError as exc:
            raise TrainerError(f"no sign of life for {KILL_SILENT_S:.0f} s") from exc
        except ValueError as exc:
            raise TrainerError("a line without end on the trainer's output") from exc
        finally:
            late.cancel()
        self._last_event = time.monotonic()
        if not line:
            raise TrainerError(f"the trainer ended (exit status {code}); its last words are in {self._log_path.name}")
        event = None
        with contextlib.suppress(ValueError):
            event = json.loads(line)
        if not isinstance(event, dict):
            raise TrainerError(f"not an event: {line[:80]!r}")
        return event

    async def _end(self, sign: signal.Signals) -> None:
        """Returns when the process is gone, and lets a cancellation go on only then: its successor needs its lock."""
        process, cancelled = self._process, None
        while process is not None and process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(sign)
            try:
                async with asyncio.timeout(STOP_S):
                    await process.wait()
            except TimeoutError:
                pass
            except asyncio.CancelledError as exc:
                cancelled = exc
            sign = signal.SIGKILL  # it took too long, or somebody is in a hurry
        if self._process is process:
            self._process = None
        if cancelled is not None:
            raise cancelled


def _error_of(event: Event) -> HslError:
    """The trainer's own error, as the same class on this side; anything unnamed is worth a restart."""
    kind = getattr(errors, str(event.get("error")), TrainerError)
    if not (isinstance(kind, type) and issubclass(kind, HslError)) or issubclass(kind, errors.PeerDataError):
        kind = TrainerError
    return kind(str(event.get("message", "unknown")), remedy=str(event.get("remedy", "")))
