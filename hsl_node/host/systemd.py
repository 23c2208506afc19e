"""Tell the service manager how we are: systemd's notify protocol, one datagram of `KEY=value` lines.

    notify("READY=1", "STATUS=round 1 of 20")
    notify("WATCHDOG=1")        # every `watchdog_interval_s()`, from the loop whose life it proves
    notify("STOPPING=1")

Without NOTIFY_SOCKET in the environment all of it is a no-op, so the daemon needs no second code path. A message that
cannot be sent never disturbs the training: the manager acts on missing ones by itself (start timeout, watchdog).
"""

from __future__ import annotations

import logging
import os
import socket

from hsl_node.errors import escaped

log = logging.getLogger(__name__)

SEND_TIMEOUT_S = 1.0  # the manager's queue is full only while it is stuck itself; don't get stuck with it
LINE_MAX_CHARS = 300  # `systemctl status` shows one line


def notify(*assignments: str) -> bool:
    """Send `KEY=value` lines as one message.

    Each is escaped, so that a newline in an error text cannot become a second assignment.

    Returns:
        Whether the message went out. False without a manager, and when it could not be sent (logged).
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return False
    message = "\n".join(escaped(line, LINE_MAX_CHARS) for line in assignments).encode()
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            sock.settimeout(SEND_TIMEOUT_S)
            sock.connect("\0" + address[1:] if address[0] == "@" else address)
            sock.sendall(message)
    except OSError as exc:
        log.warning("the service manager was not reached", extra={"about": assignments[0][:20], "error": str(exc)})
        return False
    return True


def watchdog_interval_s() -> float | None:
    """How often to send WATCHDOG=1: half the manager's limit, as it advises. None: no watchdog, or not for us."""
    usec, pid = os.environ.get("WATCHDOG_USEC", ""), os.environ.get("WATCHDOG_PID", "")
    if not usec.isdecimal() or int(usec) == 0 or (pid and pid != str(os.getpid())):
        return None
    return int(usec) / 2e6


def extend(seconds: float) -> str:
    """Asks for this much time from now before a slow start or stop counts as hung; to be repeated in time."""
    return f"EXTEND_TIMEOUT_USEC={int(seconds * 1e6)}"
