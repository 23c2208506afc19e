"""The notify protocol, spoken to a socket of our own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hsl_node.host.systemd import LINE_MAX_CHARS, extend, notify, watchdog_interval_s


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """A socket as systemd opens it, named in NOTIFY_SOCKET."""
    address = str(tmp_path / "notify") if request.param == "path" else f"@hsl-test-{os.getpid()}-{time.monotonic_ns()}"
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind("\0" + address[1:] if address[0] == "@" else address)
        sock.settimeout(60)
        yield sock


def received(sock: socket.socket) -> dict[str, str]:
    return dict(line.split("=", 1) for line in sock.recv(4096).decode().splitlines())


@pytest.mark.parametrize(
    "lines",
    [
        ["READY=1", "STATUS=round 1 of 20"],
        ["STATUS=waiting for mercy since 12:04"],
        ["WATCHDOG=1"],
        ["STOPPING=1"],
        [extend(1.5)],
    ],
    ids=lambda lines: str(lines[0].split("=")[0]),
)
def test_each_report_is_one_message(manager: socket.socket, lines: list[str]) -> None:
    assert notify(*lines)
    assert manager.recv(4096).decode() == "\n".join(lines)


def test_more_time_is_asked_for_in_microseconds() -> None:
    assert extend(1.5) == "EXTEND_TIMEOUT_USEC=1500000"


def test_a_newline_in_a_status_cannot_become_a_second_assignment(manager: socket.socket) -> None:
    notify("STATUS=mercy said:\nMAINPID=1\x1b[31m")
    assert received(manager) == {"STATUS": r"mercy said:\nMAINPID=1\x1b[31m"}


def test_a_long_status_is_cut_to_one_line(manager: socket.socket) -> None:
    notify("STATUS=" + "x" * 10_000)
    assert len(manager.recv(65536).decode()) == LINE_MAX_CHARS


def test_without_a_service_manager_nothing_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"):
        monkeypatch.delenv(name, raising=False)
    assert not notify("READY=1")
    assert watchdog_interval_s() is None


@pytest.mark.parametrize("address", ["/nonexistent/notify", "vsock:2:9999", "@hsl-test-nobody-listens"])
def test_an_unreachable_manager_is_logged_and_nothing_more(
    address: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    assert not notify("READY=1")
    assert [r.getMessage() for r in caplog.records] == ["the service manager was not reached"]


def test_a_manager_that_does_not_read_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full queue ends in False after the send timeout instead of blocking the daemon's loop for ever."""
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "deaf"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as deaf:
        deaf.bind(str(tmp_path / "deaf"))
        while notify("WATCHDOG=1"):
            pass


@pytest.mark.parametrize(
    ("usec", "pid", "interval_s"),
    [
        ("60000000", "ours", 30.0),
        ("60000000", "", 30.0),
        ("60000000", "1", None),  # meant for another process: a child that inherited the variables
        ("0", "", None),
        ("soon", "", None),
    ],
)
def test_the_ping_comes_twice_per_watchdog_limit_and_only_from_the_process_it_is_for(
    usec: str, pid: str, interval_s: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", usec)
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()) if pid == "ours" else pid)
    assert watchdog_interval_s() == interval_s


DAEMON = """
import signal, time
from hsl_node.host.systemd import notify, watchdog_interval_s

stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
notify("READY=1", "STATUS=up")
while not stop:
    notify("WATCHDOG=1")
    time.sleep(watchdog_interval_s())
notify("STOPPING=1", "STATUS=bye")
"""


def test_a_child_process_goes_from_ready_through_pings_to_stopping(manager: socket.socket) -> None:
    environ = {**os.environ, "WATCHDOG_USEC": "100000", "WATCHDOG_PID": ""}
    with subprocess.Popen([sys.executable, "-c", DAEMON], env=environ) as child:
        assert received(manager) == {"READY": "1", "STATUS": "up"}
        assert [received(manager) for _ in range(3)] == [{"WATCHDOG": "1"}] * 3
        child.terminate()
        while (last := received(manager)) == {"WATCHDOG": "1"}:
            pass
    assert last == {"STOPPING": "1", "STATUS": "bye"}
    assert child.returncode == 0
