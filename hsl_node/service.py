"""Tell the service manager how we are: systemd's notify protocol, a datagram of `KEY=value` lines.

Without NOTIFY_SOCKET in the environment every call is a no-op, so the daemon needs no second code path. A message that
cannot be sent never disturbs the training: systemd acts on missing ones by itself (start timeout, watchdog).
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import MutableMapping
from dataclasses import dataclass

from hsl_node.errors import ConfigError, escaped

log = logging.getLogger(__name__)

SEND_TIMEOUT_S = 1.0  # the manager's queue is full only while it is stuck itself; don't get stuck with it
STATUS_MAX_CHARS = 300  # `systemctl status` shows one line


@dataclass(frozen=True)
class Notifier:
    """The way to the service manager; `address` is None where nobody listens."""

    address: str | None = None  # a path, or "@name" in the abstract namespace
    watchdog_s: float | None = None  # the manager's limit between two pings; None: no watchdog is set

    @classmethod
    def from_environment(cls, environ: MutableMapping[str, str] | None = None) -> Notifier:
        """Read NOTIFY_SOCKET, WATCHDOG_USEC and WATCHDOG_PID and take them out of the environment, so that no child
        speaks in our name (a trainer's ping would hide a dead supervisor).

        Raises:
            ConfigError: a kind of address or a number that the protocol does not know.
        """
        environ = os.environ if environ is None else environ
        address = environ.pop("NOTIFY_SOCKET", "") or None
        usec, pid = environ.pop("WATCHDOG_USEC", ""), environ.pop("WATCHDOG_PID", "")
        if address is not None and address[0] not in "/@":
            raise ConfigError(
                f"NOTIFY_SOCKET={escaped(address)} is neither a path nor an abstract socket",
                remedy="unset it, or start hsl-node under systemd",
            )
        try:
            limit_s = int(usec) / 1e6 if usec else 0.0
            ours = not pid or int(pid) == os.getpid()
        except ValueError as exc:
            raise ConfigError(
                f"WATCHDOG_USEC={escaped(usec)}, WATCHDOG_PID={escaped(pid)}: not numbers",
                remedy="unset them, or start hsl-node under systemd",
            ) from exc
        return cls(address, limit_s if limit_s > 0 and ours and address else None)

    @property
    def ping_every_s(self) -> float | None:
        """How often to call `watchdog()`: half the limit, as systemd advises. None: never."""
        return self.watchdog_s / 2 if self.watchdog_s else None

    def ready(self, status: str = "") -> bool:
        """Started, or done with reloading: peers can reach us."""
        return self._send("READY=1", *_status(status))

    def status(self, text: str) -> bool:
        """The one line that `systemctl status` shows."""
        return self._send(*_status(text))

    def watchdog(self) -> bool:
        """Still alive. To be called from the loop whose life it proves."""
        return self._send("WATCHDOG=1")

    def reloading(self) -> bool:
        """Reading the files again; `ready()` must follow."""
        return self._send("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def stopping(self, status: str = "") -> bool:
        """Leaving on purpose: what follows is no failure."""
        return self._send("STOPPING=1", *_status(status))

    def extend(self, seconds: float) -> bool:
        """Ask for this much more time before a slow start or stop counts as hung."""
        return self._send(f"EXTEND_TIMEOUT_USEC={int(seconds * 1e6)}")

    def _send(self, *lines: str) -> bool:
        """Whether the message went out. False without a manager, and when it could not be sent (logged)."""
        if self.address is None or not lines:
            return False
        address = "\0" + self.address[1:] if self.address.startswith("@") else self.address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
                sock.settimeout(SEND_TIMEOUT_S)
                sock.connect(address)
                sock.sendall("\n".join(lines).encode())
        except OSError as exc:
            log.warning("the service manager was not reached", extra={"message_kind": lines[0], "error": str(exc)})
            return False
        return True


def _status(text: str) -> tuple[str, ...]:
    # Escaped, so that a newline in an error text cannot become a second assignment.
    return (f"STATUS={escaped(text, STATUS_MAX_CHARS)}",) if text else ()
