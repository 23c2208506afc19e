"""What every TCP connection of this node is set to, whoever opened it."""

from __future__ import annotations

import errno
import socket
from contextlib import closing, suppress

LOST_PEER_S = 60  # keepalive 15 s x 4; the kernel gives up on unacknowledged bytes at the same time
# It follows what a line carries instead of what it loses: with 1 % loss and 40 ms 78 Mbit/s of 100, cubic has 3.4. A
# slow line that is full both ways it takes for slower than it is (256 kbit/s: 0.8 of cubic), so that keeps its own.
FAST = b"bbr"
FAST_BYTES = 256 * 1024  # of `Flow`; about 1 Mbit/s


def tune(sock: socket.socket) -> None:
    """No waiting for more to send, and an end for a black hole."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # else a black hole is retransmitted to for 15 minutes
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, LOST_PEER_S * 1000)


class Congestion:
    """Which congestion control one connection's kernel uses: its own, or FAST once the line shows to be fast."""

    def __init__(self, sock: socket.socket | None) -> None:
        self._sock = sock
        self._fast = False

    def follow(self, most_bytes: int) -> None:
        """`most_bytes`: of `Flow`."""
        if self._sock is not None and not self._fast and most_bytes >= FAST_BYTES:
            self._fast = True
            _ask_for_it(self._sock)


def listening(host: str, port: int) -> socket.socket:
    """At this address; "::" is every one of IPv6 and IPv4, or of IPv4 alone on a machine without the other.

    Raises:
        OSError: the port is in use, or the address is not ours.
    """
    if host == "::":
        try:
            return socket.create_server((host, port), family=socket.AF_INET6, dualstack_ipv6=True)
        except OSError as exc:
            if exc.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                raise
        except ValueError:  # this system's sockets are of one kind
            pass
        host = "0.0.0.0"
    return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)


def congestion_control() -> str:
    """What this machine's kernel lets a fast connection use; empty: it does not tell."""
    if not hasattr(socket, "TCP_CONGESTION"):
        return ""
    with closing(socket.socket()) as sock:
        _ask_for_it(sock)
        return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0").decode("ascii", "replace")


def _ask_for_it(sock: socket.socket) -> None:
    if hasattr(socket, "TCP_CONGESTION"):
        with suppress(OSError):  # no such module, not for us, or the connection is gone
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, FAST)
