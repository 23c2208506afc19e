"""The log: events with fields, as JSON lines in STATE/log/hsl-node.log and as one human line each on stderr.

    log.info("checkpoint verified", extra={"peer": peer, "round": round, "bytes": size})

Never a patient, never the path of an image. Strings are escaped and capped: peers choose some of them.
"""

from __future__ import annotations

import contextlib
import json
import logging
import logging.handlers
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from hsl_node.errors import NotInitialised, escaped
from hsl_node.host.layout import Layout

FILE_MAX_BYTES = 10 * 1024 * 1024  # about 50,000 events: weeks of a federation
FILES_KEPT = 5
TEXT_MAX = 2000  # of one field; a traceback gets ten times as much

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_PRIORITY = {"CRITICAL": 2, "ERROR": 3, "WARNING": 4, "INFO": 6, "DEBUG": 7}  # of syslog, for the journal of systemd


def setup(state: Path, level: str = "INFO") -> None:
    """Send every logger to the file and to stderr. Calling it again replaces what it set up before."""
    Layout(state).event_log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    root = logging.getLogger()
    for handler in [h for h in root.handlers if isinstance(h, (_File, _Human))]:
        root.removeHandler(handler)
        handler.close()
    root.setLevel(level)
    root.addHandler(_File(Layout(state).event_log))
    root.addHandler(_Human(sys.stderr))
    for chatty in ("asyncssh", "paramiko"):  # each login would be a dozen lines; refusals we log ourselves
        logging.getLogger(chatty).setLevel(logging.WARNING)


class _File(logging.handlers.RotatingFileHandler):
    """JSON lines, mode 0600. A full disk costs log lines, never the daemon: stderr has them still."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, maxBytes=FILE_MAX_BYTES, backupCount=FILES_KEPT, encoding="utf-8")

    def _open(self) -> Any:
        return open(self.baseFilename, "a", encoding="utf-8", opener=lambda name, flags: os.open(name, flags, 0o600))

    def format(self, record: logging.LogRecord) -> str:
        return json.dumps(event(record), ensure_ascii=False)

    def handleError(self, record: logging.LogRecord) -> None:
        pass

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()


class _Human(logging.StreamHandler[TextIO]):
    """One line an event. Under systemd with a priority and without the time, which its journal adds."""

    def format(self, record: logging.LogRecord) -> str:
        if "JOURNAL_STREAM" in os.environ:
            return f"<{_PRIORITY.get(record.levelname, 6)}>{_sentence(event(record))}"
        return human(event(record))


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
