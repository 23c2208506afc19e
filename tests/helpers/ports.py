"""Ports for servers that are started later, or again on the same port. Whoever can bind at once takes port 0 instead.

Nobody gets these by accident: they lie below the range from which the kernel serves port 0 and outgoing connections.
Two test processes get different ones: each takes a block for itself, by a lock that ends with the process.
"""

from __future__ import annotations

import itertools
import os
import socket
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

FIRST = 10_000
BLOCK = 400  # a federation takes 3; by the time a block has gone round, what used a port is long over
KERNELS = Path("/proc/sys/net/ipv4/ip_local_port_range")


def free_ports(count: int) -> list[int]:
    """Different ports of this process's block on which nothing listens now."""
    found: list[int] = []
    for port in itertools.islice(_cycle(os.getpid()), BLOCK):
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            found.append(port)
        if len(found) == count:
            return found
    raise AssertionError(f"no {count} free ports in a block of {BLOCK}")


@cache
def _cycle(pid: int) -> Iterator[int]:
    """The ports of a block, round and round; a forked process (`pid`) takes a block of its own."""
    end = int(KERNELS.read_text().split()[0])
    for start in range(FIRST, end - BLOCK + 1, BLOCK):
        lock = socket.socket(socket.AF_UNIX)
        try:
            lock.bind(f"\0hsl-test-ports-{start}")  # abstract: one owner in the network namespace, as with the ports
        except OSError:
            lock.close()
            continue
        _locks.append(lock)
        return itertools.cycle(range(start, start + BLOCK))
    raise AssertionError(f"all blocks of ports from {FIRST} to {end} are taken by other test runs")


_locks: list[socket.socket] = []
