"""The control socket: how `hsl-node status`, `pause` or `stop` talk to the running daemon.

`STATE/run/control.sock`, mode 0600. One line of JSON there, one line back, for each connection:

    {"op": "status"}   ->   {"ok": true, ...the answer}   or   {"ok": false, "error": .., "remedy": .., "exit_code": ..}

The client half imports neither asyncio nor anything else that is slow to load.
"""

from __future__ import annotations

import json
import logging
import os
import select
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hsl_node.errors import HslError, NotRunning, WaitTimeout
from hsl_node.host import permissions
from hsl_node.host.hints import nothing_here
from hsl_node.host.layout import Layout

if TYPE_CHECKING:
    import asyncio

Handler = Callable[[str, dict[str, Any]], Awaitable[dict[str, Any]]]  # (op, request) -> answer

OPS = ("status", "pause", "resume", "stop", "keys")
REQUEST_MAX_BYTES = 64 * 1024  # our own requests have a few dozen bytes
REQUEST_TIMEOUT_S = 10.0  # whoever connects and says nothing holds no slot for ever
ANSWER_TIMEOUT_S = 10.0  # the loop answers within milliseconds; a daemon silent for this long needs a look
_SUN_PATH_MAX = 107  # bytes of a unix socket's path (Linux: 108 with the closing zero)

log = logging.getLogger(__name__)


# ------------------------------------------------------------------ the client


def ask(state: Path, op: str, timeout_s: float = ANSWER_TIMEOUT_S) -> dict[str, Any]:
    """Send one request to the daemon of this state directory and return its answer.

    Raises:
        NotRunning: nobody listens.
        WaitTimeout: somebody listens but does not answer.
        HslError: the daemon refused; with its own words, remedy and exit code.
    """
    with _connected(state, timeout_s) as connection:
        return _exchange(connection, op)


def stop(state: Path, wait_s: float) -> None:
    """Ask the daemon to leave; return when its process is gone.

    Raises:
        NotRunning: nobody listens.
        WaitTimeout: it is still there after `wait_s` seconds.
    """
    with _connected(state, ANSWER_TIMEOUT_S) as connection:
        # A pidfd, since a number could belong to another process by the time we look; readable once that has ended.
        process = os.pidfd_open(_pid_of(connection))
        try:
            _exchange(connection, "stop")
            if not select.select([process], [], [], wait_s)[0]:
                raise WaitTimeout(
                    f"the daemon is still running after {wait_s:.0f} s",
                    remedy="it closes transfers and the trainer first; look with `hsl-node status`, or wait longer",
                )
        finally:
            os.close(process)


@contextmanager
def _connected(state: Path, timeout_s: float) -> Iterator[socket.socket]:
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(timeout_s)
    with connection:
        try:
            try:
                with _short(Layout(state).socket) as name:
                    connection.connect(name)
            except PermissionError as exc:
                raise permissions.denied(Layout(state).socket, state) from exc
            yield connection
        except (FileNotFoundError, ConnectionRefusedError) as exc:
            here = Layout(state).node_toml.exists()
            what = f"no hsl-node is running on {state}" + ("" if here else ", which holds no node.toml")
            start = "`hsl-node start`, or `systemctl start hsl-node`"
            raise NotRunning(what, remedy=start if here else nothing_here(state)) from exc
        except TimeoutError as exc:
            raise WaitTimeout(
                f"the daemon of {state} runs but has not answered for {timeout_s:.0f} s",
                remedy="look at `hsl-node logs`; if it stays like this, restart the service: no round is lost",
            ) from exc


def _exchange(connection: socket.socket, op: str) -> dict[str, Any]:
    try:
        connection.sendall(json.dumps({"op": op}).encode() + b"\n")
        with connection.makefile("rb") as answers:
            line = answers.readline()
    except (BrokenPipeError, ConnectionResetError):
        line = b""
    if not line.endswith(b"\n"):
        raise NotRunning("the daemon ended while it was asked", remedy="`hsl-node logs` says why")
    answer: dict[str, Any] = json.loads(line)
    if not answer.pop("ok"):
        refused = HslError(str(answer["error"]), remedy=str(answer.get("remedy", "")))
        refused.exit_code = int(answer.get("exit_code", 1))
        raise refused
    return answer


def _pid_of(connection: socket.socket) -> int:
    """The process at the other end, from the kernel."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", credentials)[0])


# ------------------------------------------------------------------ the server, in the daemon


@asynccontextmanager
async def serve(path: Path, handler: Handler) -> AsyncIterator[None]:
    """Answer requests on `path` until the block is left.

    A socket file left by a killed daemon is replaced: the caller holds the lock of the state directory. An HslError of
    the handler travels to the client; a bug in it is logged and leaves the daemon running.
    """
    import asyncio

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                line = await reader.readline()
            writer.write(json.dumps(await _handled(line, handler)).encode() + b"\n")
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                await writer.drain()
        except (TimeoutError, ConnectionError, ValueError):
            pass  # silent, gone, or a line beyond the limit: nobody is there to be told
        finally:
            writer.close()

    with _short(path) as name:
        server = await asyncio.start_unix_server(answer, name, limit=REQUEST_MAX_BYTES)
    path.chmod(0o600)  # nobody can come in between: the folder is 0700
    try:
        yield
    finally:
        server.close()
        path.unlink(missing_ok=True)


async def _handled(line: bytes, handler: Handler) -> dict[str, Any]:
    try:
        request = json.loads(line)
        op = request["op"]
    except (ValueError, KeyError, TypeError):
        return {"ok": False, "error": "not a request: one line of JSON with an op is expected", "exit_code": 2}
    if op not in OPS:
        return {"ok": False, "error": f"unknown op {op!r}", "remedy": f"known: {', '.join(OPS)}", "exit_code": 2}
    try:
        return {"ok": True, **await handler(op, request)}
    except HslError as exc:
        return {"ok": False, "error": exc.message, "remedy": exc.remedy, "exit_code": exc.exit_code}
    except Exception:
        log.exception("control request failed", extra={"op": op})
        return {"ok": False, "error": f"{op} failed inside the daemon", "remedy": "`hsl-node logs` shows the traceback"}


@contextmanager
def _short(path: Path) -> Iterator[str]:
    """A name for the socket that fits into 107 bytes, however deep the state directory lies."""
    if len(os.fsencode(path)) <= _SUN_PATH_MAX:
        yield str(path)
        return
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)
