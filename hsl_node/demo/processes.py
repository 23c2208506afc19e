"""The demo's processes: a daemon per hospital, watched until all are finished, and ended whatever happens."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO, Any

from hsl_node.demo.setup import Hospital
from hsl_node.errors import HslError, NotInitialised, NotRunning, WaitTimeout, escaped
from hsl_node.host import control
from hsl_node.host.layout import Layout
from hsl_node.status.snapshot import Snapshot, from_json
from hsl_node.sync.round import Phase
from hsl_node.sync.store.journal import Journal

POLL_S = 0.5
STOP_S = 30.0  # a finished daemon leaves in a fraction of a second; then it is killed
TRAINER_DEATHS_MAX = 3  # with back-off: enough to know that the next will not live either
TAIL_LINES = 15
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # Ctrl-C, kill, a closed terminal

Snapshots = dict[str, Snapshot | None]  # by hospital; None: not up yet


class DemoFailed(HslError):
    """A process of the demo ended that should not have, or the hospitals disagree; with its last words."""

    def __init__(self, message: str, *, remedy: str = "", exit_code: int = 1) -> None:
        super().__init__(message, remedy=remedy)
        self.exit_code = exit_code or 1


@dataclass
class Daemons:
    """The running processes, by hospital."""

    hospitals: Sequence[Hospital]
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, hospital: Hospital) -> None:
        command = [sys.executable, "-m", "hsl_node.cli", "--state", str(hospital.state), "start"]
        self.processes[hospital.name] = _spawn(command, stdout=_log(hospital, "daemon.txt"))

    def snapshots(self) -> Snapshots:
        """Ask every daemon for its status.

        Raises:
            DemoFailed: one has ended, halted, or its trainer dies again and again.
        """
        found: Snapshots = {}
        for hospital in self.hospitals:
            code = self.processes[hospital.name].poll()
            if code is not None:
                raise _died(f"the daemon of {hospital.name}", code, Layout(hospital.state).log / "daemon.txt")
            found[hospital.name] = None
            with suppress(NotRunning, WaitTimeout):
                found[hospital.name] = _healthy(hospital, from_json(control.ask(hospital.state, "status")["status"]))
        return found

    def end(self) -> None:
        """Stop all, in order first: each saves and leaves."""
        with deferred():
            for hospital in self.hospitals:
                with suppress(HslError, OSError):
                    control.ask(hospital.state, "stop")
            end_all(list(self.processes.values()))


def _healthy(hospital: Hospital, status: Snapshot) -> Snapshot:
    if status.state == "halted":
        raise DemoFailed(f"{hospital.name} halted: {escaped(status.reason, 600)}", exit_code=14)
    if status.trainer and status.trainer.restarts >= TRAINER_DEATHS_MAX:
        raise DemoFailed(
            f"the trainer of {hospital.name} died {status.trainer.restarts} times; its last lines:\n"
            + tail(Layout(hospital.state).trainer_log)
        )
    return status


def _died(what: str, code: int, log: Path) -> DemoFailed:
    return DemoFailed(f"{what} ended with exit code {code}; its last lines:\n{tail(log)}", exit_code=max(code, 0))


@contextmanager
def running(hospitals: Sequence[Hospital]) -> Iterator[Daemons]:
    """Start a daemon per hospital; on leaving, however, none is left."""
    daemons = Daemons(hospitals)
    try:
        for hospital in hospitals:
            with deferred():
                daemons.start(hospital)
        yield daemons
    finally:
        daemons.end()


def wait_finished(daemons: Daemons, show: Callable[[Snapshots], None]) -> None:
    """Until every journal says: finished, the last fusion validated, no delivery owed."""
    while True:
        show(daemons.snapshots())
        if all(is_complete(h.state) for h in daemons.hospitals):
            return
        time.sleep(POLL_S)


def is_complete(state: Path) -> bool:
    try:
        with Journal.read_only(Layout(state).journal) as journal:
            saved, validated = journal.state(), journal.last_unvalidated() is None
    except NotInitialised:
        return False
    return saved is not None and saved["phase"] == Phase.FINISHED and not saved["owed"] and validated


# ------------------------------------------------------------------ evaluation, in processes of their own


def evaluate_all(hospitals: Sequence[Hospital], show: Callable[[dict[str, str]], None]) -> dict[str, dict[str, Any]]:
    """`hsl-node evaluate --alone` at every hospital; the recorded evaluations.

    All at once, as their trainers were before: they need no more memory than those. `show` hears what each is doing.

    Raises:
        DemoFailed: one of them failed.
    """
    working: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for hospital in hospitals:
            command = [sys.executable, "-m", "hsl_node.cli", "--state", str(hospital.state)]
            with deferred():
                working[hospital.name] = _spawn(
                    [*command, "evaluate", "--alone", "--json"],
                    stdout=_log(hospital, "evaluation.json"),
                    stderr=_log(hospital, "evaluate.txt"),
                )
        while True:
            codes = {name: process.poll() for name, process in working.items()}
            for hospital in hospitals:
                if code := codes[hospital.name]:
                    raise _died(f"the evaluation at {hospital.name}", code, Layout(hospital.state).log / "evaluate.txt")
            logs = {h.name: Layout(h.state).log / "evaluate.txt" for h in hospitals}
            show({name: "done" if codes[name] == 0 else tail(log, 1).strip() for name, log in logs.items()})
            if all(code == 0 for code in codes.values()):
                break
            time.sleep(POLL_S / 2)
    finally:
        with deferred():
            end_all(list(working.values()))
    return {h.name: json.loads((Layout(h.state).log / "evaluation.json").read_text("utf-8")) for h in hospitals}


# ------------------------------------------------------------------ processes


def _log(hospital: Hospital, name: str) -> IO[bytes]:
    return open(Layout(hospital.state).log / name, "wb")


def _spawn(command: list[str], *, stdout: IO[bytes], stderr: IO[bytes] | None = None) -> subprocess.Popen[bytes]:
    """Start a process that Ctrl-C in our terminal does not reach: we end it, in order."""
    with stdout, stderr or stdout:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr or subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )


def end_all(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """SIGTERM to what still runs, SIGKILL to what does not leave."""
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + STOP_S
    for process in processes:
        try:
            process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def deferred() -> Iterator[None]:
    """Ctrl-C waits until the block is done: a process that is being started is known to us before we leave, and ending
    them all (STOP_S at most) is not cut short by an impatient second Ctrl-C."""
    heard: list[int] = []
    with _handled(_ENDING, lambda number, _frame: heard.append(number)):
        yield
    if heard:
        raise KeyboardInterrupt


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM and SIGHUP (a closed terminal) end the demo as Ctrl-C does: with its processes."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    with _handled(_ENDING[1:], interrupt):
        yield


@contextmanager
def _handled(signals: Sequence[signal.Signals], handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in signals}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def tail(path: Path, lines: int = TAIL_LINES) -> str:
    """A log's last lines, made safe for a terminal."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - 16_384))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        text = ""
    return "\n".join(f"  {escaped(line, 300)}" for line in text.splitlines()[-lines:]) or "  (nothing yet)"
