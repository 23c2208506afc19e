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

from hsl_node.errors import ConfigError
from hsl_node.service import Notifier


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[socket.socket, str]]:
    """A socket as systemd opens it, and its NOTIFY_SOCKET value."""
    address = str(tmp_path / "notify") if request.param == "path" else f"@hsl-test-{os.getpid()}-{time.monotonic_ns()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(address.replace("@", "\0", 1) if request.param == "abstract" else address)
        sock.settimeout(10)
        yield sock, address


def received(sock: socket.socket) -> dict[str, str]:
    return dict(line.split("=", 1) for line in sock.recv(4096).decode().splitlines())


def test_each_state_of_a_service_is_one_message(manager: tuple[socket.socket, str]) -> None:
    sock, address = manager
    notifier = Notifier(address)

    assert notifier.ready("round 1 of 20") and received(sock) == {"READY": "1", "STATUS": "round 1 of 20"}
    assert notifier.status("waiting for mercy") and received(sock) == {"STATUS": "waiting for mercy"}
    assert notifier.watchdog() and received(sock) == {"WATCHDOG": "1"}
    assert notifier.extend(1.5) and received(sock) == {"EXTEND_TIMEOUT_USEC": "1500000"}
    assert notifier.stopping() and received(sock) == {"STOPPING": "1"}


def test_reloading_carries_the_monotonic_clock_in_microseconds(manager: tuple[socket.socket, str]) -> None:
    sock, address = manager
    before = time.monotonic_ns() // 1000
    Notifier(address).reloading()
    message = received(sock)
    assert message["RELOADING"] == "1"
    assert before <= int(message["MONOTONIC_USEC"]) <= time.monotonic_ns() // 1000


def test_a_newline_in_a_status_cannot_become_a_second_assignment(manager: tuple[socket.socket, str]) -> None:
    sock, address = manager
    Notifier(address).status("mercy said:\nMAINPID=1\x1b[31m")
    assert received(sock) == {"STATUS": r"mercy said:\nMAINPID=1\x1b[31m"}


def test_a_long_status_is_cut_to_one_line(manager: tuple[socket.socket, str]) -> None:
    sock, address = manager
    Notifier(address).status("x" * 10_000)
    assert len(received(sock)["STATUS"]) == 300


def test_without_a_service_manager_every_call_is_a_no_op() -> None:
    notifier = Notifier.from_environment({})
    assert notifier == Notifier(None, None) and notifier.ping_every_s is None
    assert not any([notifier.ready(), notifier.status("x"), notifier.watchdog(), notifier.reloading()])
    assert not any([notifier.stopping(), notifier.extend(1)])


def test_a_manager_that_went_away_is_logged_and_nothing_more(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert not Notifier(str(tmp_path / "gone")).ready()
    assert [r.getMessage() for r in caplog.records] == ["the service manager was not reached"]


def test_a_manager_that_does_not_read_holds_nobody_up(tmp_path: Path) -> None:
    """A full queue ends in False after the send timeout, instead of blocking the daemon's loop for ever."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as deaf:
        deaf.bind(str(tmp_path / "deaf"))
        notifier = Notifier(str(tmp_path / "deaf"))
        while notifier.watchdog():
            pass


def test_the_ping_comes_twice_per_watchdog_limit() -> None:
    environ = {"NOTIFY_SOCKET": "/run/x", "WATCHDOG_USEC": "60000000", "WATCHDOG_PID": str(os.getpid())}
    notifier = Notifier.from_environment(environ)
    assert (notifier.watchdog_s, notifier.ping_every_s) == (60.0, 30.0)


def test_a_watchdog_meant_for_another_process_is_not_ours() -> None:
    environ = {"NOTIFY_SOCKET": "/run/x", "WATCHDOG_USEC": "60000000", "WATCHDOG_PID": "1"}
    assert Notifier.from_environment(environ).ping_every_s is None


def test_children_do_not_inherit_the_socket() -> None:
    environ = {"NOTIFY_SOCKET": "/run/x", "WATCHDOG_USEC": "1", "WATCHDOG_PID": "1", "PATH": "/bin"}
    Notifier.from_environment(environ)
    assert environ == {"PATH": "/bin"}


@pytest.mark.parametrize("environ", [{"NOTIFY_SOCKET": "vsock:2:9"}, {"WATCHDOG_USEC": "soon"}])
def test_an_environment_the_protocol_does_not_know_is_a_configuration_error(environ: dict[str, str]) -> None:
    with pytest.raises(ConfigError) as caught:
        Notifier.from_environment(environ)
    assert caught.value.exit_code == 78


DAEMON = """
import signal, time
from hsl_node.service import Notifier

notifier = Notifier.from_environment()
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
notifier.ready("up")
while not stop:
    notifier.watchdog()
    time.sleep(notifier.ping_every_s)
notifier.stopping("bye")
"""


def test_a_child_process_goes_from_ready_through_pings_to_stopping(manager: tuple[socket.socket, str]) -> None:
    sock, address = manager
    environ = {**os.environ, "NOTIFY_SOCKET": address, "WATCHDOG_USEC": "100000"}
    environ.pop("WATCHDOG_PID", None)
    with subprocess.Popen([sys.executable, "-c", DAEMON], env=environ) as child:
        assert received(sock) == {"READY": "1", "STATUS": "up"}
        assert [received(sock) for _ in range(3)] == [{"WATCHDOG": "1"}] * 3
        child.terminate()
        while (last := received(sock)) == {"WATCHDOG": "1"}:
            pass
    assert last == {"STOPPING": "1", "STATUS": "bye"}
    assert child.returncode == 0
