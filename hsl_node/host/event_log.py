"""The log: events with fields, as JSON lines in STATE/log/hsl-node.log and as one human line each on stderr.

    log.info("checkpoint verified", extra={"peer": peer, "round": round, "bytes": size})

Never a patient, never the path of an image. Strings are escaped and capped: peers choose some of them. Whoever logs
never waits for file or stderr: each has a thread of its own (`log_outlet.py`).
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import logging.handlers
import os
import select
import subprocess
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hsl_node.errors import NotInitialised, escaped
from hsl_node.host.layout import Layout
from hsl_node.host.log_outlet import Blocked, NobodyReads, Outlet

FILE_MAX_BYTES = 10 * 1024 * 1024  # about 50,000 events: weeks of a federation
FILES_KEPT = 5
TEXT_MAX = 2000  # of one field; a traceback gets ten times as much
END_S = 2.0  # what an end waits for a place that takes no lines

STDERR = 2
FILE = "log/hsl-node.log"
GONE = (errno.EPIPE, errno.EBADF, errno.EIO, errno.ECONNRESET)  # EIO: of a terminal that was closed

log = logging.getLogger(__name__)

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_PRIORITY = {"critical": 2, "error": 3, "warning": 4, "info": 6, "debug": 7}  # of syslog, for the journal of systemd


def setup(state: Path, level: str = "INFO") -> None:
    """Send every logger to the file and to stderr. Calling it again replaces what it set up before."""
    Layout(state).event_log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    root = logging.getLogger()
    _take_down()
    root.setLevel(level)
    root.addHandler(_Outlets(Layout(state).event_log))
    for chatty in ("asyncssh", "paramiko"):  # each login would be a dozen lines; refusals we log ourselves
        logging.getLogger(chatty).setLevel(logging.WARNING)


def finish() -> None:
    """The process is about to end: all is written that can be, and nothing that is said later waits for stderr."""
    for handler in _take_down():
        if not handler.heard or not select.select([], [STDERR], [], 0)[1]:
            os.dup2(os.open(os.devnull, os.O_WRONLY), STDERR)


def reopen() -> None:
    """Somebody has moved the file away (logrotate): what comes next begins a new one."""
    for handler in _ours():
        handler.file_outlet.do(handler.file.let_go)


def blocked() -> list[Blocked]:
    """Where lines cannot be written now, and how many were left out."""
    return [found for handler in _ours() for outlet in handler.outlets if (found := outlet.find_blocked())]


def _ours() -> list[_Outlets]:
    return [handler for handler in logging.getLogger().handlers if isinstance(handler, _Outlets)]


def _take_down() -> list[_Outlets]:
    gone = _ours()
    for handler in gone:
        logging.getLogger().removeHandler(handler)
        handler.close()
    return gone


class _Outlets(logging.Handler):
    """Hands each event to the file's thread and to stderr's."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.file = _File(path)
        self.file_outlet = Outlet(FILE, self.file.put, _gap)
        self.outlets = (self.file_outlet, Outlet("stderr", _say, _gap))
        self.heard = True  # all that was said on stderr was taken

    def emit(self, record: logging.LogRecord) -> None:
        content = event(record)
        for outlet in self.outlets:
            outlet.take(content)

    def flush(self) -> None:
        deadline = time.monotonic() + END_S
        for outlet in self.outlets:
            self.heard = outlet.flush(max(0.0, deadline - time.monotonic())) and not outlet.gone

    def close(self) -> None:
        self.flush()
        self.file_outlet.do(self.file.close)
        super().close()


class _File(logging.handlers.RotatingFileHandler):
    """JSON lines, mode 0600. A full disk costs log lines, never the daemon: stderr has them still."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, maxBytes=FILE_MAX_BYTES, backupCount=FILES_KEPT, encoding="utf-8")

    def put(self, content: dict[str, Any]) -> None:
        """Raises: OSError: it is not written; what was torn has a line of its own."""
        try:
            self.emit(logging.makeLogRecord({"msg": content}))
        except OSError:
            self.let_go()
            raise

    def let_go(self) -> None:
        """The next event opens the file anew."""
        stream, self.stream = self.stream, None
        if stream:
            with contextlib.suppress(OSError):
                stream.close()

    def _open(self) -> Any:
        descriptor = os.open(self.baseFilename, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        stream = os.fdopen(descriptor, "a", encoding="utf-8")
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":  # torn by a power cut or a full disk
            stream.write("\n")
        return stream

    def format(self, record: logging.LogRecord) -> str:
        return json.dumps(record.msg, ensure_ascii=False)

    def handleError(self, record: logging.LogRecord) -> None:
        raise  # what the caller is handling


def _say(content: dict[str, Any]) -> None:
    """One line an event on stderr. Under systemd with a priority and without the time, which its journal adds.

    Not by way of `sys.stderr`: an interpreter that leaves waits for whoever writes there.

    Raises:
        OSError: not taken.
        NobodyReads
    """
    if "JOURNAL_STREAM" in os.environ:
        text = f"<{_PRIORITY.get(content['level'], 6)}>{_sentence(content)}\n"
    else:
        text = f"{human(content)}\n"
    left = text.encode("utf-8", "backslashreplace")
    try:
        while left:
            left = left[os.write(STDERR, left) :]
    except OSError as exc:
        if exc.errno in GONE:
            log.info("stderr is closed: the log goes to its file alone")
            raise NobodyReads("nobody reads stderr") from exc
        raise


def _gap(count: int) -> dict[str, Any]:
    record = logging.makeLogRecord({"name": __name__, "levelno": logging.WARNING, "levelname": "WARNING"})
    return event(record) | {"event": "log lines are missing here: they could not be written", "lines": count}


def event(record: logging.LogRecord) -> dict[str, Any]:
    """A log record as the plain dict that one line of the file holds."""
    content: dict[str, Any] = {
        "time": _timestamp(record.created),
        "level": record.levelname.lower(),
        "logger": record.name,
        "event": escaped(record.getMessage(), TEXT_MAX),
    }
    for key, value in vars(record).items():
        if key not in _STANDARD:
            content[key] = value if isinstance(value, int | float | bool | None) else escaped(str(value), TEXT_MAX)
    if record.exc_info:
        text = logging.Formatter().formatException(record.exc_info)
        content["traceback"] = [escaped(line, TEXT_MAX) for line in text.splitlines()][-60:]
    return content


def human(content: dict[str, Any]) -> str:
    """One event as a person reads it: time, level, what happened, fields; a traceback below."""
    return f"{content.get('time', '')} {str(content.get('level', '')).upper():7} {_sentence(content)}"


def _sentence(content: dict[str, Any]) -> str:
    fields = "".join(
        f" {key}={value}"
        for key, value in content.items()
        if key not in ("time", "level", "logger", "event", "traceback")
    )
    below = "".join(f"\n  {line}" for line in content.get("traceback", ()))
    return f"{content.get('event', '')}{' ' if fields else ''}{fields}{below}"


def _timestamp(at: float) -> str:
    """Local time with its offset: what the wall clock in that hospital shows, and still unambiguous."""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(at)) + time.strftime("%z", time.localtime(at))


# ------------------------------------------------------------------ reading it: `hsl-node logs`


def tail(state: Path, count: int) -> list[dict[str, Any]]:
    """The last `count` events, oldest first, across rotated files.

    Raises:
        NotInitialised: nothing was ever logged here.
    """
    path = Layout(state).event_log
    if not path.exists():
        raise NotInitialised(f"no log at {path}", remedy="the daemon has not been started on this state directory yet")
    last: list[str] = []
    for file in (path, *(path.with_name(f"{path.name}.{n}") for n in range(1, FILES_KEPT + 1))):  # a file that the
        # daemon turns over meanwhile is at worst read twice, never missed
        with contextlib.suppress(FileNotFoundError), file.open(encoding="utf-8", errors="replace") as lines:
            last = [*deque(lines, maxlen=count - len(last)), *last]
        if len(last) == count:
            break
    return [parsed(line) for line in last]


def follow(state: Path) -> Iterator[dict[str, Any]]:
    """New events as they are written, for ever, also across a rotation."""
    command = ["tail", "-n", "0", "-F", str(Layout(state).event_log)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, encoding="utf-8", errors="replace"
    ) as tail:
        assert tail.stdout is not None
        try:
            yield from map(parsed, tail.stdout)
        finally:
            tail.kill()


def parsed(line: str) -> dict[str, Any]:
    """One line of the file; a line torn by a power cut is shown as it is."""
    try:
        content = json.loads(line)
    except ValueError:
        content = None
    return content if isinstance(content, dict) else {"event": escaped(line.rstrip("\n"), TEXT_MAX)}
