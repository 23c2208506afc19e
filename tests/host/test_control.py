"""The control socket: what the daemon answers, and what a person is told when it does not."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from control_server import daemon, serving

from hsl_node.errors import AlreadyRunning, HslError, NotRunning, WaitTimeout
from hsl_node.host import control
from hsl_node.host.layout import Layout


def test_a_request_gets_the_handlers_answer(tmp_path: Path) -> None:
    with serving(tmp_path):
        assert control.ask(tmp_path, "status") == {"said": "status"}


def test_only_the_owner_may_connect(tmp_path: Path) -> None:
    with serving(tmp_path):
        assert Layout(tmp_path).socket.stat().st_mode & 0o777 == 0o600


def test_without_a_daemon_it_is_not_running(tmp_path: Path) -> None:
    with pytest.raises(NotRunning, match="no hsl-node is running"):
        control.ask(tmp_path, "status")


def test_the_socket_of_a_killed_daemon_counts_as_not_running_and_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(str(Layout(tmp_path).socket))
    assert Layout(tmp_path).socket.exists()
    with pytest.raises(NotRunning):
        control.ask(tmp_path, "status")
    with serving(tmp_path):
        assert control.ask(tmp_path, "status") == {"said": "status"}
    assert not Layout(tmp_path).socket.exists()


def test_a_state_directory_may_lie_deeper_than_a_socket_name_is_long(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 80) / ("e" * 80)
    with serving(deep):
        assert len(str(Layout(deep).socket)) > 107
        assert control.ask(deep, "pause") == {"said": "pause"}


def test_an_error_of_ours_travels_with_remedy_and_exit_code(tmp_path: Path) -> None:
    async def refuse(op: str, request: dict[str, Any]) -> dict[str, Any]:
        raise AlreadyRunning("taken", remedy="look elsewhere")

    with serving(tmp_path, refuse), pytest.raises(HslError) as caught:
        control.ask(tmp_path, "pause")
    assert (caught.value.message, caught.value.remedy, caught.value.exit_code) == ("taken", "look elsewhere", 11)


def test_a_bug_in_the_handler_is_reported_and_the_daemon_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(op: str, request: dict[str, Any]) -> dict[str, Any]:
        if op == "pause":
            raise ZeroDivisionError("secret detail")
        return {"said": op}

    with serving(tmp_path, broken):
        with pytest.raises(HslError, match="failed inside the daemon") as caught:
            control.ask(tmp_path, "pause")
        assert "secret" not in str(caught.value)
        assert control.ask(tmp_path, "status") == {"said": "status"}
    assert "ZeroDivisionError" in caplog.text


@pytest.mark.parametrize("line", [b"hello\n", b"[]\n", b'{"op": "explode"}\n', b'{"op": ["status"]}\n', b"\xff\xfe\n"])
def test_nonsense_is_answered_with_an_error(tmp_path: Path, line: bytes) -> None:
    with serving(tmp_path), socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(Layout(tmp_path).socket))
        connection.sendall(line)
        answer = json.loads(connection.makefile("rb").readline())
    assert answer["ok"] is False and answer["exit_code"] == 2


def test_a_silent_or_endless_client_does_not_disturb_the_next(tmp_path: Path) -> None:
    with serving(tmp_path), socket.socket(socket.AF_UNIX) as silent, socket.socket(socket.AF_UNIX) as endless:
        silent.connect(str(Layout(tmp_path).socket))
        endless.connect(str(Layout(tmp_path).socket))
        with pytest.raises(OSError):  # it is cut off at the limit
            for _ in range(100):
                endless.sendall(b"x" * control.REQUEST_MAX_BYTES)
        assert control.ask(tmp_path, "status") == {"said": "status"}


def test_a_daemon_that_hangs_is_told_apart_from_none(tmp_path: Path) -> None:
    released = asyncio.Event()

    async def hang(op: str, request: dict[str, Any]) -> dict[str, Any]:
        await released.wait()
        return {}

    with serving(tmp_path, hang), pytest.raises(WaitTimeout, match="has not answered"):
        control.ask(tmp_path, "status", timeout_s=0.2)


def test_stop_and_wait_returns_when_the_process_is_gone_not_when_its_socket_is(tmp_path: Path) -> None:
    with daemon(tmp_path, saves_for_s=0.5) as process:
        control.stop(tmp_path, wait_s=60)
        assert process.poll() == 0


def test_stop_gives_up_waiting_with_its_own_exit_code(tmp_path: Path) -> None:
    with daemon(tmp_path, saves_for_s=60) as process:
        with pytest.raises(WaitTimeout, match="still running") as caught:
            control.stop(tmp_path, wait_s=0.2)
        assert caught.value.exit_code == 16
        process.kill()


def test_the_client_half_loads_nothing_slow() -> None:
    code = (
        "import sys, hsl_node.host.control; print([m for m in ('asyncio', 'pydantic', 'asyncssh') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout.strip() == "[]"
