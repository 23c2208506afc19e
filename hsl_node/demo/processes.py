"""The demo's processes: a daemon per hospital, watched until all are finished, and ended whatever happens."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from hsl_node.demo.setup import Hospital
from hsl_node.errors import HslError, NotRunning, WaitTimeout, escaped
from hsl_node.host import control
from hsl_node.host.layout import Layout
from hsl_node.status.snapshot import Snapshot, from_json
from hsl_node.sync.round import Phase

POLL_S = 0.5
STOP_S = 30.0  # a finished daemon leaves in a fraction of a second; then it is killed
TRAINER_DEATHS_MAX = 3  # with back-off: enough to know that the next will not live either
TAIL_LINES = 15
ENDINGS = (signal.SIGTERM, signal.SIGHUP)  # beside Ctrl-C

Snapshots = dict[str, Snapshot | None]  # by hospital; None: not up yet


class DemoFailed(HslError):
    """A process of the demo ended that should not have, or the hospitals disagree; with its last words."""

    def __init__(self, message: str, *, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True)
class Process:
    """One command at one hospital, in a process of its own."""

    hospital: Hospital
    command: str
    popen: subprocess.Popen[bytes]
    log: Path

    def ended(self) -> DemoFailed:
        code = self.popen.wait()
        text = f"hsl-node {self.command} of {self.hospital.name} ended with exit code {code}; its last lines:\n"
        return DemoFailed(text + tail(self.log), exit_code=code if code > 0 else 1)


@contextmanager
def running(hospitals: Sequence[Hospital], *words: str) -> Iterator[list[Process]]:
    """`hsl-node WORDS` at every hospital, all at once; on leaving, however, none is left: each saves and leaves.

    A second Ctrl-C may leave one that hangs; the next demo in this folder stops it.
    """
    started: list[Process] = []
    try:
        for hospital in hospitals:
            with _interruption_held_back():
                started.append(_start(hospital, words))
        yield started
    finally:
        end_all([process.popen for process in started])


@contextmanager
def _interruption_held_back() -> Iterator[None]:
    """Ctrl-C counts after this block, not within: a process that was just started stands in no list yet."""
    came: list[int] = []
    before = {number: signal.signal(number, lambda n, _: came.append(n)) for number in (signal.SIGINT, *ENDINGS)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if came:
        raise KeyboardInterrupt


def wait_finished(daemons: Sequence[Process], show: Callable[[Snapshots], None]) -> None:
    """Until every daemon says: finished, the last fusion validated, no delivery owed.

    Raises:
        DemoFailed: one has ended, halted, or its trainer dies again and again.
    """
    while True:
        found = {daemon.hospital.name: _ask(daemon) for daemon in daemons}
        show(found)
        if all(s and s.phase == Phase.FINISHED and s.still_to_do is None for s in found.values()):
            return
        time.sleep(POLL_S)


def _ask(daemon: Process) -> Snapshot | None:
    if daemon.popen.poll() is not None:
        raise daemon.ended()
    hospital = daemon.hospital
    try:
        status = from_json(control.ask(hospital.state, "status")["status"])
    except (NotRunning, WaitTimeout):
        return None
    if status.state == "halted":
        raise DemoFailed(f"{hospital.name} halted: {escaped(status.reason, 600)}", exit_code=14)
    if status.trainer and status.trainer.restarts >= TRAINER_DEATHS_MAX:
        raise DemoFailed(
            f"the trainer of {hospital.name} died {status.trainer.restarts} times; its last lines:\n"
            + tail(Layout(hospital.state).trainer_log)
        )
    return status


def evaluate_all(hospitals: Sequence[Hospital], show: Callable[[dict[str, str]], None]) -> None:
    """`hsl-node evaluate --alone` at every hospital. `show` hears what each is doing.

    All at once, as their trainers were before: they need no more memory than those.

    Raises:
        DemoFailed: one of them failed.
    """
    with running(hospitals, "evaluate", "--alone") as evaluations:
        while True:
            words = {e.hospital.name: _doing(e) for e in evaluations}
            show(words)
            if all(word == "done" for word in words.values()):
                return
            time.sleep(POLL_S / 2)


def _doing(evaluation: Process) -> str:
    code = evaluation.popen.poll()
    if code:
        raise evaluation.ended()
    return "done" if code == 0 else tail(evaluation.log, 1).strip()


# ------------------------------------------------------------------ processes


def _start(hospital: Hospital, words: Sequence[str]) -> Process:
    """Start a process that Ctrl-C in our terminal does not reach: we end it, in order."""
    path = Layout(hospital.state).log / f"{words[0]}.txt"
    with open(path, "wb") as log:
        popen = subprocess.Popen(
            [sys.executable, "-m", "hsl_node.cli", "--state", str(hospital.state), *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=log,
            start_new_session=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
    return Process(hospital, words[0], popen, path)


def end_all(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """SIGTERM to what still runs, SIGKILL to what does not leave."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + STOP_S
    for process in processes:
        try:
            process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def interruptible() -> None:
    """SIGTERM and SIGHUP (a closed terminal) end the demo as Ctrl-C does: with its processes."""
    for number in ENDINGS:
        signal.signal(number, signal.default_int_handler)


def tail(path: Path, lines: int = TAIL_LINES) -> str:
    """A log's last lines, made safe for a terminal."""
    text = ""
    with suppress(OSError), open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 16_384))
        text = file.read().decode("utf-8", "replace")
    return "\n".join(f"  {escaped(line, 300)}" for line in text.splitlines()[-lines:]) or "  (nothing yet)"
